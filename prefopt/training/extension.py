"""Extends a finished run to a greater length: checks, the record in the run card, and the old model's new place."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt import storage
from prefopt.errors import ConfigError, TrainError
from prefopt.figures import readable
from prefopt.redaction import hidden
from prefopt.settings import LENGTHS, RunConfig, from_dict
from prefopt.training import checkpoint
from prefopt.training.best_checkpoint import SELECTED, Selection
from prefopt.training.metrics import MetricsFile


def check(output: Path, old: RunConfig, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Check, before any model is loaded, that a run can be extended to another length.

    Args: old: its settings. changed: the settings of its length that differ, as (before, now).
    Raises: ConfigError or TrainError if it is not finished, would become shorter, or lacks its last checkpoint.
    """
    card = storage.read_sealed(output / "run_card.json", unsealed=True) or {}
    in_progress = card.get("extended") and _manifest_hash(output / "model") == card["extended"][-1]["model"]
    finished = _manifest_hash(output / "model") is not None and not in_progress
    if any(before is None or now is None or now < before for before, now in changed.values()):
        only = " (the length of a finished run can only be raised, by the same setting that defined it)"
        raise ConfigError(
            f"--output {output}: holds a run with other settings ({_list_changes(changed)}); "
            f"choose another --output, or use the settings of that run to resume it{only if finished else ''}"
        )
    if not finished:
        raise ConfigError(
            f"--output {output}: holds an unfinished run with other settings ({_list_changes(changed)}); finish it "
            "with its own settings first, then raise its length"
        )
    lines = _lines(output)
    if old.eval.patience is not None and old.eval.select is not None:
        by = Selection.of(old.eval.select)
        if by.stale(lines) >= old.eval.patience:
            raise ConfigError(
                f"{next(iter(changed))}: {output} holds a run that eval.patience stopped before its full length; "
                "choose another --output"
            )
    step = _last_step(lines)
    folder = output / "checkpoints" / checkpoint.name_of(step)
    wrong = checkpoint.damage(folder)
    if wrong is not None:
        raise TrainError(
            f"{folder}: {'is missing' if not folder.exists() else wrong}; extending a run needs its last checkpoint, "
            f"which holds the optimizer's state (for a new run from its weights: --model.path {output / 'model'})"
        )
    stopped = checkpoint.load_state(folder).get("stopped")
    if stopped is not None:
        raise ConfigError(
            f"{next(iter(changed))}: {output} holds a run that a callback stopped before its full length ({stopped}); "
            "choose another --output"
        )


def record_extension(
    output: Path, card_file: Path, config: RunConfig, rate: Callable[[RunConfig, int], float | None]
) -> str | None:
    """Record in the run card that a finished run is extended, and rename its model to `model_step_*`.

    The model is renamed because a folder `model` marks a run as finished. If an earlier call was interrupted between
    the two steps, the second one is completed.

    Args:
        card_file: run card of a run that has passed `check`.
        config: its new settings.
        rate: function (settings, step counted from 0) -> learning rate; None if that depends on tokens or seconds.
    Returns: a log line about the schedule; None if the run is not extended.
    """
    card = storage.read_sealed(card_file, unsealed=True) or {}
    new, note = config.to_dict(), None
    changed = changed_lengths(card["config"], new)
    if changed:
        lines = _lines(output)
        step, old = _last_step(lines), from_dict(card["config"])
        note = _schedule(old, config, step, _list_changes(changed), lines, rate)
        record = {
            "from_step": step,
            "settings": {key: list(values) for key, values in changed.items()},
            "schedule": note,
            "model": _manifest_hash(output / "model"),
        }
        card |= {"config": hidden(new), "extended": [*card.get("extended", []), record]}
        storage.write_whole(output / "config.yaml", [from_dict(card["config"]).to_yaml()])
        storage.write_sealed(card_file, card)
    if card.get("extended") and _manifest_hash(output / "model") == card["extended"][-1]["model"]:
        _move_model_aside(output, config, int(card["extended"][-1]["from_step"]))
    return note


def changed_lengths(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings of a run's length that differ, by name, as (before, now)."""
    found = {}
    for key in LENGTHS:
        group, _, name = key.partition(".")
        before, now = old[group].get(name), new[group].get(name)
        if before != now:
            found[key] = (before, now)
    return found


def schedule_notes(card_file: Path) -> list[str]:
    """One line for each extension that a run card records."""
    card = storage.read_sealed(card_file, unsealed=True) or {}
    return [record["schedule"] for record in card.get("extended", [])]


def _schedule(
    old: RunConfig,
    new: RunConfig,
    step: int,
    changed: str,
    lines: Sequence[Mapping[str, Any]],
    rate: Callable[[RunConfig, int], float | None],
) -> str:
    """One line on how the learning rate continues after the extension."""
    head = f"extended at step {step} ({changed})"
    before = next(line["learning_rate"] for line in reversed(lines) if line["split"] == "train")
    after = rate(new, step)
    if after is None:
        return f"{head}: the {new.optim.schedule} schedule spans the whole new length from here on"
    rates = f"step {step} had the learning rate {readable(before)}, step {step + 1} has {readable(after)}"
    if all(rate(new, one) == rate(old, one) for one in range(step)):
        return f"{head}: the {new.optim.schedule} schedule continues as in a run of the new length; {rates}"
    return (
        f"{head}: the {new.optim.schedule} schedule spans the whole new length from here on; {rates}. A run of the new "
        f"length from the start would have had other learning rates until step {step}"
    )


def _move_model_aside(output: Path, config: RunConfig, step: int) -> None:
    """Rename the exported model after its step; keep a copy in `best/` if eval.select is set."""
    exported = output / ("adapter" if config.lora.merge else "model")
    lines = _lines(output)
    by = None if config.eval.select is None else Selection.of(config.eval.select)
    best = None if by is None else by.best(lines)
    if by is not None and best is not None:  # later evaluations are compared with this model
        value = next(line[by.metric] for line in lines if line["split"] == "eval" and line["step"] == best)

        def write(folder: Path) -> None:
            checkpoint.copy(exported, folder)
            (folder / SELECTED).write_text(json.dumps({"step": best, by.metric: value}))

        checkpoint.export(output / "best" / checkpoint.name_of(best), write)
    for name in ("adapter", "model"):  # the model last: while it exists, an interrupted extension is completed
        if (output / name).exists():
            storage.put_in_place(output / name, output / f"{name}_{checkpoint.name_of(step)}")


def _manifest_hash(model: Path) -> str | None:
    """Identifies an exported model; None if there is none."""
    manifest = model / storage.MANIFEST
    return storage.sha256(manifest) if storage.is_there(manifest) else None


def _lines(output: Path) -> list[dict[str, Any]]:
    return MetricsFile(output / "metrics.jsonl").lines()


def _last_step(lines: Sequence[Mapping[str, Any]]) -> int:
    return max((int(line["step"]) for line in lines if line["split"] == "train"), default=0)


def _list_changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key}: {before} -> {now}" for key, (before, now) in changed.items())
