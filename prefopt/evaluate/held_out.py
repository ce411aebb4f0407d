"""What held-out pairs can decide, and what a run's figures on them have come to: the lines at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.evaluate.intervals import Interval, deciding_count, mean_interval, wilson
from prefopt.figures import NOTHING, aligned, readable
from prefopt.settings import RunConfig
from prefopt.training.best_checkpoint import Selection
from prefopt.training.metrics import read_lines

FEW = 32  # held-out pairs below which a warning is printed
EFFECT = 0.6  # the accuracy that a held-out set of the size that the warning names distinguishes from one half
# Of all metrics, those at the end of a run, where there are any, with the terms of a loss that has several.
_SHOWN = ("loss", "loss/", "rewards/accuracies", "rewards/margins", "logps/chosen", "kl/chosen", "samples/kl")


def too_few(config: RunConfig, pairs: int) -> str | None:
    """A warning for a held-out set that decides next to nothing, with the size of one that would; None for others."""
    if not 0 < pairs < FEW:
        return None
    remedy = "raise --eval.max_pairs" if config.eval.max_pairs == pairs else "name more with --data.eval"
    if config.on_testbed:
        remedy = "raise --testbed.eval_pairs"
    enough, one = deciding_count(EFFECT), "1 held-out pair is" if pairs == 1 else f"{pairs} held-out pairs are"
    if config.method.needs.rows != "pairs":
        return (
            f"warning: {one} few: the standard error of their mean loss is {1 / math.sqrt(pairs):.0%} of the spread "
            f"between pairs, and {1 / math.sqrt(enough):.0%} with {enough} ({remedy})"
        )
    found = wilson(EFFECT, pairs)
    return (
        f"warning: {one} few: the 95% interval of an accuracy of {EFFECT:.0%} among them is {found.low:.0%} to "
        f"{found.high:.0%}; it excludes 50% from {enough} pairs on ({remedy})"
    )


def final_figures(config: RunConfig, output: Path) -> list[str]:
    """The lines that a finished run ends with: its figures in training and on held-out pairs, with 95% intervals.

    Args: output: of the run; its metrics and per-pair figures are read.
    Returns: a title and a table, or nothing where nothing was logged.
    """
    path = output / "metrics.jsonl"
    lines = read_lines(path) if path.exists() else []
    steps = [line for line in lines if line["split"] == "train"]
    evaluations = [line for line in lines if line["split"] == "eval"]
    if not steps:
        return []
    chosen = None if config.eval.select is None else Selection.of(config.eval.select).best(lines)
    step = int(steps[-1]["step"]) if chosen is None else chosen
    end: Mapping[str, Any] = next((line for line in reversed(evaluations) if line["step"] == step), {})
    start: Mapping[str, Any] = next((line for line in evaluations if line["step"] == 0), {})
    seen = [line for line in steps if line["step"] <= step]
    recent = seen[-math.ceil(len(seen) / 10) :]
    rows_of_pairs = _rows_of_pairs(output, step)

    known = [
        name for name in {**recent[-1], **end} if not name.startswith("loss/") or len(_terms(end or recent[-1])) > 1
    ]
    names = [
        name for shown in _SHOWN for name in known if name == shown or (shown[-1] == "/" and name.startswith(shown))
    ]
    span = f"step {recent[0]['step']}" if len(recent) == 1 else f"steps {recent[0]['step']} to {recent[-1]['step']}"
    table = [["", *(["at the start"] if start else []), *(["held out"] if end else []), f"training, {span}"]]
    for name in names:
        at_start = NOTHING if name in config.tied_at_start or name not in start else readable(start[name])
        interval = _interval(name, end, rows_of_pairs)
        row = [at_start] if start else []
        row += [_with_interval(end.get(name), interval)] if end else []
        table.append([name, *row, _mean_of_steps(name, recent)])
    pairs = f", with 95% intervals over {end['pairs']:,} held-out pairs" if "pairs" in end else ""
    of = "" if chosen is None else f", the one that eval.select {config.eval.select} chose"
    return [f"figures of the model of step {step}{of}{pairs}:", *(f"  {line}" for line in aligned(table))]


def _terms(line: Mapping[str, Any]) -> list[str]:
    return [name for name in line if name.startswith("loss/")]


def _rows_of_pairs(output: Path, step: int) -> list[dict[str, Any]]:
    """The figures of each held-out pair, where those of this step were written."""
    rows = read_lines(output / "eval_pairs.jsonl")
    return rows if rows and rows[0].get("step") == step else []


def _interval(name: str, end: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Interval | None:
    """Of a figure of the evaluation `end`: a fraction's from its size alone, another's from the pairs' own figures."""
    if name not in end or "pairs" not in end:
        return None
    if "accurac" in name:
        return wilson(end[name], int(end["pairs"]))
    single = next((term for term in rows[0] if term.startswith("loss/")), name) if rows and name == "loss" else name
    if name == "loss" and rows and len([term for term in rows[0] if term.startswith("loss/")]) > 1:
        return None  # of terms with counts of their own; each has its interval
    found = [row for row in rows if single in row]
    if not found:
        return None
    return mean_interval([row[single] for row in found], [row.get("counts", {}).get(single, 1.0) for row in found])


def _with_interval(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return NOTHING
    if interval is None or not math.isfinite(interval.low):
        return readable(value)
    return f"{readable(value)} ({readable(interval.low, 3)} to {readable(interval.high, 3)})"


def _mean_of_steps(name: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """The mean over the pairs of some steps."""
    found = [(line[name], line["pairs"]) for line in lines if name in line]
    total = sum(pairs for _, pairs in found)
    return readable(sum(value * pairs for value, pairs in found) / total) if total else NOTHING
