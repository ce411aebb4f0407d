"""What a run in a world has come to: one table, its path under the optimal reward-KL curve, or that of its rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prefopt.errors import TrainError
from prefopt.storage import write_by
from prefopt.testbed.bandit import Bandit
from prefopt.testbed.self_play import SelfPlay
from prefopt.testbed.words import WordWorld

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, SHADE = "#222222", "#8a8a8a", "#f1f1ee"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito: safe for the colour-blind


@dataclass(frozen=True)
class PlotLine:
    """A line of the plot.

    Args: label: runs of one label share colour and legend entry. beta: whose optimum to mark. trajectory: what
        `Bandit.evaluate` returned at each evaluation, in order; a single one is drawn as an end point without a path.
    """

    label: str
    beta: float
    trajectory: Sequence[Mapping[str, float]]


def summary_table(world: WordWorld, first: Mapping[str, float] | None, last: Mapping[str, float], beta: float) -> str:
    """Reference, start (where it is not the reference), end and optimum, one under the other.

    Args: first, last: `world.evaluate` before training, None without an evaluation, and after it. beta: of the method.
    Returns: lines of text without a final newline. KL and entropy in nats.
    """
    rows = {"reference": world.measures(world.log_ref, beta)}
    if first is not None and first["exact/kl_policy_ref"] > 1e-6:
        rows["start"] = dict(first)
    rows |= {"policy at end": dict(last), world.goal: world.measures(world.optimum(beta), beta)}

    def cell(value: float, spec: str) -> str:
        text = format(value, spec)
        return text if text.strip("-0.%") else text.lstrip("-")  # rounding makes no -0.000

    columns = world.columns
    body = [[name, *(cell(row[f"exact/{key}"], spec) for key, spec in columns.values())] for name, row in rows.items()]
    table = [[f"exact, beta {beta:g}", *columns], *body]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:]])


def frontier_plot(path: Path | str, world: Bandit, runs: Sequence[PlotLine]) -> None:
    """Draw the optimal reward-KL curve, each run's path and end point, and the optimum of each beta, to a PNG.

    Args: path: the file, replaced whole. world: where the curve comes from. runs: one or more.
    Raises: TrainError when the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(dict.fromkeys(run.label for run in runs))}
    betas = sorted({run.beta for run in runs}, reverse=True)
    best_kl, best_reward = world.frontier(betas)
    shown = [float(kl) for kl in best_kl] + [point["exact/kl_policy_ref"] for run in runs for point in run.trajectory]
    right = 1.18 * max(shown)
    kls, rewards = world.frontier()
    inside = kls <= right
    inside[np.argmax(~inside) if not inside.all() else -1] = True  # one point beyond the edge, so the curve reaches it
    kls, rewards = kls[inside], rewards[inside]
    low = min([0.0, *(point["exact/reward"] for run in runs for point in run.trajectory), float(rewards.min())])
    high = float(np.interp(right, kls, rewards))
    low, high = low - 0.05 * (high - low), high + 0.10 * (high - low)

    figure = Figure(figsize=(7.2, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.fill_between(kls, rewards, high, color=SHADE, linewidth=0, zorder=0)
    axes.plot(kls, rewards, color=INK, linewidth=1.6, label="optimal curve (exact)", zorder=2)
    named: set[str] = set()
    crowded = len(runs) > 1
    for run in runs:
        x = [point["exact/kl_policy_ref"] for point in run.trajectory]
        y = [point["exact/reward"] for point in run.trajectory]
        colour, label = colours[run.label], None if run.label in named else run.label
        named.add(run.label)
        axes.plot(x, y, color=colour, linewidth=1.2, alpha=0.45 if crowded else 0.9, zorder=3)
        if not crowded:
            axes.plot(x[:-1], y[:-1], "o", color=colour, markersize=3.2, zorder=3)
        size = 6.0 if crowded else 8.5
        axes.plot(
            x[-1:],
            y[-1:],
            "o",
            color=colour,
            markersize=size,
            markeredgecolor="white",
            zorder=5,
            label=label,
            ls="none",
        )
    mark = "optimum of each $\\beta$" if len(betas) > 1 else f"optimum, $\\beta$ = {betas[0]:g}"
    axes.plot(
        best_kl, best_reward, "*", markersize=13, color="white", markeredgecolor=INK, zorder=4, label=mark, ls="none"
    )
    if len(betas) > 1:
        for beta, x_, y_ in zip(betas, best_kl, best_reward, strict=True):
            axes.annotate(f"$\\beta$ = {beta:g}", (x_, y_), (-6, 7), textcoords="offset points", ha="right", color=INK)
    reference = world.measures(world.log_ref, betas[0])["exact/reward"]
    axes.plot([0], [reference], "s", color=GREY, markersize=6, zorder=4, label="reference", ls="none", clip_on=False)
    where = axes.get_xaxis_transform()
    axes.text(
        0.02 * right, 0.97, "no policy can be here", color=GREY, size=9, transform=where, va="top", style="italic"
    )
    axes.set(
        xlim=(-0.09 * right if len(betas) > 1 else 0, right),  # room for labels left of the curve
        ylim=(low, high),
        xlabel="KL(policy || reference)  [nats, mean over prompts]",
        ylabel="expected reward  [mean over prompts]",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", frameon=False)
    _save(figure, path)


@dataclass(frozen=True)
class Curves:
    """Runs that differ in their seed, drawn as their mean and its 95% interval."""

    label: str
    runs: Sequence[SelfPlay]


def self_play_plot(path: Path | str, methods: Sequence[Curves], exact: Sequence[SelfPlay], follows: str) -> None:
    """Draw what rounds have come to: each step, the average, the last policy, and the way that the errors add up.

    Args: path: the PNG, replaced whole. methods: one or more. exact: exact self-play from the same starts.
        follows: label of the method whose rounds are meant to be the exact steps; only its distances are drawn.
    Raises: TrainError when the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 6.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    (step, average), (path_, last) = figure.subplots(2, 2)
    colours = dict(zip((curves.label for curves in methods), COLOURS, strict=False))

    def draw(axes: Axes, values: Sequence[Sequence[float]], first: int, colour: str, label: str, style: str) -> None:
        mean, half = mean_and_interval(np.array(values))
        x = np.arange(first, first + len(mean))
        axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, mean, style, color=colour, linewidth=1.6, markersize=3.2, label=label)

    for curves in methods:
        colour = colours[curves.label]
        draw(average, [run.average for run in curves.runs], 0, colour, curves.label, "o-")
        draw(last, [run.last for run in curves.runs], 0, colour, curves.label, "o-")
        if curves.label == follows:
            draw(step, [run.step for run in curves.runs], 1, colour, curves.label, "o-")
            draw(path_, [run.path for run in curves.runs], 1, colour, curves.label, "o-")
    draw(average, [run.average for run in exact], 0, INK, "exact self-play", "--")
    draw(last, [run.last for run in exact], 0, INK, "exact self-play", "--")
    step.axhline(0.1, color=GREY, linewidth=1, linestyle=":")
    start = float(np.mean([run.last[0] for run in exact]))
    average.axhline(start / 2, color=GREY, linewidth=1, linestyle=":")
    step.set(title="one round against the exact step", ylabel="total variation")
    path_.set(title="all rounds so far against the exact path", ylabel="total variation")
    average.set(title="the average of the rounds", ylabel="exploitability")
    last.set(title="the last round", ylabel="exploitability")
    for axes in (step, average, path_, last):
        axes.set(xlabel="round", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_size(10)
    average.legend(frameon=False)
    _save(figure, path)


def mean_and_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over runs, and half the width of its 95% interval by Student's t; no width where there is one run.

    Args: values: `(runs, ...)`. Returns: each `(...)`.
    """
    from scipy.special import stdtrit

    runs = len(values)
    if runs == 1:
        return values[0], np.zeros_like(values[0])
    return values.mean(0), stdtrit(runs - 1, 0.975) * values.std(0, ddof=1) / math.sqrt(runs)


def _save(figure: Figure, path: Path | str) -> None:
    try:
        write_by(Path(path), lambda scratch: figure.savefig(scratch, format="png"))
    except OSError as error:
        raise TrainError(f"{path}: cannot write the plot: {error.strerror}") from None
