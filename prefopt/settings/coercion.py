"""A value from a flag or from YAML as the type that its setting declares."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import yaml

from prefopt import redaction
from prefopt.errors import ConfigError, did_you_mean
from prefopt.settings.yaml_files import parse_yaml


def coerce(value: Any, hint: Any, where: str) -> Any:
    """Convert `value` to the type `hint`. Text is parsed like the value of a flag.

    Raises: ConfigError that begins with `where`.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, str):
        redaction.learn_from(where, value)

    def refuse(expected: str) -> ConfigError:
        return ConfigError(f"{where}: found {value!r}, expected {expected}")

    if hint is Any:
        try:
            return parse_yaml(value) if isinstance(value, str) else value
        except yaml.YAMLError:
            raise refuse("a number, a word or a list such as [0.9, 0.95]") from None
    if origin in (types.UnionType, typing.Union):
        if any(typing.get_origin(arg) is Literal and value in typing.get_args(arg) for arg in args):
            return value
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            if type(None) in args:
                return None
            raise refuse(type_name(hint))
        inner = [a for a in args if a is not type(None)]
        for option in inner:
            try:
                return coerce(value, option, where)
            except ConfigError:
                if option is inner[-1]:
                    raise refuse(type_name(hint)) from None
    if origin is Literal:
        if value in args:
            return value
        # YAML reads a bare `no` as false
        if value is False and "no" in args:
            return "no"
        raise ConfigError(
            f"{where}: found {value!r}, expected one of {', '.join(map(str, args))}"
            f"{did_you_mean(str(value), map(str, args))}"
        )
    if hasattr(hint, "from_plain"):
        return hint.from_plain(value, where, coerce)
    if origin is tuple:
        items = _items(value, args[0])
        if not isinstance(items, (list, tuple)):
            raise refuse("a list")
        return tuple(coerce(item, args[0], where) for item in items)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise refuse("a mapping of keys to values")
        return {str(k): coerce(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if hint is bool:
        text = str(value).lower()
        if text not in ("true", "false"):
            raise refuse("true or false")
        return text == "true"
    if isinstance(value, bool):
        raise (
            refuse(type_name(hint))
            if value is False
            else ConfigError(f"{where}: found no value, expected {type_name(hint)}")
        )
    if hint is int:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise refuse("an integer") from None
        except OverflowError:
            number = float("inf")
        if number != number or number in (float("inf"), float("-inf")) or number != int(number):
            raise refuse("an integer")
        if abs(number) >= 2**63:
            raise refuse("an integer below 2^63")
        return int(value) if isinstance(value, int) or str(value).lstrip("+-").isdigit() else int(number)
    if hint is float:
        try:
            return float(value)
        except (TypeError, ValueError):
            raise refuse("a number") from None
        except OverflowError:
            raise refuse("a number that fits in a float") from None
    if hint is str:
        if isinstance(value, (str, int, float)):
            if "\0" in str(value):
                raise refuse("text without a NUL character")
            if not str(value).isascii() and any("\ud800" <= letter <= "\udfff" for letter in str(value)):
                raise refuse("text that can be written as UTF-8")
            return str(value)
        raise refuse("text")
    raise ConfigError(
        f"{where}: settings of type {type_name(hint)} are not supported; use numbers, text, Literal, bool"
    )


def _items(value: Any, hint: Any) -> Any:
    """The items of a list, which a flag gives with commas between, or as YAML where they have forms of their own."""
    own_form = hasattr(hint, "from_plain")
    if own_form and isinstance(value, Mapping):
        return [{"name": name, "weight": weight} for name, weight in value.items()]
    if own_form and isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return _items(parse_yaml(value), hint)
        except yaml.YAMLError:
            return value
    return [v for v in re.split(r"[,\s]+", value) if v] if isinstance(value, str) else value


def type_name(hint: Any) -> str:
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "none"}
    if hint in names:
        return names[hint]
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return "one of " + ", ".join(map(str, choices)) if len(choices) > 1 else str(choices[0])
    if typing.get_origin(hint) is tuple:
        kind = type_name(typing.get_args(hint)[0]).removeprefix("an ").removeprefix("a ")
        return f"a list of {kind}s" if kind != "text" else "a list"
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(type_name(a) for a in typing.get_args(hint))
    return str(hint)
