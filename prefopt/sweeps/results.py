"""Tables of a sweep: how far its runs are, and what came of those that are finished."""

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
from prefopt.sweeps.manifest import Ledger, SweepRun

TABLES = ("results.csv", "results.md")
LOCK = ".results.lock"  # beside them wherever they were written here
# Of all figures, those that results.md shows where there are any; results.csv has every one.
_SHOWN = (
    *("exact/reward", "exact/kl_policy_ref", "exact/kl_star_ratio", "exact/win_rate"),
    *("win_rate/vs_start", "score", "loss", "rewards/accuracies", "rewards/margins", "kl/chosen", "kl/rejected"),
    *("steps", "pairs", "tokens", "seconds"),
)
_COST = ("steps", "pairs", "tokens", "seconds")


def varying(runs: Sequence[SweepRun]) -> list[str]:
    """The settings in which runs differ, in the order of the sweep file; where a run lies is none."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings if key != "model.path"))
    return [key for key in keys if len({str(run.settings.get(key)) for run in runs}) > 1]


def status_table(runs: Sequence[SweepRun], ledger: Ledger, queue: Mapping[str, str]) -> str:
    """How far each run is. Args: queue: Slurm's state of the runs that it has."""
    keys = varying(runs)
    states = {run.id: ledger.state(run, queue) for run in runs}
    counts: Counter[str] = Counter(states.values())
    rows = [["run", "state", "step", "done", "left", *keys, ""]]
    left: list[float] = []
    for run in runs:
        state, record = states[run.id], ledger.get(run)
        far = progress.of(config.parse(run.argv), Path(run.output)) if state != "done" else None
        note = printable(record.error or "") if state == "failed" else ""
        if state == "pending" and run.after:
            failed = [other for other in run.after if states.get(other) == "failed"]
            note = f"waits for {failed[0]}, which failed" if failed else ""
        if state == "pending" and record.attempts:
            note = note or "to be continued"
        step, share, time = ("", "", "")
        if far is not None:
            step = str(far.step or "")
            share = f"{far.share:.0%}" if far.share is not None else ""
            if state == "running" and far.left is not None:
                time = _clock(far.left)
                left.append(far.left)
        rows.append([run.id, state, step, share, time, *(_cell(run.settings.get(key)) for key in keys), note])
    names = ("done", "running", "queued", "pending", "failed")
    head = ", ".join(f"{counts[name]} {name}" for name in names if counts[name])
    took = [progress.spent(Path(run.output)).get("seconds", 0.0) for run in runs if states[run.id] == "done"]
    waiting = counts["pending"] + counts["queued"]
    if left and (took or not waiting):
        rest = sum(left) + waiting * (statistics.fmean(took) if took else 0)
        head += f"; about {_clock(rest / len(left))} left"
    return f"{len(runs)} runs: {head}\n\n{_aligned(rows)}"


def write_results(folder: Path, runs: Sequence[SweepRun]) -> tuple[Path, int]:
    """results.csv and results.md of the finished runs that no other run starts from.

    Array tasks that end together write one after the other, so that the last one has seen all that are done.

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
            figures = {key: value for key, value in progress.last_figures(output).items() if key not in _COST}
            rows.append({"run": run.id, **hidden(settings), **figures, **progress.spent(output)})
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["run"]
    names = [name for name in names if name not in _COST] + [name for name in _COST if name in names]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in rows)
    write_whole(folder / "results.csv", [text.getvalue()])
    shown = [name for name in _SHOWN if name in names]
    page = (
        f"# {printable(folder.name)}\n\n{len(rows)} of {len(ends)} runs are finished. results.csv has every figure.\n\n"
    )
    page += _markdown([["run", *keys, *shown], *([row["run"], *_cells(row, keys, shown)] for row in rows)])
    if "seed" in keys and rows:
        page += "\n## Over seeds\n\nMean and standard deviation.\n\n" + _over_seeds(rows, keys, shown)
    write_whole(folder / "results.md", [page])
    return folder / "results.md", len(rows)


def _over_seeds(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], shown: Sequence[str]) -> str:
    others = [key for key in keys if key != "seed"]
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(_cell(row[key]) for key in others), []).append(row)
    table = [[*others, "seeds", *shown]]
    for values, group in groups.items():
        cells = []
        for name in shown:
            found = [row[name] for row in group if isinstance(row.get(name), (int, float))]
            known = len(found) > 1 and all(map(math.isfinite, found))
            spread = f" ± {readable(_spread(found), 2)}" if known else ""
            cells.append(f"{_cell(_mean(found))}{spread}" if found else "")
        table.append([*values, str(len(group)), *cells])
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


def _cells(row: Mapping[str, Any], keys: Sequence[str], shown: Sequence[str]) -> list[str]:
    return [_cell(row.get(name)) for name in (*keys, *shown)]


def _cell(value: Any) -> str:
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
    kept = [i for i in range(len(widths)) if widths[i] and (i == 0 or any(row[i] for row in rows[1:]))]
    return "\n".join("  ".join(row[i].ljust(widths[i]) for i in kept).rstrip() for row in rows)
