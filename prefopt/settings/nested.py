"""Nested mappings of settings and their dotted keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefopt.errors import ConfigError
from prefopt.settings.yaml_files import DEEPEST


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        if len(parents) > DEEPEST:
            raise ConfigError(f"--{key[:40]}...: unknown setting; --help lists them all")
        room = nested
        for parent in parents:
            room = room.setdefault(parent, {})
            if not isinstance(room, dict):
                raise ConfigError(f"--{key}: '{parent}' is given as a value and as a group")
        room[leaf] = value
    return nested


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(low)
    for key, value in high.items():
        if value is None and isinstance(out.get(key), dict):
            continue  # a group's name with nothing under it
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out


def lookup(mapping: Mapping[str, Any], dotted: str, missing: Any = None) -> Any:
    value: Any = mapping
    for part in dotted.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return missing
        value = value[part]
    return value
