"""Progress of a run from its files: step, remaining time, metrics of its last evaluation, budget used."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt import storage
from prefopt.settings import RunConfig
from prefopt.storage import read_lines

_CHECKPOINT = re.compile(r"step_\d{8}")
_NOT_METRICS = ("step", "split", "round", "epoch")


@dataclass(frozen=True)
class RunProgress:
    """Progress of one run.

    Args: fraction: of the whole run, from 0 to 1; left: estimated seconds that remain. None: unknown.
    """

    step: int
    fraction: float | None
    seconds: float
    left: float | None


def _finished_lines(output: Path) -> list[dict[str, Any]]:
    """The metrics of a finished run, compared with the hashes in its last checkpoint.

    Raises: Damaged naming a line that is not as it was written; Unreadable.
    """
    path = output / "metrics.jsonl"
    saved = [place for place in storage.listing(output / "checkpoints") if _CHECKPOINT.fullmatch(place.name)]
    state = None
    with contextlib.suppress(storage.Damaged):  # no error: nothing resumes from a finished run
        state = storage.read_json(saved[-1] / "state.json") if saved else None
    if isinstance(state, dict) and "metrics" in state:
        wrong = storage.other_line(path, storage.read_bytes(path) or b"", state["metrics"], str(saved[-1]))
        if wrong is not None:
            raise wrong
    return read_lines(path)


def progress_of(run_config: RunConfig, output: Path) -> RunProgress:
    """The progress of a run."""
    train = run_config.train
    if run_config.rounds.count:
        rounds = len(read_lines(output / "rounds.jsonl"))
        return RunProgress(rounds, rounds / (run_config.rounds.count + 1), 0.0, None)
    lines = read_lines(output / "metrics.jsonl")
    steps = [line for line in lines if line.get("split") == "train"]
    if not steps:
        return RunProgress(0, None, 0.0, None)
    trained, step = sum(line["seconds"] for line in steps), int(steps[-1]["step"])
    if train.max_steps is not None:
        fraction = step / train.max_steps
    elif train.max_tokens is not None:
        fraction = sum(line["tokens_processed"] for line in steps) / train.max_tokens
    elif train.max_seconds is not None:
        fraction = trained / train.max_seconds
    else:
        fraction = steps[-1].get("epoch", 0.0) / train.epochs
    fraction = min(fraction, 1.0)
    seconds = sum(line["seconds"] for line in lines)
    return RunProgress(step, fraction, seconds, seconds * (1 - fraction) / fraction if fraction else None)


def last_metrics(output: Path) -> dict[str, float]:
    """The metrics of a finished run's last evaluation: of its last round, or of its training. Raises: Damaged."""
    rounds = read_lines(output / "rounds.jsonl")
    evals = [line for line in _finished_lines(output) if line.get("split") == "eval"]
    last = (rounds or evals or [{}])[-1]
    return {key: value for key, value in last.items() if key not in _NOT_METRICS and isinstance(value, (int, float))}


def budget_used(output: Path) -> dict[str, float]:
    """Steps, pairs, tokens processed and seconds of a finished run's training. Raises: Damaged."""
    steps = [line for line in _finished_lines(output) if line.get("split") == "train"]
    if not steps:
        return {}
    return {
        "steps": len(steps),
        "pairs": sum(line["pairs"] for line in steps),
        "tokens": sum(line["tokens_processed"] for line in steps),
        "seconds": round(sum(line["seconds"] for line in steps), 3),
    }
