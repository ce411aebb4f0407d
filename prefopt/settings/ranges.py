"""Ranges that the fields of a settings group declare, and the base class that checks them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from prefopt.errors import ConfigError

_METADATA = "range"


@dataclass(frozen=True)
class Range:
    """The finite numbers within up to two bounds; a bound that is None does not exist."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    note: str = ""  # what a special value means, for the error message

    def holds(self, value: float) -> bool:
        return (
            abs(value) < float("inf")  # false for NaN too
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        bounds = ((">", self.above), (">=", self.at_least), ("<", self.below), ("<=", self.at_most))
        text = " and ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)
        return f"a number {text}{f' ({self.note})' if self.note else ''}"


def ranged(
    default: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    note: str = "",
) -> Any:
    """A dataclass field whose value must lie in a range. A field with the default None also accepts None."""
    limits = Range(above, at_least, below, at_most, note)
    return dataclasses.field(default=default, metadata={_METADATA: limits})


class Group:
    """Base class of settings groups: creating one checks the ranges of its fields.

    `prefix` is what stands before a field's name in an error message, such as `train.`.
    """

    prefix = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            limits, value = field.metadata.get(_METADATA), getattr(self, field.name)
            if limits is not None and value is not None and not limits.holds(value):
                none = ", or none" if field.default is None else ""
                raise self.error(field.name, f"found {value!r}, expected {limits}{none}")

    def error(self, name: str, problem: str) -> ConfigError:
        """The error for a setting of this group."""
        return ConfigError(f"{self.prefix}{name}: {problem}")
