"""Functions that the speed benchmarks share: implementations in turn, medians, peak memory, and tables."""

from __future__ import annotations

import csv
import datetime
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def seconds(contestants: Mapping[str, Callable[[], Any]], device: str, repeats: int = 5) -> dict[str, list[float]]:
    """Wall seconds of each implementation, `repeats` times, in turn (A B C A B C ...) after one warm-up round.

    An implementation that returns a float has measured its own time.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, run in contestants.items():
            synchronize(device)
            began = time.perf_counter()
            own = run()
            synchronize(device)
            if turn:
                times[name].append(own if isinstance(own, float) else time.perf_counter() - began)
    return times


def ratio(times: Mapping[str, Sequence[float]], slow: str, fast: str) -> float:
    """Speed-up of `fast` over `slow`: the median of the ratios of all turns."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Peak tensor bytes of `run`, after a warm-up, beyond those allocated before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    events = profile.profiler.kineto_results.events()  # the allocator's record of every allocation and release
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def machine(device: str) -> str:
    """One line that describes machine and versions."""
    import os
    import platform

    from prefopt.training.versions import versions

    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    where = f"{cores} cores of {_processor() or platform.machine()}, {threads} thread(s)"
    if device == "cuda":
        where = torch.cuda.get_device_name()
    return f"{where}; " + ", ".join(f"{name} {version}" for name, version in versions(extra=("trl",)).items())


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def write(
    name: str, device: str, rows: Sequence[Mapping[str, Any]], notes: Sequence[str], folder: Path = RESULTS
) -> Path:
    """`<date>-<device>-<name>.csv` and `.md` of the rows; returns the path of the latter without its suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{datetime.date.today().isoformat()}-{device}-{name}"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with stem.with_suffix(".csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, columns)
        writer.writeheader()
        writer.writerows(rows)
    text = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    text += ["| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    stem.with_suffix(".md").write_text("\n".join([machine(device), "", *text, "", *notes]) + "\n")
    print("\n".join(text), *notes, f"written: {stem}.csv, .md", sep="\n", flush=True)
    return stem


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
