"""DPO, TDPO1 and TDPO2 against the exact optimum: 3 seeds, 4 betas, learning rate chosen per method on one budget.

    python benchmarks/bandit.py --output runs/bandit

Every run trains on the same number of unique pairs. The learning rate of a method is the one of the list with the
lowest held-out loss of that method at beta 1, on a seed that is not used otherwise. Writes result.json, result.md and
frontier.png.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from study import lines, machine, train_all

METHODS = {
    "DPO": ["--method", "dpo"],
    "TDPO1": ["--method", "tdpo", "--method.variant", "tdpo1"],
    "TDPO2": ["--method", "tdpo", "--method.variant", "tdpo2"],
}
BETAS = (0.5, 1.0, 2.0, 4.0)
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
SELECTION_SEED = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=Path("runs/bandit"), type=Path)
    parser.add_argument("--seeds", default=3, type=int)
    parser.add_argument("--steps", default=400, type=int, help="optimizer steps of 512 pairs")
    parser.add_argument("--jobs", default=max(1, len(os.sched_getaffinity(0))), type=int, help="runs at the same time")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rate", type=float, help="learning rate of all runs, instead of choosing one per method")
    args = parser.parse_args()
    methods = {name: METHODS[name] for name in args.methods}
    budget = ["--train.max_steps", str(args.steps), "--eval.every", str(max(1, args.steps // 10))]
    budget += ["--testbed.eval_pairs", "4096"]

    choosing = {
        f"choose-{name}-lr{rate:g}": [*flags, *budget, "--optim.lr", str(rate), "--seed", str(SELECTION_SEED)]
        for name, flags in methods.items()
        for rate in (RATES if args.rate is None else ())
    }
    train_all(choosing, args.output, args.jobs)
    losses = {
        name: {rate: lines(args.output / f"choose-{name}-lr{rate:g}")[-1]["loss"] for rate in RATES}
        for name in (methods if args.rate is None else ())
    }
    chosen = {name: args.rate or min(losses[name], key=losses[name].__getitem__) for name in methods}
    runs = {
        f"{name}-beta{beta:g}-seed{seed}": [
            *(*flags, *budget, "--method.beta", str(beta)),
            *("--optim.lr", str(chosen[name]), "--seed", str(seed)),
        ]
        for seed in range(args.seeds)
        for beta in BETAS
        for name, flags in methods.items()
    }
    train_all(runs, args.output, args.jobs)

    ends = {
        name: {
            beta: [lines(args.output / f"{name}-beta{beta:g}-seed{s}")[-1] for s in range(args.seeds)] for beta in BETAS
        }
        for name in methods
    }
    result = {
        "machine": machine(),
        "pairs": args.steps * 512,
        "held_out_loss_by_rate": losses,
        "learning_rate": chosen,
        "ends": ends,
    }
    (args.output / "result.json").write_text(json.dumps(result, indent=1))
    table = render(result)
    (args.output / "result.md").write_text(table)
    plot(args.output / "frontier.png", ends)
    print(table)


def render(result: dict[str, Any]) -> str:
    """The study's table in Markdown: means and standard deviations over seeds."""
    from prefopt.testbed import build_world
    from prefopt.testbed.cache import cache_root

    world = build_world("bandit", cache_dir=cache_root())
    out = [
        f"{result['pairs']:,} unique pairs per run. Selected learning rates:  "
        + ", ".join(f"{name} {rate:g}" for name, rate in result["learning_rate"].items())
        + f". {result['machine']}.",
        "",
        "| beta | method | reward | KL(policy, ref) | frontier gap | KL relative to start | entropy | win rate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    keys = ("reward", "kl_policy_ref", "frontier_gap", "kl_star_ratio", "entropy", "win_rate")
    for beta in BETAS:
        best = world.measures(world.optimum(beta), beta)
        cells = " | ".join(f"{round(best[f'exact/{key}'], 3) + 0.0:.3f}" for key in keys)  # no -0.000
        out.append(f"| {beta:g} | *optimum* | {cells} |")
        for name, by_beta in result["ends"].items():
            values = {key: [end[f"exact/{key}"] for end in by_beta[beta]] for key in keys}
            cells = " | ".join(f"{np.mean(v):.3f} ± {np.std(v, ddof=1):.3f}" for v in values.values())
            out.append(f"| {beta:g} | {name} | {cells} |")
    return "\n".join(out) + "\n"


def plot(path: Path, ends: dict[str, dict[float, list[dict[str, Any]]]]) -> None:
    """All end points under the optimal curve."""
    from prefopt.testbed import build_world
    from prefopt.testbed.cache import cache_root
    from prefopt.testbed.world_report import PlotLine, frontier_plot

    world = build_world("bandit", cache_dir=cache_root())
    runs = [
        PlotLine(name, beta, [end]) for name, by_beta in ends.items() for beta, all_ in by_beta.items() for end in all_
    ]
    frontier_plot(path, world, runs)


if __name__ == "__main__":
    main()
