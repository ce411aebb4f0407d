"""The run card of an output folder: written by a new run, checked by a resumed one."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

from prefopt import settings, storage
from prefopt.errors import TrainError
from prefopt.redaction import hidden
from prefopt.settings import RunConfig
from prefopt.storage import write_sealed, write_whole

CARD = "run_card.json"


def write_or_check_card(card: dict[str, Any], output: Path, write: bool = True) -> None:
    """Write the card of a new run; check a resumed run against its card.

    Args: write: whether this process starts the run; other processes write the card only where there is none yet.
    Raises: TrainError where data, weights or judge differ from those that the run started with.
    """
    card = hidden(json.loads(json.dumps(card, default=str)))
    old = read_card(output)
    if old is None:
        write_sealed(output / CARD, card, only_new=not write)
        if write:
            write_whole(output / "config.yaml", [settings.from_dict(card["config"]).to_yaml()])
            return
        old = storage.read_sealed(output / CARD) or {}
    checked = {"training data": ("data", "train"), "held-out data": ("data", "eval")}
    checked |= {"order of the training pairs": ("data", "order")}
    checked |= {"model": ("model", "sha256"), "reference": ("reference", "sha256")}
    checked |= {"judge": ("judge", "sha256")}
    checked |= {"base model": ("model", "base_sha256"), "reference's base": ("reference", "base_sha256")}
    for what, (group, key) in checked.items():
        before, now = ((one.get(group) or {}).get(key) for one in (old, card))
        if before != now:
            raise TrainError(
                f"--output {output}: the {what} is not what this run began with ({before} -> {now}); "
                "choose another --output"
            )


def read_card(output: Path) -> dict[str, Any] | None:
    """The card of the run in an output folder; None where no run has written results, so its settings may change.

    Raises: TrainError for results without a card, and for a damaged card; Unreadable.
    """
    results = [
        *("metrics.jsonl", "checkpoints", "best", "model", "adapter", "round_00", "round_01"),
        *("eval_pairs.jsonl", "samples.jsonl", "rounds.jsonl", "rounds.md", "rounds.png", "frontier.png"),
    ]
    left = next((name for name in results if storage.is_there(output / name)), None)
    path = output / CARD
    try:
        card = storage.read_sealed(path, unsealed=True)
    except storage.Damaged as error:
        raise TrainError(f"{error}; choose another --output, or restore it from a copy") from None
    if card is None:
        if left is not None:
            raise TrainError(
                f"--output {output}: holds '{left}' without a {CARD}, so the run that wrote it is unknown; choose "
                "another --output, or restore the card from a copy"
            )
        return None
    groups = [card.get(key, 0) for key in ("config", "data", "model")]
    if not all(isinstance(group, dict) for group in groups) or not isinstance(card.get("reference", 0), dict | None):
        raise TrainError(f"{path}: is not a run card; choose another --output, or restore it from a copy")
    return card if left is not None else None


def first_day(output: Path) -> date:
    """The date on which a run started: a chat template that asks for the date receives it on every resumption too."""
    card = read_card(output)
    day = None if card is None else card.get("template_date")
    return date.today() if day is None else date.fromisoformat(day)


def split_version(output: Path) -> int:
    """The version of the held-out split: the newest, or the one that the run in the output folder started with."""
    from prefopt.data import split

    card = read_card(output)
    return split.VERSION if card is None else split.version_of(str(card["data"].get("eval", "")))


def described_method(config: RunConfig) -> str:
    """The method's name with its variant and main settings, such as `dpo (sigmoid, beta 0.1)`."""
    more = config.method.describe()
    return f"{config.method_name} ({more})" if more else config.method_name
