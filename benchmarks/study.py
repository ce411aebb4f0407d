"""Functions of the studies: many runs of the train command in parallel, in processes forked after the imports."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def train_all(runs: Mapping[str, Sequence[str]], folder: Path, jobs: int) -> None:
    """Run `train` with these flags for each name, `jobs` at a time; outputs and logs are in `folder`.

    Finished runs are not repeated, so the same command resumes a killed study.
    """
    import torch

    import prefopt.cli
    import prefopt.training.trainer  # noqa: F401 - imported before the fork, so that runs start without delay

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [(name, list(flags), folder) for name, flags in runs.items() if not finished(folder / name)]
    print(f"{folder}: {len(waiting)} of {len(runs)} runs to do, {jobs} at a time", flush=True)
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        for name, status in pool.imap_unordered(_run, waiting):
            print(f"  {name}: {'finished' if status == 0 else f'ended with status {status}'}", flush=True)
            if status != 0:
                raise SystemExit(f"{name} did not finish; see {folder / name}.log")


def finished(output: Path) -> bool:
    return (output / "model" / "manifest.json").exists()


def _run(job: tuple[str, list[str], Path]) -> tuple[str, int]:
    name, flags, folder = job
    log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    from prefopt.cli import train

    return name, train([*flags, "--train.threads", "1", "--output", str(folder / name)])


def lines(output: Path, split: str = "eval") -> list[dict[str, Any]]:
    """The metrics lines of a run."""
    every = [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if line["split"] == split]


def machine() -> str:
    """One line that describes machine and versions, for the head of a results file."""
    import platform

    from prefopt.training.versions import versions

    cores = len(os.sched_getaffinity(0))
    names = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{platform.machine()}, {cores} cores, one thread per run; {names}"
