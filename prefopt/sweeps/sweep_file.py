"""The sweep file: fixed settings and the values or spaces of the others, parsed and checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefopt import settings as config
from prefopt.errors import ConfigError, did_you_mean

Settings = dict[str, Any]  # flat: dotted key -> value
_KEYS = ("output", "fixed", "grid", "list", "random", "where", "start", "budget", "search", "minimize", "maximize")
_SET_BY_SWEEP = ("output", "dry_run", "help")
_MATCHES = ("steps", "pairs", "tokens", "wall")
_ENDS = ("train.max_steps", "train.max_tokens", "train.max_seconds", "train.epochs")


@dataclass(frozen=True)
class Space:
    """The distribution of a setting: uniform or log-uniform between two numbers, or a uniform choice from a list."""

    kind: Literal["uniform", "loguniform", "choice"]
    values: tuple[Any, ...]

    def at(self, quantile: float) -> Any:
        """The value at this quantile, from 0 to 1; numbers are rounded to four significant digits."""
        if self.kind == "choice":
            return self.values[min(int(quantile * len(self.values)), len(self.values) - 1)]
        low, high = map(float, self.values)
        if self.kind == "uniform":
            value = low + quantile * (high - low)
        else:
            value = low * math.exp(quantile * math.log(high / low))
        return float(f"{value:.4g}")


@dataclass(frozen=True)
class Start:
    """The start run, whose model the other runs begin with. Args: per: settings of the others that it shares."""

    settings: Settings
    per: tuple[str, ...] = ()


@dataclass(frozen=True)
class SweepBudget:
    """The budget that ends every run."""

    match: Literal["steps", "pairs", "tokens", "wall"]
    value: float


@dataclass(frozen=True)
class Search:
    """A search: the metric that draws optimise."""

    metric: str
    maximize: bool


@dataclass(frozen=True)
class SweepFile:
    """A parsed sweep file.

    Args:
        path: for errors.
        output: the sweep's folder.
        fixed: settings of every run.
        grid: values whose combinations are all run.
        entries: of `list`; one empty entry without it.
        random: spaces, from which every combination gets the same `draws`.
        where: key -> the values that other settings must have for a run to have this one.
    """

    path: Path
    output: Path
    fixed: Settings
    grid: dict[str, list[Any]]
    entries: list[Settings]
    random: dict[str, Space] = field(default_factory=dict)
    draws: int = 1
    draw_seed: int = 0
    where: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    start: Start | None = None
    budget: SweepBudget | None = None
    search: Search | None = None


def read(path: Path) -> SweepFile:
    """Read and check a sweep file. Raises: ConfigError, one line that says where in the file."""
    found = config.load_yaml(path, "", "keys such as 'fixed:' and 'grid:'")
    for key in found:
        if key not in _KEYS:
            raise ConfigError(
                f"{path}: {key}: unknown, expected {', '.join(_KEYS)}{did_you_mean(str(key), _KEYS)} "
                "(settings of runs go under fixed, grid, list or random)"
            )
    output = found.get("output", f"runs/sweeps/{path.stem}")
    if not isinstance(output, str) or not output:
        raise _refuse(path, "output", output, "a folder")
    grid = _flat(path, "grid", found.get("grid"))
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise _refuse(path, f"grid.{key}", values, "a list of values")
    entries = _entries(path, found.get("list"))
    spaces, draws, draw_seed = _random(path, found.get("random"))
    file = SweepFile(
        path=path,
        output=Path(output),
        fixed=_flat(path, "fixed", found.get("fixed")),
        grid=grid,
        entries=entries,
        random=spaces,
        draws=draws,
        draw_seed=draw_seed,
        where=_where(path, found.get("where")),
        start=_start(path, found.get("start")),
        budget=_budget(path, found.get("budget")),
        search=_search(path, found, spaces),
    )
    _check_together(file)
    return file


def _refuse(path: Path, key: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{path}: {key}: found {value!r}, expected {expected}")


def _mapping(path: Path, where: str, group: Any, expected: str) -> dict[str, Any]:
    if group is None:
        return {}
    if not isinstance(group, dict):
        raise _refuse(path, where, group, expected)
    return {str(key): value for key, value in group.items()}


def _flat(path: Path, where: str, group: Any, is_value: Callable[[Any], bool] = lambda value: False) -> Settings:
    """Settings by dotted key, however they are nested. Args: is_value: whether a mapping is a value, not a group."""
    out: Settings = {}

    def walk(mapping: Mapping[Any, Any], prefix: str) -> None:
        for name, value in mapping.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict) and value and not is_value(value):
                walk(value, f"{key}.")
                continue
            key = "method" if key == "method.name" else key
            if key in _SET_BY_SWEEP:
                raise ConfigError(f"{path}: {where}.{key}: the sweep sets it for each run; remove it")
            if key in out:
                raise ConfigError(f"{path}: {where}.{key}: given twice")
            out[key] = value

    walk(_mapping(path, where, group, "settings such as 'optim.lr: ...'"), "")
    return out


def _entries(path: Path, group: Any) -> list[Settings]:
    if group is None:
        return [{}]
    if not isinstance(group, list) or not group:
        raise _refuse(path, "list", group, "a list of settings, such as '- {method: dpo, seed: 1}'")
    return [_flat(path, f"list[{number}]", entry) for number, entry in enumerate(group)]


def _random(path: Path, group: Any) -> tuple[dict[str, Space], int, int]:
    if group is None:
        return {}, 1, 0
    kinds = ("uniform", "loguniform", "choice")
    found = _mapping(path, "random", group, "'draws: 8' and spaces such as 'optim.lr: {loguniform: [1e-6, 1e-4]}'")
    draws, seed = found.pop("draws", None), found.pop("draw_seed", 0)
    for name, value in (("draws", draws), ("draw_seed", seed)):
        if not isinstance(value, int) or isinstance(value, bool) or value < (name == "draws"):
            raise _refuse(path, f"random.{name}", value, "a whole number")
    spaces = {}
    flat = _flat(path, "random", found, lambda value: bool({*value} & {*kinds}))
    for key, value in flat.items():
        where = f"random.{key}"
        kind = next(iter(value), None) if isinstance(value, dict) and len(value) == 1 else None
        if kind not in kinds:
            near = did_you_mean(key.rpartition(".")[2], kinds)
            raise _refuse(path, where, value, f"one of uniform: [0, 1], loguniform: [1e-6, 1e-4], choice: [a, b]{near}")
        values = value[kind]
        if not isinstance(values, list) or not values:
            raise _refuse(path, f"{where}.{kind}", values, "a list")
        if kind != "choice":
            numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
            if not (numbers and len(values) == 2 and values[0] < values[1]):
                raise _refuse(path, f"{where}.{kind}", values, "two numbers, the lower one first")
            if kind == "loguniform" and values[0] <= 0:
                raise _refuse(path, f"{where}.{kind}", values, "two numbers above 0")
        spaces[key] = Space(kind, tuple(values))
    if not spaces:
        raise _refuse(path, "random", group, "at least one space, such as 'optim.lr: {loguniform: [1e-6, 1e-4]}'")
    return spaces, draws, seed


def _where(path: Path, group: Any) -> dict[str, dict[str, list[Any]]]:
    """The conditions of settings, by dotted key."""
    out = {}
    for key, conditions in _mapping(path, "where", group, "such as 'method.alpha: {method: tdpo}'").items():
        if not isinstance(conditions, dict) or not conditions:
            raise _refuse(path, f"where.{key}", conditions, "other settings and their values")
        out[key] = {
            "method" if name == "method.name" else str(name): value if isinstance(value, list) else [value]
            for name, value in conditions.items()
        }
    return out


def _start(path: Path, group: Any) -> Start | None:
    if group is None:
        return None
    found = _mapping(path, "start", group, "the settings of the start run")
    per = found.pop("per", [])
    if not isinstance(per, list) or not all(isinstance(key, str) for key in per):
        raise _refuse(path, "start.per", per, "a list of settings, such as [seed]")
    settings = _flat(path, "start", found)
    if "method" not in settings:
        raise ConfigError(f"{path}: start.method: not given, expected the method of the start run, such as sft")
    return Start(settings, tuple(per))


def _budget(path: Path, group: Any) -> SweepBudget | None:
    if group is None:
        return None
    found = _mapping(path, "budget", group, "'match: tokens' and 'value: 1000000'")
    unknown = {*found} - {"match", "value"}
    if unknown:
        raise ConfigError(f"{path}: budget.{min(unknown)}: unknown, expected match and value")
    match, value = found.get("match"), found.get("value", 0)
    if match not in _MATCHES:
        raise _refuse(path, "budget.match", match, f"one of {', '.join(_MATCHES)}{did_you_mean(str(match), _MATCHES)}")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf or (match != "wall" and value != int(value)):
        raise _refuse(path, "budget.value", value, "seconds > 0" if match == "wall" else f"a number of {match}")
    return SweepBudget(match, value)


def _search(path: Path, found: Mapping[str, Any], spaces: Mapping[str, Space]) -> Search | None:
    goals = [name for name in ("minimize", "maximize") if name in found]
    if "search" not in found:
        if goals:
            raise ConfigError(f"{path}: {goals[0]}: given without search; add 'search: optuna' or remove it")
        return None
    if found["search"] != "optuna":
        raise _refuse(path, "search", found["search"], "optuna")
    if len(goals) != 1 or not isinstance(found[goals[0]], str):
        raise ConfigError(f"{path}: search: expected one metric of the evaluations, such as 'maximize: exact/reward'")
    if not spaces:
        raise ConfigError(f"{path}: search: found no spaces; give some under random")
    return Search(found[goals[0]], goals[0] == "maximize")


def _check_together(file: SweepFile) -> None:
    """Checks across groups."""
    places: dict[str, str] = {}
    listed = {key for entry in file.entries for key in entry}
    for where, keys in (("fixed", file.fixed), ("grid", file.grid), ("list", listed), ("random", file.random)):
        for key in keys:
            if key in places:
                raise ConfigError(f"{file.path}: {where}.{key}: given in {places[key]} too; remove one")
            places[key] = where
    if "method" not in places and "config" not in places:
        raise ConfigError(f"{file.path}: no run has a method; give it under fixed, grid or list")
    for key, conditions in file.where.items():
        for name, what in ((key, "it"), *((other, f"where.{key}.{other}") for other in conditions)):
            if name not in places:
                place = f"where.{key}" if what == "it" else what
                raise ConfigError(
                    f"{file.path}: {place}: no run sets '{name}', expected a setting of fixed, grid, list or random"
                    f"{did_you_mean(name, places)}"
                )
    _check_circles(file)
    if file.budget is not None:
        taken = next((key for key in _ENDS if key in places), None)
        if taken is not None:
            raise ConfigError(
                f"{file.path}: {places[taken]}.{taken}: given together with budget, which ends the runs; remove it"
            )
    if file.start is not None:
        _check_start(file, file.start, places)


def _check_circles(file: SweepFile) -> None:
    def visit(key: str, above: Sequence[str]) -> None:
        if key in above:
            raise ConfigError(f"{file.path}: where.{key}: conditions run in a circle: {' -> '.join([*above, key])}")
        for other in file.where.get(key, ()):
            visit(other, [*above, key])

    for key in file.where:
        visit(key, [])


def _check_start(file: SweepFile, start: Start, places: Mapping[str, str]) -> None:
    for key in start.per:
        if places.get(key) not in ("grid", "list", "random"):
            raise ConfigError(
                f"{file.path}: start.per: '{key}' does not vary, expected a setting of grid, list or random"
                f"{did_you_mean(key, [k for k, where in places.items() if where != 'fixed'])}"
            )
        if key in start.settings:
            raise ConfigError(f"{file.path}: start.{key}: given here and in start.per; remove one")
    if places.get("model.path") in ("grid", "list", "random") and "model.path" not in start.per:
        raise ConfigError(
            f"{file.path}: {places['model.path']}.model.path: the runs start from the start run's model; name "
            "model.path in start.per, or give it under fixed"
        )
