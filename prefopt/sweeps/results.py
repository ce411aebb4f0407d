"""Tables of a sweep: the status of its runs, and the results of those that are finished."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt import settings as config
from prefopt.figures import readable
from prefopt.redaction import hidden, markdown_cell, printable
from prefopt.storage import Lock, write_whole
from prefopt.sweeps import progress
from prefopt.sweeps.manifest import RunStates, SweepRun

TABLES = ("results.csv", "results.md")
LOCK = ".results.lock"  # is beside the tables that a sweep wrote
# The metrics that results.md shows, where a run has them; results.csv has all.
_SHOWN = (
    *("exact/reward", "exact/kl_policy_ref", "exact/kl_star_ratio", "exact/win_rate"),
    *("win_probability/vs_start", "score", "loss", "rewards/accuracies", "rewards/margins", "kl/chosen", "kl/rejected"),
    *("steps", "pairs", "tokens", "seconds"),
)
_COST = ("steps", "pairs", "tokens", "seconds")


def varying(runs: Sequence[SweepRun]) -> list[str]:
    """The settings in which runs differ, in the order of the sweep file; without paths of start models."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings if key != "model.path"))
    return [key for key in keys if len({str(run.settings.get(key)) for run in runs}) > 1]


def status_table(runs: Sequence[SweepRun], states: RunStates, queue: Mapping[str, str]) -> str:
    """State and progress of each run. Args: queue: Slurm's state of the runs in its queue."""
    keys = varying(runs)
    state_of = {run.id: states.state(run, queue) for run in runs}
    counts: Counter[str] = Counter(state_of.values())
    rows = [["run", "state", "step", "done", "left", *keys, ""]]
    left: list[float] = []
    for run in runs:
        state, record = state_of[run.id], states.get(run)
        progressed = progress.progress_of(config.parse(run.argv), Path(run.output)) if state != "done" else None
        note = printable(record.error or "") if state == "failed" else ""
        if state == "pending" and run.after:
            failed = [other for other in run.after if state_of.get(other) == "failed"]
            note = f"waits for {failed[0]}, which failed" if failed else ""
        if state == "pending" and record.attempts:
            note = note or "interrupted; will be resumed"
        step, fraction, time = ("", "", "")
        if progressed is not None:
            step = str(progressed.step or "")
            fraction = f"{progressed.fraction:.0%}" if progressed.fraction is not None else ""
            if state == "running" and progressed.left is not None:
                time = _clock(progressed.left)
                left.append(progressed.left)
        rows.append([run.id, state, step, fraction, time, *(_text(run.settings.get(key)) for key in keys), note])
    names = ("done", "running", "queued", "pending", "failed")
    head = ", ".join(f"{counts[name]} {name}" for name in names if counts[name])
    took = [progress.budget_used(Path(run.output)).get("seconds", 0.0) for run in runs if state_of[run.id] == "done"]
    waiting = counts["pending"] + counts["queued"]
    if left and (took or not waiting):
        rest = sum(left) + waiting * (statistics.fmean(took) if took else 0)
        head += f"; about {_clock(rest / len(left))} left"
    return f"{len(runs)} runs: {head}\n\n{_aligned(rows)}"


def write_results(folder: Path, runs: Sequence[SweepRun]) -> tuple[Path, int]:
    """Write results.csv and results.md of the finished runs, without those that other runs start from.

    Array tasks that end at the same time write one after the other, so that the last one includes all finished runs.

    Returns: the path of results.md, and how many runs it shows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / LOCK)
    lock.wait()
    try:
        return _write_results(folder, runs)
    finally:
        lock.release()


def _write_results(folder: Path, runs: Sequence[SweepRun]) -> tuple[Path, int]:
    starts = {other for run in runs for other in run.after}
    ends = [run for run in runs if run.id not in starts]
    keys = varying(ends)
    rows: list[dict[str, Any]] = []
    for run in ends:
        if run.done:
            output = Path(run.output)
            settings = {key: run.settings.get(key) for key in keys}
            figures = {key: value for key, value in progress.last_metrics(output).items() if key not in _COST}
            rows.append({"run": run.id, **hidden(settings), **figures, **progress.budget_used(output)})
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["run"]
    names = [name for name in names if name not in _COST] + [name for name in _COST if name in names]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in rows)
    write_whole(folder / "results.csv", [text.getvalue()])
    shown = [name for name in _SHOWN if name in names]
    page = (
        f"# {printable(folder.name)}\n\n{len(rows)} of {len(ends)} runs are finished. results.csv has all metrics.\n\n"
    )
    page += _markdown([["run", *keys, *shown], *([row["run"], *_texts(row, keys, shown)] for row in rows)])
    if "seed" in keys and rows:
        page += "\n## Over seeds\n\nMean and standard deviation.\n\n" + _over_seeds(rows, keys, shown)
    write_whole(folder / "results.md", [page])
    return folder / "results.md", len(rows)


def _over_seeds(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], shown: Sequence[str]) -> str:
    others = [key for key in keys if key != "seed"]
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(_text(row[key]) for key in others), []).append(row)
    table = [[*others, "seeds", *shown]]
    for values, group in groups.items():
        texts = []
        for name in shown:
            found = [row[name] for row in group if isinstance(row.get(name), (int, float))]
            known = len(found) > 1 and all(map(math.isfinite, found))
            spread = f" ± {readable(_spread(found), 2)}" if known else ""
            texts.append(f"{_text(_mean(found))}{spread}" if found else "")
        table.append([*values, str(len(group)), *texts])
    return _markdown(table)


def _mean(values: Sequence[float]) -> float:
    try:
        return statistics.fmean(values)
    except OverflowError:  # a sum that no float holds
        return sum(value / len(values) for value in values)


def _spread(values: Sequence[float]) -> float:
    try:
        return statistics.stdev(values)
    except OverflowError:
        return math.inf


def _texts(row: Mapping[str, Any], keys: Sequence[str], shown: Sequence[str]) -> list[str]:
    return [_text(row.get(name)) for name in (*keys, *shown)]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return readable(value) if isinstance(value, float) else printable(value)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(markdown_cell(cell) for cell in row) for row in rows]
    rule = " | ".join("---" for _ in rows[0])
    return "".join(f"| {line} |\n" for line in (lines[0], rule, *lines[1:]))


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    shown = [i for i in range(len(widths)) if widths[i] and (i == 0 or any(row[i] for row in rows[1:]))]
    return "\n".join("  ".join(row[i].ljust(widths[i]) for i in shown).rstrip() for row in rows)
