"""What the files of a run tell of it: how far it is, how long it will take, how good it was at its last evaluation."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.config import RunConfig

_NOT_FIGURES = ("step", "split", "round", "epoch")


@dataclass(frozen=True)
class Progress:
    """Of one run. Args: share: of its end, from 0 to 1. left: seconds until then, at its pace so far; None: unknown."""

    step: int
    share: float | None
    seconds: float
    left: float | None


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file that may be written to meanwhile; none where it is not there."""
    lines = []
    with contextlib.suppress(OSError):
        for text in path.read_text(errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break  # the last line, half written
    return lines


def of(run_config: RunConfig, output: Path) -> Progress:
    """How far a run is."""
    train = run_config.train
    if run_config.rounds.count:
        rounds = len(lines_of(output / "rounds.jsonl"))
        return Progress(rounds, rounds / (run_config.rounds.count + 1), 0.0, None)
    lines = lines_of(output / "metrics.jsonl")
    steps = [line for line in lines if line.get("split") == "train"]
    if not steps:
        return Progress(0, None, 0.0, None)
    trained, step = sum(line["seconds"] for line in steps), int(steps[-1]["step"])
    if train.max_steps is not None:
        share = step / train.max_steps
    elif train.max_tokens is not None:
        share = sum(line["tokens_fed"] for line in steps) / train.max_tokens
    elif train.max_seconds is not None:
        share = trained / train.max_seconds
    else:
        share = steps[-1].get("epoch", 0.0) / train.train_epochs
    share = min(share, 1.0)
    seconds = sum(line["seconds"] for line in lines)
    return Progress(step, share, seconds, seconds * (1 - share) / share if share else None)


def last_figures(output: Path) -> dict[str, float]:
    """The figures of the last evaluation: of the run's rounds, or of its training."""
    rounds = lines_of(output / "rounds.jsonl")
    evals = [line for line in lines_of(output / "metrics.jsonl") if line.get("split") == "eval"]
    last = (rounds or evals or [{}])[-1]
    return {key: value for key, value in last.items() if key not in _NOT_FIGURES and isinstance(value, (int, float))}


def spent(output: Path) -> dict[str, float]:
    """Steps, pairs, tokens fed and seconds of training."""
    steps = [line for line in lines_of(output / "metrics.jsonl") if line.get("split") == "train"]
    if not steps:
        return {}
    return {
        "steps": len(steps),
        "pairs": sum(line["pairs"] for line in steps),
        "tokens": sum(line["tokens_fed"] for line in steps),
        "seconds": round(sum(line["seconds"] for line in steps), 3),
    }
