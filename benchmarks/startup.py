"""How long a killed run takes from its command to its next step, and what of it are imports.

The testbed's run (base policy made before) is killed after a checkpoint and started again, several times; each start is
its own process, and its first step is the first line that it adds to metrics.jsonl.
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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import write

ROOT = Path(__file__).resolve().parent.parent
EVERY = 10  # steps between checkpoints


def start(output: Path, cache: Path) -> subprocess.Popen[bytes]:
    """The command of the run, in a process of its own."""
    command = [sys.executable, "scripts/train.py", "--method", "tdpo", "--output", str(output)]
    environment = os.environ | {"PREFOPT_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, "--train.save_every", str(EVERY)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )


def until(process: subprocess.Popen[bytes], reached: Any) -> float:
    """Seconds from now until `reached()`; the process is killed then."""
    began = time.perf_counter()
    while not reached():
        if process.poll() is not None:
            raise SystemExit(f"the run ended with status {process.returncode} before it was to be killed")
        time.sleep(0.005)
    seconds = time.perf_counter() - began
    process.kill()
    process.wait()
    return seconds


def has_step(metrics: Path, step: int) -> bool:
    """Whether a whole line of this training step is written."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return any((one := json.loads(line))["split"] == "train" and one["step"] == step for line in lines)


def restart(killed: Path, output: Path, cache: Path) -> float:
    """Seconds from the command to the first step after the last checkpoint of a killed run."""
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(killed, output)
    metrics = output / "metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.open() if json.loads(line)["step"] <= EVERY))
    return until(start(output, cache), lambda: has_step(metrics, EVERY + 1))


def command_seconds(*words: str) -> float:
    """Wall seconds of a Python process."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


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
    write("startup", "cpu", rows, [f"Seconds of wall clock; {repeats} processes of each, one after the other."])


def new(output: Path, cache: Path, metrics: Path) -> float:
    """Seconds from the command to the first step of a run that has nothing yet but the testbed's base policy."""
    shutil.rmtree(output, ignore_errors=True)
    return until(start(output, cache), lambda: has_step(metrics, 1))


def row(what: str, seconds: list[float]) -> dict[str, Any]:
    """One line of the table."""
    return {"what": what, "median s": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}


if __name__ == "__main__":
    main()
