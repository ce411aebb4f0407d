"""Rounds of SPPO against exact self-play with cyclic preferences, and iterative DPO with the same budget.

    python benchmarks/cyclic.py --output runs/cyclic

Each of 5 seeds has its own world, base policy and run: 16 rounds of 1,024 prompts with 5 candidates. SPPO has eta 5 and
the testbed defaults. DPO has the beta and the learning rate of the lists whose average of rounds has the lowest exact
exploitability, on a seed that is not used otherwise. Writes result.json, result.md and self_play.png; the same command
resumes a killed study.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from study import machine, train_all

from prefopt.testbed.self_play import SelfPlay, exact_path, self_play

ETA = 5.0
BETAS = (0.2, 1.0, 4.0, 16.0)  # of DPO
RATES = (1e-3, 3e-3)  # of DPO
SELECTION_SEED = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=Path("runs/cyclic"), type=Path)
    parser.add_argument("--seeds", default=5, type=int)
    parser.add_argument("--rounds", default=16, type=int)
    parser.add_argument("--jobs", default=max(1, len(os.sched_getaffinity(0))), type=int, help="runs at the same time")
    args = parser.parse_args()

    def flags(method: str, beta: float, seed: int, rate: float | None = None) -> list[str]:
        world = ["--testbed.world", "cyclic", "--testbed.seed", str(seed), "--seed", str(seed)]
        rounds = ["--rounds.count", str(args.rounds), "--rounds.eval_prompts", "0"]
        rounds += [] if rate is None else ["--optim.lr", str(rate)]
        return ["--method", method, "--method.beta", str(beta), *world, *rounds]

    choosing = {
        f"choose-DPO-beta{beta:g}-lr{rate:g}": flags("dpo", beta, SELECTION_SEED, rate)
        for beta in BETAS
        for rate in RATES
    }
    sppo = {f"SPPO-seed{seed}": flags("sppo", 1 / ETA, seed) for seed in range(args.seeds)}
    train_all(choosing | sppo, args.output, args.jobs)
    tried = {
        (beta, rate): figures(args.output / f"choose-DPO-beta{beta:g}-lr{rate:g}", SELECTION_SEED, args.rounds)[0]
        for beta in BETAS
        for rate in RATES
    }
    beta, rate = min(tried, key=lambda which: tried[which].average[-1])
    dpo = {f"DPO-seed{seed}": flags("dpo", beta, seed, rate) for seed in range(args.seeds)}
    train_all(dpo, args.output, args.jobs)

    runs: dict[str, list[SelfPlay]] = {"SPPO": [], f"DPO, beta {beta:g}, rate {rate:g}": []}
    exact: list[SelfPlay] = []
    for seed in range(args.seeds):
        for label, name in zip(runs, ("SPPO", "DPO"), strict=True):
            mine, its_exact = figures(args.output / f"{name}-seed{seed}", seed, args.rounds)
            runs[label].append(mine)
        exact.append(its_exact)
    result = {
        "machine": machine(),
        "eta": ETA,
        "dpo_average_by_beta_and_rate": [
            {"beta": b, "rate": r, "average": run.average[-1], "last": run.last[-1]} for (b, r), run in tried.items()
        ],
        "runs": {label: [asdict(run) for run in some] for label, some in runs.items()},
        "exact": [asdict(run) for run in exact],
    }
    (args.output / "result.json").write_text(json.dumps(result, indent=1))
    table = render(result)
    (args.output / "result.md").write_text(table)
    from prefopt.testbed.world_report import Curves, self_play_plot

    curves = [Curves(label, some) for label, some in runs.items()]
    self_play_plot(args.output / "self_play.png", curves, exact, follows="SPPO")
    print(table)


def figures(output: Path, seed: int, rounds: int) -> tuple[SelfPlay, SelfPlay]:
    """Exact metrics of a run, from the models that its rounds exported, and of exact self-play from the same start."""
    from prefopt.testbed import build_world
    from prefopt.testbed.cache import cache_root

    world = build_world("cyclic", seed=seed, cache_dir=cache_root())
    models = [output / f"round_{number:02d}" / "train" / "model" for number in range(1, rounds + 1)]
    policies = [world.log_ref, *map(world.log_probs_of, models)]
    exact = exact_path(world.log_ref, world.preference, ETA, rounds)
    return self_play(policies, world.preference, ETA), self_play(exact, world.preference, ETA)


def render(result: dict[str, Any]) -> str:
    """The study's table in Markdown: means over seeds with 95% intervals."""
    from prefopt.testbed.world_report import mean_and_interval

    def cell(values: Sequence[float], spec: str = ".3f") -> str:
        mean, half = mean_and_interval(np.array(values))
        return f"{mean:{spec}} ± {half:{spec}}"

    exact, rounds = result["exact"], len(result["exact"][0]["step"])
    chosen = ", ".join(
        f"{one['average']:.3f} (beta {one['beta']:g}, rate {one['rate']:g})"
        for one in result["dpo_average_by_beta_and_rate"]
    )
    out = [
        f"{rounds} rounds, {len(exact)} seeds, eta {result['eta']:g}. Means over seeds, 95% intervals (Student's t). "
        f"The average of DPO's rounds on the seed for selection: {chosen}. {result['machine']}.",
        "",
        "| | start | average of rounds | relative to start | last round | TV to the exact step | largest TV |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, runs in {**result["runs"], "*exact self-play*": exact}.items():
        start, average, last = (
            [run[key][at] for run in runs] for key, at in (("last", 0), ("average", -1), ("last", -1))
        )
        share = [a / s for a, s in zip(average, start, strict=True)]
        steps = "- | -"
        if label == "SPPO":
            steps = f"{cell([np.mean(run['step']) for run in runs])} | {max(max(run['step']) for run in runs):.3f}"
        out.append(f"| {label} | {cell(start)} | {cell(average)} | {cell(share, '.1%')} | {cell(last)} | {steps} |")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    main()
