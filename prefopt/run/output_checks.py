"""What is checked before anything heavy is imported: paths, optional packages, and the run that the output holds."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from prefopt import settings, storage
from prefopt.data.rows import open_source
from prefopt.errors import ConfigError, TrainError
from prefopt.redaction import hidden
from prefopt.run.card import CARD, read_card
from prefopt.settings import RunConfig
from prefopt.training import callbacks, weight_files


def check_paths(config: RunConfig) -> None:
    """Refuse a path that cannot be a model or data, a missing optional package, and what is no callback.

    Nothing heavy is imported, except by a user's own callbacks.
    """
    callbacks.load(config.train.callbacks)
    for key, path in (("model.path", config.model.path), ("reference.path", config.reference.path)):
        if path is not None:
            weight_files.check_path(key, path)
    for tracker in config.track.to:
        if importlib.util.find_spec(tracker) is None:
            extra = f"prefopt[{tracker}]" if tracker == "wandb" else tracker
            raise ConfigError(f"track.to: '{tracker}' is not installed; pip install '{extra}', or leave it out")
    needs_bitsandbytes = {"model.quantize": config.model.quantize, "optim.name": config.optim.name}
    for key, value in needs_bitsandbytes.items():
        needed = value is not None if key == "model.quantize" else str(value).endswith("adamw_8bit")
        if needed and importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(f"{key}: '{value}' needs bitsandbytes; pip install 'prefopt[qlora]', or leave it out")
    for path in settings.sources(config.data.train) + settings.sources(config.data.eval):
        if Path(path).suffix or path.startswith((".", "/", "~")):
            open_source(path)


def check_same_run(config: RunConfig, output: Path, but: Sequence[str] = ()) -> None:
    """Refuse an output folder that holds a run with other settings, or files of a user that a run would replace.

    Args: but: settings that may differ.
    Raises: ConfigError naming the first settings that differ; TrainError for the folder's files; Unreadable.
    """
    card = read_card(output)
    if card is None:
        _check_config_file(output)
        return
    _check_exports(output)
    changed = settings.differences(hidden(card["config"]), hidden(config.to_dict()))
    changed = [line for line in changed if line.partition(":")[0] not in but]
    keys = [line.partition(":")[0] for line in changed]
    if keys and not but and config.rounds.count == 0 and set(keys) <= set(settings.LENGTHS):
        from prefopt.training import extension

        lengths = extension.changed_lengths(card["config"], config.to_dict())
        extension.check(output, settings.from_dict(card["config"]), lengths)
        return
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(
            f"--output {output}: holds a run with other settings ({'; '.join(changed[:3])}{more}); "
            "choose another --output, or use the settings of that run to resume it"
        )


def _check_config_file(output: Path) -> None:
    """Raises: TrainError where a new run would overwrite a config.yaml that no run has written."""
    if storage.is_there(output / "config.yaml") and not storage.is_there(output / CARD):
        raise TrainError(
            f"--output {output}: holds a config.yaml that no run has written, and a run writes its own there; "
            "choose another --output"
        )


def _check_exports(output: Path) -> None:
    """Raises: TrainError where a run would replace a model that no run has exported."""
    for name in ("model", "adapter"):
        if storage.is_there(output / name) and not storage.is_there(output / name / storage.MANIFEST):
            raise TrainError(
                f"{output / name}: was not written by a run, or lost its {storage.MANIFEST}; a run exports to this "
                "place: move it away, or choose another --output"
            )
