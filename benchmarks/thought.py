"""Thought PO where a sum needs its intermediate steps: the effects of thinking, of hiding the thought, and of rho.

    python benchmarks/thought.py --output runs/thought

Each of 3 seeds has its own base policy and run in the testbed's world `scratchpad`. Arms with six rounds: Thought PO;
its direct baseline, which differs in the thought prompt alone; and an arm whose judge sees the thought too. Arms with
three rounds: the first and the last of these without length control, and four values of rho with a judge that prefers
long responses. Writes result.json, result.md and thought.png; the same command resumes a killed study.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from study import machine, train_all

ROUNDS, RHO_ROUNDS = 6, 3
ARMS = {
    "thought": ["--method", "thought_po"],
    "direct": ["--method", "thought_po", "--method.thought_prompt", "none"],
    "judge sees thought": ["--method", "judge_sees_thought.JudgeSeesThought"],
}
RHOS = ("0", "0.25", "0.5", "auto")
FREE = ("thought", "judge sees thought")  # arms that also run with rho 0
BROKEN = ("judge sees thought", "rho auto")  # lines of the plot
ACCURACY = {"direct": "exact/accuracy_direct"}  # for the other arms: exact/accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=Path("runs/thought"), type=Path)
    parser.add_argument("--seeds", default=3, type=int)
    parser.add_argument("--jobs", default=max(1, len(os.sched_getaffinity(0))), type=int, help="runs at the same time")
    args = parser.parse_args()

    runs: dict[str, list[str]] = {}
    for seed in range(args.seeds):
        world = ["--testbed.world", "scratchpad", "--testbed.seed", str(seed), "--seed", str(seed)]
        for arm, flags in ARMS.items():
            runs[f"{arm.replace(' ', '_')}-{seed}"] = [*flags, *world, "--rounds.count", str(ROUNDS)]
        for arm in FREE:
            free = [*ARMS[arm], *world, "--method.rho", "0", "--rounds.count", str(RHO_ROUNDS)]
            runs[f"{arm.replace(' ', '_')}_rho_0-{seed}"] = free
        for rho in RHOS:
            likes = ["--judge.kind", "function", "--judge.path", "wordy_judge:score", "--method.rho", rho]
            runs[f"rho_{rho}-{seed}"] = [*ARMS["thought"], *world, *likes, "--rounds.count", str(RHO_ROUNDS)]
    from prefopt.testbed import build_world
    from prefopt.testbed.cache import cache_root

    for seed in range(args.seeds):  # before the runs, which would otherwise each train the base policy of their seed
        path = build_world("scratchpad", seed=seed, cache_dir=cache_root()).base_model_path
        print(f"base policy of seed {seed}: {path}", flush=True)
    train_all(runs, args.output, args.jobs)

    seeds = range(args.seeds)
    result = {
        "machine": machine(),
        "arms": {
            arm: [figures(args.output / f"{arm.replace(' ', '_')}-{seed}", arm) for seed in seeds] for arm in ARMS
        },
        "free": {
            arm: [figures(args.output / f"{arm.replace(' ', '_')}_rho_0-{seed}", arm) for seed in seeds] for arm in FREE
        },
        "rho": {rho: [figures(args.output / f"rho_{rho}-{seed}", "thought") for seed in seeds] for rho in RHOS},
    }
    (args.output / "result.json").write_text(json.dumps(result, indent=1))
    table = render(result)
    (args.output / "result.md").write_text(table)
    plot(args.output / "thought.png", result)
    print(table)


def figures(run: Path, arm: str) -> dict[str, list[float]]:
    """Metrics of a run by round, including the start."""
    rows = [json.loads(text) for text in (run / "rounds.jsonl").read_text().splitlines()]
    names = {
        "accuracy": ACCURACY.get(arm, "exact/accuracy"),
        "no_thought": "exact/accuracy_no_thought",
        "parsed": "exact/parsed",
        "chain": "exact/chain",
        "thought": "thought_characters",
        "response": "response_characters",
        "rho": "pairs/rho",
        "kl": "kl/to_first",
    }
    return {key: [row.get(name) for row in rows] for key, name in names.items()}


def over_seeds(runs: Sequence[Mapping[str, Sequence[float]]], name: str, at: int) -> tuple[float, float]:
    """Mean of a metric after a round and half the width of its 95% interval (Student's t), over seeds."""
    from prefopt.testbed.world_report import mean_and_interval

    return mean_and_interval(np.array([run[name][at] for run in runs]))


def difference(one: Sequence[Any], other: Sequence[Any], at: int = -1) -> tuple[float, float]:
    """Paired difference of two arms' accuracy over seeds."""
    from prefopt.testbed.world_report import mean_and_interval

    return mean_and_interval(np.array([a["accuracy"][at] - b["accuracy"][at] for a, b in zip(one, other, strict=True)]))


def verdict(hidden: tuple[float, float], after: str) -> str:
    """A sentence that interprets the mean and interval of hidden minus seen."""
    mean, half = hidden
    if abs(mean) <= half:
        return f"{after} the interval holds 0: no difference is seen between hiding the thought and showing it"
    return f"{after} the interval does not hold 0: the judge that {'does not see' if mean > 0 else 'sees'} it is ahead"


def render(result: Mapping[str, Any]) -> str:
    """The tables of the study in Markdown."""
    from prefopt.testbed.world_report import mean_and_interval

    def cell(pair: tuple[float, float], spec: str = ".3f") -> str:
        return f"{pair[0]:{spec}} ± {pair[1]:{spec}}"

    arms, seeds = result["arms"], len(result["arms"]["thought"])
    out = [
        f"{seeds} seeds; means over seeds, 95% intervals (Student's t). {result['machine']}.",
        "",
        f"| exact accuracy after round | {' | '.join(map(str, range(ROUNDS + 1)))} |",
        "|---" * (ROUNDS + 2) + "|",
    ]
    for arm, runs in arms.items():
        out.append(f"| {arm} | {' | '.join(cell(over_seeds(runs, 'accuracy', k)) for k in range(ROUNDS + 1))} |")
    out += ["", f"| thought PO after round | {' | '.join(map(str, range(ROUNDS + 1)))} |", "|---" * (ROUNDS + 2) + "|"]
    titles = {
        "parsed": ("holds a response", ".3f"),
        "chain": ("running sums right", ".3f"),
        "thought": ("thought, characters", ".1f"),
        "response": ("response, characters", ".1f"),
        "no_thought": ("accuracy, marker forced at once", ".3f"),
    }
    for name, (title, spec) in titles.items():
        cells = [cell(over_seeds(arms["thought"], name, k), spec) for k in range(ROUNDS + 1)]
        out.append(f"| {title} | {' | '.join(cells)} |")
    gain = [run["accuracy"][-1] - run["accuracy"][0] for run in arms["thought"]]
    hidden = [difference(arms["thought"], arms["judge sees thought"], k) for k in range(ROUNDS + 1)]
    apart = [str(k) for k in range(1, ROUNDS) if abs(hidden[k][0]) > hidden[k][1]]
    between = f"before that it does not hold 0 after round {', '.join(apart)}" if apart else "so it does in each round"
    out += [
        "",
        f"| thought hidden minus seen, accuracy after round | {' | '.join(map(str, range(1, ROUNDS + 1)))} |",
        "|---" * (ROUNDS + 1) + "|",
        f"| seed by seed | {' | '.join(map(cell, hidden[1:]))} |",
        "",
        f"Gain of thought PO over its round 0: {cell(mean_and_interval(np.array(gain)))} "
        f"(by seed: {', '.join(f'{g:.3f}' for g in gain)}). "
        f"Over the direct baseline at the end: {cell(difference(arms['thought'], arms['direct']))}. "
        f"Does hiding the thought matter? {verdict(hidden[-1], f'After round {ROUNDS}')}; {between}. The intervals are "
        "of one round each.",
        "",
        f"| with rho 0, after round | {' | '.join(map(str, range(RHO_ROUNDS + 1)))} |",
        "|---" * (RHO_ROUNDS + 2) + "|",
    ]
    free, steps = result["free"], range(RHO_ROUNDS + 1)
    for arm, runs in free.items():
        out.append(f"| {arm}: accuracy | {' | '.join(cell(over_seeds(runs, 'accuracy', k)) for k in steps)} |")
        lengths = [cell(over_seeds(runs, "response", k), ".1f") for k in steps]
        out.append(f"| {arm}: response, characters | {' | '.join(lengths)} |")
    apart_free = [cell(difference(free["thought"], free["judge sees thought"], k), ".4f") for k in steps]
    gained = [cell(difference(free["thought"], arms["thought"], k), ".4f") for k in steps]
    out += [
        f"| thought hidden minus seen, accuracy | {' | '.join(apart_free)} |",
        f"| thought: rho 0 minus auto, accuracy | {' | '.join(gained)} |",
        "",
        "| rho, with a judge that likes length | response, characters: start | after each round | rho of each round | "
        "exact accuracy at the end |",
        "|---" * 5 + "|",
    ]
    for rho, runs in result["rho"].items():
        lengths = ", ".join(cell(over_seeds(runs, "response", k), ".1f") for k in range(1, RHO_ROUNDS + 1))
        chosen = "; ".join(", ".join(f"{run['rho'][k]:.2f}" for k in range(1, RHO_ROUNDS + 1)) for run in runs)
        end = cell(over_seeds(runs, "accuracy", -1))
        out.append(f"| {rho} | {cell(over_seeds(runs, 'response', 0), '.1f')} | {lengths} | {chosen} | {end} |")
    return "\n".join(out) + "\n"


def plot(path: Path, result: Mapping[str, Any]) -> None:
    """Small multiples over rounds: accuracy of the arms, lengths, parse rate, and response length by rho."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from prefopt.testbed.world_report import COLOURS, INK

    arms = result["arms"]
    thinking = {arm: runs for arm, runs in arms.items() if arm != "direct"}
    rhos = {f"rho {rho}": runs for rho, runs in result["rho"].items()}
    # one colour per arm in every panel; dashed lines show the line below
    styles = dict(zip([*arms, *rhos], [*COLOURS[:3], INK, *COLOURS[3:]], strict=False))
    panels = [  # title, figure, axis, lines, upper end of the axis, place of the legend
        ("accuracy", "accuracy", "exact accuracy", arms, 1.0, "center right"),
        ("completions with a response", "parsed", "share", thinking, 1.05, "lower right"),
        ("length of thoughts", "thought", "characters", thinking, 16, "lower right"),
        ("length of responses", "response", "characters", arms, 20, "upper right"),
        ("length of responses, judge that likes it", "response", "characters", rhos, 32, "upper left"),
        ("accuracy, judge that likes length", "accuracy", "exact accuracy", rhos, 1.0, "lower right"),
    ]
    drawing = Figure(figsize=(10.5, 6.2), dpi=150, layout="constrained")
    FigureCanvasAgg(drawing)
    for number, (title, name, unit, lines, top, place) in enumerate(panels):
        axes = drawing.add_subplot(2, 3, number + 1)
        for label, runs in lines.items():
            rounds, dashes = range(len(runs[0][name])), "--" if label in BROKEN else "-"
            middle, half = np.array([over_seeds(runs, name, k) for k in rounds]).T
            axes.plot(rounds, middle, dashes, marker="o", markersize=3, color=styles[label], label=label)
            axes.fill_between(rounds, middle - half, middle + half, color=styles[label], alpha=0.15, linewidth=0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("round", fontsize=9)
        axes.set_ylabel(unit, fontsize=9)
        axes.set_xticks(rounds)
        axes.tick_params(labelsize=8)
        axes.set_ylim(0, top)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc=place)
    drawing.savefig(path)


if __name__ == "__main__":
    main()
