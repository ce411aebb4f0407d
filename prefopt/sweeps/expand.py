"""Expand a sweep file into runs. The settings of each are parsed as the run itself will parse them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt import settings as config
from prefopt.errors import ConfigError
from prefopt.settings import FREE_TO_CHANGE, RunConfig
from prefopt.settings.nested import flatten
from prefopt.settings.schema import as_plain
from prefopt.storage import text_hash
from prefopt.sweeps.manifest import SweepRun
from prefopt.sweeps.sweep_file import Settings, SweepFile

_MOST_RUNS = 100_000  # the settings of each are parsed before anything starts
_YAML_VALUES = ("optim.args.", "generate.args.")  # parsed as YAML, also from a flag


def runs_of(file: SweepFile) -> list[SweepRun]:
    """All runs, start runs first; equal combinations are one run.

    Every combination of the grid is combined with every entry of the list and every draw. Draw number i is the same in
    all combinations, so that methods are compared at the same draws.

    Raises: ConfigError that names the run and what is wrong with it.
    """
    count = math.prod(map(len, file.grid.values())) * len(file.entries) * file.draws
    if count > _MOST_RUNS:
        raise ConfigError(f"{file.path}: {count:,} combinations and draws, expected at most {_MOST_RUNS:,}")
    points = list(_points(file))
    runs: dict[str, SweepRun] = {}
    unmet = {key for key in file.where if not any(key in point for point in points)}
    if unmet:
        raise ConfigError(f"{file.path}: where.{min(unmet)}: no run meets these conditions")
    for number, point in enumerate(points, 1):
        for run in runs_at(file, point, f"run {number} of {len(points)}"):
            runs.setdefault(run.id, run)
    return sorted(runs.values(), key=lambda run: bool(run.after))


def combinations(file: SweepFile) -> Iterator[Settings]:
    """Every combination of fixed settings, grid and list; conditions of `where` are not applied."""
    for values in itertools.product(*file.grid.values()):
        for entry in file.entries:
            yield {**file.fixed, **dict(zip(file.grid, values, strict=True)), **entry}


def draw(file: SweepFile, number: int) -> Settings:
    """Draw `number`: each value depends on the seed, the number and its own key only."""
    return {
        key: space.at(random.Random(f"{file.draw_seed} {number} {key}").random()) for key, space in file.random.items()
    }


def _points(file: SweepFile) -> Iterator[Settings]:
    for settings in combinations(file):
        for number in range(file.draws):
            yield apply_conditions(file, {**settings, **draw(file, number)})


def apply_conditions(file: SweepFile, settings: Settings) -> Settings:
    """The settings whose conditions in `where` hold."""

    def holds(key: str) -> bool:
        return key in settings and all(
            holds(other) and settings[other] in values for other, values in file.where.get(key, {}).items()
        )

    return {key: value for key, value in settings.items() if holds(key)}


def runs_at(file: SweepFile, settings: Settings, name: str) -> list[SweepRun]:
    """The run with these settings, after its start run if the file has one. Args: name: for errors."""
    before: list[SweepRun] = []
    if file.start is not None:
        base = {key: value for key, value in file.fixed.items() if not key.startswith("method")}
        base |= {key: settings[key] for key in file.start.per if key in settings}
        base = {key: value for key, value in base.items() if key not in file.start.settings} | file.start.settings
        before = [_run(file, base, f"the start of {name}")]
        settings = settings | {"model.path": str(Path(before[0].output) / "model")}
    return [*before, _run(file, settings, name, before, matched=True)]


def _run(
    file: SweepFile, settings: Settings, name: str, before: Sequence[SweepRun] = (), matched: bool = False
) -> SweepRun:
    varying = {key: value for key, value in settings.items() if key not in file.fixed and key != "model.path"}
    shown = ", ".join(f"{key}={_text(key, value)}" for key, value in varying.items())
    where = f"{file.path}: {name}" + (f" ({shown})" if shown else "")
    try:
        if matched:
            settings = settings | _budget(file, settings)
        parsed = config.parse(_flags(settings))
    except ConfigError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix('--')}") from error
    name_of_method = parsed.method_name.rpartition(".")[2]
    run_id = f"{name_of_method}-{_digest(parsed, before)}"
    output = str(file.output / "runs" / run_id)
    argv = (*_flags(settings), f"--output={output}")
    return SweepRun(run_id, argv, output, tuple(run.id for run in before), settings)


def _budget(file: SweepFile, settings: Settings) -> Settings:
    """The setting that ends the run at the sweep's budget."""
    if file.budget is None:
        return {}
    match, value = file.budget.match, file.budget.value
    if match == "tokens":
        return {"train.max_tokens": int(value)}
    if match == "wall":
        return {"train.max_seconds": float(value)}
    if match == "steps":
        return {"train.max_steps": int(value)}
    train = config.parse(_flags(settings | {"train.max_steps": 1})).train
    batch = train.global_batch
    if train.tokens_per_batch is not None:
        raise ConfigError("budget.match: found 'pairs', but train.tokens_per_batch varies the pairs per step")
    if value % batch:
        raise ConfigError(
            f"budget.value: {int(value):,} pairs are not a whole number of steps of train.global_batch {batch}, "
            f"expected e.g. {max(1, round(value / batch)) * batch:,}"
        )
    return {"train.max_steps": int(value) // batch}


def _flags(settings: Mapping[str, Any]) -> list[str]:
    return [f"--{key}={_text(key, value)}" for key, value in settings.items()]


def _text(key: str, value: Any) -> str:
    """A value as the text of a flag."""
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    if isinstance(value, (list, tuple)):
        if key.startswith(_YAML_VALUES):
            return json.dumps(value)
        items = [str(item) for item in value]
        if any(re.search(r"[,\s]", item) for item in items):
            raise ConfigError(
                f"{key}: found {value!r}, whose items contain commas or spaces; give it in a YAML file (config: FILE)"
            )
        return ",".join(items)
    return str(value)


def _digest(parsed: RunConfig, before: Sequence[SweepRun]) -> str:
    """Hash of the overrides that determine the run: a setting that is added to prefopt later changes no run's id.

    A model that another run of the sweep trains counts as that run, not as its folder.
    """
    values = flatten(parsed.to_dict())
    plain = RunConfig(method=parsed.method, method_name=parsed.method_name).to_dict()
    defaults = flatten({key: value for key, value in plain.items() if key != "method"})
    defaults |= {f"method.{f.name}": as_plain(f.default) for f in dataclasses.fields(parsed.method)}
    overrides = {
        key: value
        for key, value in values.items()
        if not (key in defaults and defaults[key] == value)
        and not any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)
    }
    if before:
        overrides["model.path"] = f"run {before[0].id}"
    return text_hash(json.dumps(overrides, sort_keys=True, default=str))[:10]
