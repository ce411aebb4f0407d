"""What the files of a run tell of it: how far it is, how long it will take, how good it was at its last evaluation."""

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
_NOT_FIGURES = ("step", "split", "round", "epoch")


@dataclass(frozen=True)
class RunProgress:
    """Of one run. Args: share: of its end, from 0 to 1. left: seconds until then, at its pace so far; None: unknown."""

    step: int
    share: float | None
    seconds: float
    left: float | None


def _finished_lines(output: Path) -> list[dict[str, Any]]:
    """The metrics of a run that is done, held to what its last checkpoint knows of them.

    Raises: Damaged naming a line that is not as it was written; Unreadable.
    """
    path = output / "metrics.jsonl"
    saved = [place for place in storage.listing(output / "checkpoints") if _CHECKPOINT.fullmatch(place.name)]
    state = None
    with contextlib.suppress(storage.Damaged):  # of a checkpoint that is not needed any more
        state = storage.read_json(saved[-1] / "state.json") if saved else None
    if isinstance(state, dict) and "metrics" in state:
        wrong = storage.other_line(path, storage.read_bytes(path) or b"", state["metrics"], str(saved[-1]))
        if wrong is not None:
            raise wrong
    return read_lines(path)


def of(run_config: RunConfig, output: Path) -> RunProgress:
    """How far a run is."""
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
        share = step / train.max_steps
    elif train.max_tokens is not None:
        share = sum(line["tokens_processed"] for line in steps) / train.max_tokens
    elif train.max_seconds is not None:
        share = trained / train.max_seconds
    else:
        share = steps[-1].get("epoch", 0.0) / train.epochs
    share = min(share, 1.0)
    seconds = sum(line["seconds"] for line in lines)
    return RunProgress(step, share, seconds, seconds * (1 - share) / share if share else None)


def last_figures(output: Path) -> dict[str, float]:
    """The figures of a finished run's last evaluation: of its rounds, or of its training. Raises: Damaged."""
    rounds = read_lines(output / "rounds.jsonl")
    evals = [line for line in _finished_lines(output) if line.get("split") == "eval"]
    last = (rounds or evals or [{}])[-1]
    return {key: value for key, value in last.items() if key not in _NOT_FIGURES and isinstance(value, (int, float))}


def spent(output: Path) -> dict[str, float]:
    """Steps, pairs, tokens fed and seconds of a finished run's training. Raises: Damaged."""
    steps = [line for line in _finished_lines(output) if line.get("split") == "train"]
    if not steps:
        return {}
    return {
        "steps": len(steps),
        "pairs": sum(line["pairs"] for line in steps),
        "tokens": sum(line["tokens_processed"] for line in steps),
        "seconds": round(sum(line["seconds"] for line in steps), 3),
    }
