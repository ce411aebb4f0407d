"""Time of a killed run from its command to its next step, and the part of it that is imports.

A run on the testbed (with a cached base policy) is killed after a checkpoint and started again, several times; each
start is a new process, and its first step is the first line that it adds to metrics.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import write

ROOT = Path(__file__).resolve().parent.parent
EVERY = 10  # steps between checkpoints


def start(output: Path, cache: Path) -> subprocess.Popen[bytes]:
    """The command of the run, in its own process."""
    command = [sys.executable, "scripts/train.py", "--method", "tdpo", "--output", str(output)]
    environment = os.environ | {"PREFOPT_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, "--train.save_every", str(EVERY)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )


class Seconds(NamedTuple):
    """Wall seconds and CPU seconds of a process; the latter depend less on other work."""

    wall: float
    cpu: float


def until(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> Seconds:
    """Seconds from now until `reached()`; the process is then killed."""
    began = time.perf_counter()
    while not reached():
        if process.poll() is not None:
            raise SystemExit(f"the run ended with status {process.returncode} before it was to be killed")
        time.sleep(0.005)
    seconds = time.perf_counter() - began
    process.kill()
    return Seconds(seconds, cpu_of(process))


def cpu_of(process: subprocess.Popen[bytes]) -> float:
    """CPU seconds of a process, after it has ended."""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime


def has_step(metrics: Path, step: int) -> bool:
    """Whether a complete line of this training step has been written."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return any((one := json.loads(line))["split"] == "train" and one["step"] == step for line in lines)


def restart(killed: Path, output: Path, cache: Path) -> Seconds:
    """Seconds from the command to the first step after the last checkpoint of a killed run."""
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(killed, output)
    metrics = output / "metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.open() if json.loads(line)["step"] <= EVERY))
    return until(start(output, cache), lambda: has_step(metrics, EVERY + 1))


def command_seconds(*words: str) -> Seconds:
    """Seconds of a Python process."""
    began = time.perf_counter()
    cpu = cpu_of(subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL))
    return Seconds(time.perf_counter() - began, cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    rows = []
    for what, words in {
        "python -c pass": ("-c", "pass"),
        "import prefopt": ("-c", "import prefopt"),
        "train.py --help": ("scripts/train.py", "--help"),
        "import torch": ("-c", "import torch"),
    }.items():
        rows.append(row(what, [command_seconds(*words) for _ in range(repeats)]))
    with tempfile.TemporaryDirectory() as folder:
        killed, output, cache = (Path(folder) / name for name in ("killed", "run", "cache"))
        checkpoint = killed / "checkpoints" / f"step_{EVERY:08d}"
        metrics = killed / "metrics.jsonl"
        first = until(start(killed, cache), lambda: has_step(metrics, 1))
        shutil.rmtree(killed)
        rows.append(row("first start of all, to step 1 (makes the testbed's base policy)", [first]))
        rows.append(row("start of a new run, to step 1", [new(killed, cache, metrics) for _ in range(repeats)]))
        shutil.rmtree(killed)
        until(start(killed, cache), checkpoint.exists)
        rows.append(
            row("restart of a killed run, to its next step", [restart(killed, output, cache) for _ in range(repeats)])
        )
    write(
        "startup",
        "cpu",
        rows,
        [
            f"Seconds of wall clock; {repeats} processes of each, one after the other.",
            f"Load average of the machine during it: {os.getloadavg()[1]:.1f}.",
        ],
    )


def new(output: Path, cache: Path, metrics: Path) -> Seconds:
    """Seconds from the command to the first step of a new run with a cached base policy."""
    shutil.rmtree(output, ignore_errors=True)
    return until(start(output, cache), lambda: has_step(metrics, 1))


def row(what: str, seconds: list[Seconds]) -> dict[str, Any]:
    """One line of the table."""
    wall, cpu = zip(*seconds, strict=True)
    median = statistics.median
    return {"what": what, "median s": median(wall), "fastest": min(wall), "slowest": max(wall), "CPU s": median(cpu)}


if __name__ == "__main__":
    main()
