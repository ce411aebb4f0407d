"""What a finished run prints last: its held-out figures, and on the testbed the distance to the exact optimum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefopt import settings
from prefopt.evaluate.held_out import final_figures
from prefopt.run.card import described_method
from prefopt.run.task import Task
from prefopt.settings import RunConfig
from prefopt.testbed.bandit import Bandit
from prefopt.testbed.world_report import PlotLine, frontier_plot, summary_table
from prefopt.training import runtime as rt
from prefopt.training.best_checkpoint import Selection
from prefopt.training.launcher import print_rank_0
from prefopt.training.metrics import read_lines
from prefopt.training.tracking import Trackers


def print_results(
    config: RunConfig, runtime: rt.Runtime, task: Task, output: Path, trackers: Trackers | None = None
) -> None:
    """Print the final figures of a run, and on the testbed their distance to the exact optimum."""
    lines = runtime.on_main(lambda: final_figures(config, output))
    if lines:
        print_rank_0("\n".join(lines))
        if trackers is not None:
            text = "\n".join(lines)
            last = max((line["step"] for line in _lines(output, "train")), default=0)
            trackers.page("figures/end", f"```\n{text}\n```", last)
    _print_testbed_results(config, runtime, task, output, trackers)


def _lines(output: Path, split: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl with this split."""
    path = output / "metrics.jsonl"
    return [line for line in read_lines(path) if line["split"] == split] if path.exists() else []


def _print_testbed_results(
    config: RunConfig, runtime: rt.Runtime, task: Task, output: Path, trackers: Trackers | None = None
) -> None:
    """Print the table of a run on the testbed, and plot the reward-KL frontier where the world has one."""
    lines = _lines(output, "eval") if task.world is not None and runtime.is_main else []
    if task.world is None or not lines:
        return

    chosen = None if config.eval.select is None else Selection.of(config.eval.select).best(lines)
    end = next((line for line in lines if line["step"] == chosen), lines[-1])  # the evaluation of the exported model

    if config.method.needs.output == "scores":
        won = [pair.columns["pair_win_prob"] for pair in task.eval_pairs]
        best = sum(1.0 if p > 0.5 else 0.5 * (p == 0.5) for p in won) / len(won)
        print_rank_0(
            f"held-out accuracy {end['rewards/accuracies']:.3f} at the end; "
            f"the true reward has {best:.3f} on the same pairs"
        )
        return
    beta = target_beta(config)
    start = lines[0] if lines[0]["step"] == 0 else None
    table = summary_table(task.world, start, end, beta)
    print_rank_0("\n" + table)
    if isinstance(task.world, Bandit):
        if config.method.other_optimum():
            print_rank_0(f"\n{config.method.other_optimum()}")
        frontier_plot(output / "frontier.png", task.world, [PlotLine(described_method(config), beta, lines)])
        print_rank_0(f"\nreward-KL frontier: {output / 'frontier.png'}")
    if trackers is not None:
        trackers.page("testbed/end", f"```\n{table}\n```", lines[-1]["step"])
        trackers.image("testbed/frontier", output / "frontier.png", lines[-1]["step"])


def target_beta(config: RunConfig) -> float:
    """The beta of the optimum that a testbed run is compared with: the method's own, or the world's default."""
    return float(getattr(config.method, "beta", settings.TESTBED_DEFAULTS["method"]["beta"]))
