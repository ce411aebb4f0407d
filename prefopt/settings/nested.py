"""Nested mappings of settings and their dotted keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefopt.errors import ConfigError
from prefopt.settings.yaml_files import DEEPEST


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"optim.lr": 1}` as `{"optim": {"lr": 1}}`. Raises: ConfigError for a key that is both value and group."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        if len(parents) > DEEPEST:
            raise ConfigError(f"--{key[:40]}...: unknown setting; --help lists them all")
        group = nested
        for parent in parents:
            group = group.setdefault(parent, {})
            if not isinstance(group, dict):
                raise ConfigError(f"--{key}: '{parent}' is given as a value and as a group")
        group[leaf] = value
    return nested


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings in which `high` takes precedence over `low`."""
    out = dict(low)
    for key, value in high.items():
        if value is None and isinstance(out.get(key), dict):
            continue  # an empty group
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"lr": 1}}` as `{"optim.lr": 1}`; an empty group stays a value."""
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out


def lookup(mapping: Mapping[str, Any], dotted: str, missing: Any = None) -> Any:
    """The value at a dotted key, or `missing`."""
    value: Any = mapping
    for part in dotted.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return missing
        value = value[part]
    return value
