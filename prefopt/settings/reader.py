"""From flags and YAML files to dataclasses: every key is checked, every value is converted.

A flag is a one-key YAML file: both pass through the same checks and conversions."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt import registry
from prefopt.errors import ConfigError, did_you_mean
from prefopt.method import Method
from prefopt.settings import other_names
from prefopt.settings.coercion import coerce, type_name
from prefopt.settings.nested import flatten, lookup, merge, nest
from prefopt.settings.schema import NOT_SETTINGS, RunConfig, type_hints
from prefopt.settings.yaml_files import load_yaml


def split_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Parse command-line arguments to `{dotted key: text}`; a flag without a value is True."""
    flags: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"found '{word}', expected a flag such as --optim.lr 1e-6")
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if not equals:
            value_follows = words and (not words[0].startswith("--"))
            flags_value: Any = words.pop(0) if value_follows else True
        else:
            flags_value = value
        key = "method.name" if key == "method" else key
        if key in flags:
            raise ConfigError(f"--{key}: given twice")
        flags[key] = flags_value
    return flags


def read_config_file(path: Path) -> dict[str, Any]:
    """The nested settings in a YAML file. Raises: ConfigError."""
    loaded = load_yaml(path, "--config ", "keys such as 'method:' and 'optim:'")
    if isinstance(loaded.get("method"), str):
        loaded["method"] = {"name": loaded["method"]}
    return nest_dotted(loaded)


def nest_dotted(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with dotted keys, nested keys or both, as nested mappings. Raises: ConfigError for a duplicate."""
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        value = nest_dotted(value) if isinstance(value, dict) else value
        nested = nest({str(key): value})
        twice = flatten(out).keys() & flatten(nested).keys()
        if twice:
            raise ConfigError(f"{sorted(twice)[0]}: given twice in one file")
        out = merge(out, nested)
    return out


def join_sources(layer: dict[str, Any], where: str) -> dict[str, Any]:
    """The layer with lists of data sources joined by commas, as a flag names them."""
    for key in ("train", "eval"):
        named = lookup(layer, f"data.{key}")
        if isinstance(named, (list, tuple)):
            texts = [str(item) for item in named]
            bad = next((text for text in texts if "," in text or not text.strip()), None)
            if bad is not None or not texts:
                found = "an empty list" if bad is None else repr(bad)
                raise ConfigError(
                    f"{origin(where, f'data.{key}')}: found {found}, expected names of sources without a comma"
                )
            layer = {**layer, "data": {**layer["data"], key: ",".join(texts)}}
    return layer


def pop_method_name(layer: dict[str, Any], where: str) -> str | None:
    """Remove and return the name of the method. Raises: ConfigError for a name that is not text."""
    group = layer.get("method")
    if group is not None and not isinstance(group, dict):
        raise ConfigError(f"{origin(where, 'method')}: found {group!r}, expected a name or a group of settings")
    name = group.pop("name", None) if group else None
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"{origin(where, 'method')}: expected a method's name: {', '.join(registry.names())}")
    return name


def origin(where: str, key: str) -> str:
    """How an error names a setting: by its file and key, or by its flag where `where` is empty."""
    return f"{where}: {key}" if where else f"--{key}"


def known_keys(method_class: type[Method]) -> list[str]:
    """Every setting of a run with this method."""
    keys = ["method", "config", "help", *(f"method.{name}" for name in type_hints(method_class))]
    for name, hint in type_hints(RunConfig).items():
        if name not in NOT_SETTINGS:
            keys += [f"{name}.{leaf}" for leaf in type_hints(hint)] if dataclasses.is_dataclass(hint) else [name]
    return keys


def check_keys(layer: Mapping[str, Any], name: str, method_class: type[Method], where: str) -> None:
    """Raises: ConfigError for a setting that does not exist, or that another method has."""
    known = [key for key in known_keys(method_class) if not (where and key in ("config", "help"))]
    for key in unknown_keys(layer, known, where):
        if not name and key.startswith("method."):
            continue
        if key.startswith("method."):
            leaf = key.removeprefix("method.")
            owners = [m for m in registry.names() if m != name and leaf in type_hints(registry.get(m))]
            if owners:
                raise ConfigError(
                    f"{origin(where, key)}: method '{name}' has no '{leaf}'; it belongs to {', '.join(owners)}"
                )
        raise unknown_setting(key, known, where)


def unknown_keys(layer: Mapping[str, Any], known: Sequence[str], where: str) -> Iterator[str]:
    """The keys of a layer that are not settings. Raises: ConfigError for a value given to a group."""
    names = (
        *("data.columns", "data.template_args", "optim.args", "generate.args", "judge.args", "template_args"),
        "method.parts",
    )
    mappings = tuple(f"{name}." for name in names if name in known)
    for key in flatten(layer):
        if key in known or key.startswith(mappings):
            continue
        if key in {k.partition(".")[0] for k in known if "." in k}:
            if lookup(layer, key) in ({}, None):
                continue
            raise ConfigError(
                f"{origin(where, key)}: '{key}' is a group; name a setting in it, such as "
                f"{next(k for k in known if k.startswith(key + '.'))}"
            )
        yield key


def unknown_setting(key: str, known: Sequence[str], where: str) -> ConfigError:
    """The error for an unknown setting, with the most likely name."""
    same_name = [k for k in known if "." in k and k.rpartition(".")[2] == key.rpartition(".")[2]]
    renamed = other_names.RENAMED.get(key)
    if renamed in known:
        return ConfigError(f"{origin(where, key)}: unknown setting; did you mean '{renamed}'?")
    near = other_names.ours(key, known)
    if near is None or (len(same_name) == 1 and not other_names.is_whole(key)):
        near = f"; did you mean '{same_name[0]}'?" if same_name else did_you_mean(key, known)
    return ConfigError(f"{origin(where, key)}: unknown setting{near or '; --help lists them all'}")


def build(
    cls: type,
    values: Mapping[str, Any],
    prefix: str,
    sources: Mapping[str, str],
    given: Mapping[str, Any] | None = None,
) -> Any:
    """A settings dataclass from nested values, each converted to its declared type.

    Args:
        prefix: of the keys, such as `optim.`.
        sources: dotted key -> file that gave it, or "" for a flag; errors name it.
        given: fields that are ready.
    Raises: ConfigError.
    """
    ready: dict[str, Any] = dict(given or {})
    for name, hint in type_hints(cls).items():
        if name not in values or name in ready:
            continue
        key = prefix + name
        if dataclasses.is_dataclass(hint):
            ready[name] = build(typing.cast(type, hint), values[name] or {}, f"{key}.", sources)
        else:
            where = next((w for k, w in sources.items() if k == key or k.startswith(f"{key}.")), "")
            ready[name] = coerce(values[name], hint, origin(where, key))
    for f in dataclasses.fields(cls):
        required = f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in ready:
            raise ConfigError(f"{prefix}{f.name}: not given, expected {type_name(type_hints(cls)[f.name])}")
    return cls(**ready)
