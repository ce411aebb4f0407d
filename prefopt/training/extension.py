"""Training a finished run further: which settings may grow, which files it needs, what the run card records."""

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
    in_progress = card.get("extended") and _seal(output / "model") == card["extended"][-1]["model"]
    finished = _seal(output / "model") is not None and not in_progress
    if any(before is None or now is None or now < before for before, now in changed.values()):
        only = " (the length of a finished run can only be raised, in the setting that it was given by)"
        raise ConfigError(
            f"--output {output}: holds a run with other settings ({_listed(changed)}); "
            f"choose another --output, or use the settings of that run to resume it{only if finished else ''}"
        )
    if not finished:
        raise ConfigError(
            f"--output {output}: holds a run with other settings ({_listed(changed)}) that is not finished; finish it "
            "as it was begun, then raise its length"
        )
    lines = _lines(output)
    if old.eval.patience is not None and old.eval.select is not None:
        by = Selection.of(old.eval.select)
        if by.stale(lines) >= old.eval.patience:
            raise ConfigError(
                f"{next(iter(changed))}: {output} holds a run that eval.patience ended, not its length; choose another "
                "--output"
            )
    step = _last_step(lines)
    folder = output / "checkpoints" / checkpoint.name_of(step)
    wrong = checkpoint.damage(folder)
    if wrong is not None:
        raise TrainError(
            f"{folder}: {'is missing' if not folder.exists() else wrong}; a run is extended from its last checkpoint, "
            f"which alone holds the optimizer's state (for a new run from its weights: --model.path {output / 'model'})"
        )
    stopped = checkpoint.load_state(folder).get("stopped")
    if stopped is not None:
        raise ConfigError(
            f"{next(iter(changed))}: {output} holds a run that a callback ended ({stopped}), not its length; choose "
            "another --output"
        )


def begin(
    output: Path, card_file: Path, config: RunConfig, rate: Callable[[RunConfig, int], float | None]
) -> str | None:
    """Record in the run card that a finished run is extended, and move its model aside. After a kill, complete that.

    The model moves to `model_step_*`, because `model` marks a run as finished.

    Args: card_file: of the run, which has passed `check`. config: its settings now. rate: gives the learning rate of
        a step, counted from 0, under given settings; None where it depends on tokens or seconds.
    Returns: a line on the schedule; None where nothing is extended.
    """
    card = storage.read_sealed(card_file, unsealed=True) or {}
    new, note = config.to_dict(), None
    changed = changes(card["config"], new)
    if changed:
        lines = _lines(output)
        step, old = _last_step(lines), from_dict(card["config"])
        note = _schedule(old, config, step, _listed(changed), lines, rate)
        record = {
            "from_step": step,
            "settings": {key: list(values) for key, values in changed.items()},
            "schedule": note,
            "model": _seal(output / "model"),
        }
        card |= {"config": hidden(new), "extended": [*card.get("extended", []), record]}
        storage.write_whole(output / "config.yaml", [from_dict(card["config"]).to_yaml()])
        storage.write_sealed(card_file, card)
    if card.get("extended") and _seal(output / "model") == card["extended"][-1]["model"]:
        _move_model_aside(output, config, int(card["extended"][-1]["from_step"]))
    return note


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings of a run's length that differ, as (before, now)."""
    found = {}
    for key in LENGTHS:
        group, _, name = key.partition(".")
        before, now = old[group].get(name), new[group].get(name)
        if before != now:
            found[key] = (before, now)
    return found


def notes(card_file: Path) -> list[str]:
    """The extensions that a run card records, a line each."""
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
    """How the learning rate continues, in a line."""
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
    exported = output / ("adapter" if config.lora.merge else "model")
    lines = _lines(output)
    by = None if config.eval.select is None else Selection.of(config.eval.select)
    best = None if by is None else by.best(lines)
    if by is not None and best is not None:  # later evaluations are compared with it
        value = next(line[by.metric] for line in lines if line["split"] == "eval" and line["step"] == best)

        def write(folder: Path) -> None:
            checkpoint.copy(exported, folder)
            (folder / SELECTED).write_text(json.dumps({"step": best, by.metric: value}))

        checkpoint.export(output / "best" / checkpoint.name_of(best), write)
    for name in ("adapter", "model"):  # the model last: its presence marks this as not done yet
        if (output / name).exists():
            storage.put_in_place(output / name, output / f"{name}_{checkpoint.name_of(step)}")


def _seal(model: Path) -> str | None:
    manifest = model / storage.MANIFEST
    return storage.sha256(manifest) if storage.is_there(manifest) else None


def _lines(output: Path) -> list[dict[str, Any]]:
    return MetricsFile(output / "metrics.jsonl").lines()


def _last_step(lines: Sequence[Mapping[str, Any]]) -> int:
    return max((int(line["step"]) for line in lines if line["split"] == "train"), default=0)


def _listed(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key}: {before} -> {now}" for key, (before, now) in changed.items())
