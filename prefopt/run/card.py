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
    """Write the card of a new run; hold a continued run to the data and weights of its card.

    Args: write: whether this process begins the run; another one writes the card only where there is none yet.
    """
    card = hidden(json.loads(json.dumps(card, default=str)))
    old = read_card(output)
    if old is None:
        write_sealed(output / CARD, card, only_new=not write)
        if write:
            write_whole(output / "config.yaml", [settings.from_dict(card["config"]).to_yaml()])
            return
        old = storage.read_sealed(output / CARD) or {}
    held = {"training data": ("data", "train"), "held-out data": ("data", "eval")}
    held |= {"order of the training pairs": ("data", "order")}
    held |= {"model": ("model", "sha256"), "reference": ("reference", "sha256")}
    held |= {"judge": ("judge", "sha256")}
    held |= {"base model": ("model", "base_sha256"), "reference's base": ("reference", "base_sha256")}
    for what, (group, key) in held.items():
        before, now = ((one.get(group) or {}).get(key) for one in (old, card))
        if before != now:
            raise TrainError(
                f"--output {output}: the {what} is not what this run began with ({before} -> {now}); "
                "choose another --output"
            )


def read_card(output: Path) -> dict[str, Any] | None:
    """The card of the run that the output holds; None where nothing has come of one: a mistake may be mended.

    Raises: TrainError for what a run has left without its card, or with a card that is not as it was written.
    """
    names = [
        *("metrics.jsonl", "checkpoints", "best", "model", "adapter", "round_00", "round_01"),
        *("eval_pairs.jsonl", "samples.jsonl", "rounds.jsonl", "rounds.md", "rounds.png", "frontier.png"),
    ]
    left = next((name for name in names if storage.is_there(output / name)), None)
    path = output / CARD
    try:
        card = storage.read_sealed(path, unsealed=True)
    except storage.Damaged as error:
        raise TrainError(f"{error}; choose another --output, or put it back from a copy") from None
    if card is None:
        if left is not None:
            raise TrainError(
                f"--output {output}: holds '{left}' without a {CARD}, so which run it is of is not known; choose "
                "another --output, or put the card back"
            )
        return None
    groups = [card.get(key, 0) for key in ("config", "data", "model")]
    if not all(isinstance(group, dict) for group in groups) or not isinstance(card.get("reference", 0), dict | None):
        raise TrainError(f"{path}: is not a run card; choose another --output, or put it back from a copy")
    return card if left is not None else None


def first_day(output: Path) -> date:
    """The day that a run began: what a chat template that asks for the date is told, however long the run takes."""
    card = read_card(output)
    kept = None if card is None else card.get("template_date")
    return date.today() if kept is None else date.fromisoformat(kept)


def split_version(output: Path) -> int:
    """How prompts are held out: as now, or as the run that the output holds has begun with."""
    from prefopt.data import split

    card = read_card(output)
    return split.VERSION if card is None else split.version_of(str(card["data"].get("eval", "")))


def described_method(config: RunConfig) -> str:
    """The method's name with its variant and main settings."""
    more = config.method.describe()
    return f"{config.method_name} ({more})" if more else config.method_name
