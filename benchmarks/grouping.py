"""Whether grouping by length changes the trained model: the same runs with and without it, on real pairs.

    python benchmarks/grouping.py --data.train train.jsonl --data.eval test.jsonl --output runs/grouping

A small Llama (vocabulary 2,048, width 64) is trained by `--method sft`, then by DPO from there: one run for each seed
and each order, with padded rows, because grouping saves little with packed rows. Writes result.json (padding fraction,
seconds per step, held-out metrics and their differences, paired by seed), result.csv (every loss) and result.png (the
curves). The same command resumes a killed study. Takes one core, about ten minutes.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from hh import make_base
from study import finished, lines, machine, train_all

ORDERS = {"random": "false", "grouped by length": "true"}
COLOURS = {"random": "#b3541e", "grouped by length": "#1f5fa8"}
WINDOW = 15  # steps that a plotted training loss is averaged over
HELD_OUT = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "kl/chosen", "kl/rejected")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.train", dest="train", required=True, type=Path)
    parser.add_argument("--data.eval", dest="eval", required=True, type=Path)
    parser.add_argument("--output", default=Path("runs/grouping"), type=Path)
    parser.add_argument("--seeds", default=3, type=int)
    parser.add_argument("--steps", default=75, type=int, help="of SFT and of each DPO run, 16 pairs each")
    parser.add_argument("--jobs", default=1, type=int, help="runs at the same time")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    base = make_base(args.train, args.output / "base", vocabulary=2048, width=64)
    common = ["--data.train", str(args.train), "--data.eval", str(args.eval), "--data.on_bad_row", "skip"]
    common += ["--data.max_length", "256", "--train.global_batch", "16", "--train.micro_batch", "4"]
    common += ["--train.max_steps", str(args.steps), "--train.save_every", str(args.steps)]
    sft = ["--method", "sft", "--model.path", str(base), *common, "--optim.lr", "3e-3", "--eval.every", str(args.steps)]
    train_all({"sft": sft}, args.output, 1)
    start = ["--method", "dpo", "--model.path", str(args.output / "sft" / "model"), *common, "--optim.lr", "5e-4"]
    start += ["--eval.every", str(max(1, args.steps // 4))]
    runs = {
        run_name(order, seed): [
            *start,
            "--train.layout",
            "padded",
            "--train.group_by_length",
            flag,
            "--seed",
            str(seed),
        ]
        for seed in range(args.seeds)
        for order, flag in ORDERS.items()
    }
    train_all(runs, args.output, args.jobs)
    assert all(finished(args.output / name) for name in runs)

    result = {"machine": machine(), **summarise(args.output, args.seeds)}
    (args.output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    write_losses(args.output / "result.csv", args.output, args.seeds)
    plot(args.output / "result.png", args.output, args.seeds)
    print(json.dumps(result, indent=1))


def run_name(order: str, seed: int) -> str:
    return f"{order.split()[0]}-seed{seed}"


def summarise(folder: Path, seeds: int) -> dict[str, Any]:
    """Per order, one value per seed; and held-out differences, grouped minus random, paired by seed."""
    orders: dict[str, dict[str, list[float]]] = {}
    for order in ORDERS:
        trained = [lines(folder / run_name(order, seed), "train") for seed in range(seeds)]
        last = [lines(folder / run_name(order, seed))[-1] for seed in range(seeds)]
        orders[order] = {
            "padding_fraction": [float(np.mean([line["padding_fraction"] for line in run])) for run in trained],
            "seconds_per_step": [float(np.median([line["seconds"] for line in run])) for run in trained],
            **{f"held-out {key}": [line[key] for line in last] for key in HELD_OUT},
        }
    random, grouped = orders.values()
    differences = {
        key: {
            "mean": float(np.mean(np.subtract(grouped[key], random[key]))),
            "per seed": np.subtract(grouped[key], random[key]).tolist(),
            "spread of seeds": float(np.ptp(random[key])),
        }
        for key in random
        if key.startswith("held-out")
    }
    return {"steps": len(trained[0]), "orders": orders, "grouped - random": differences}


def write_losses(path: Path, folder: Path, seeds: int) -> None:
    """One row per step and per evaluation of each run."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["order", "seed", "split", "step", "loss", "padding_fraction"])
        for order in ORDERS:
            for seed in range(seeds):
                for split in ("train", "eval"):
                    for line in lines(folder / run_name(order, seed), split):
                        share = f"{line['padding_fraction']:.4f}" if split == "train" else ""
                        table.writerow([order, seed, split, line["step"], f"{line['loss']:.6f}", share])


def plot(path: Path, folder: Path, seeds: int) -> None:
    """Loss in training (moving average) and on held-out pairs by step, and padding fraction, a line per seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    training, held_out, padding = figure.subplots(1, 3)
    for order in ORDERS:
        for seed in range(seeds):
            style: dict[str, Any] = {
                "color": COLOURS[order],
                "linewidth": 1.2,
                "alpha": 0.8,
                "label": None if seed else order,
            }
            run = lines(folder / run_name(order, seed), "train")
            window = min(WINDOW, len(run))
            smooth = np.convolve([line["loss"] for line in run], np.ones(window) / window, "valid")
            training.plot(np.arange(window, len(run) + 1), smooth, **style)
            evals = lines(folder / run_name(order, seed))
            held_out.plot([line["step"] for line in evals], [line["loss"] for line in evals], "o-", ms=3, **style)
            padding.plot(
                [line["step"] for line in run], [100 * line["padding_fraction"] for line in run], ".", ms=3, **style
            )
    training.set(title=f"training loss, mean of {WINDOW} steps", xlabel="step")
    held_out.set(title="held-out loss", xlabel="step")
    padding.set(title="padding, % of the input", xlabel="step", ylim=(0, None))
    for axes in (training, held_out, padding):
        axes.spines[["top", "right"]].set_visible(False)
    held_out.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
