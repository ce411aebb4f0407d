"""Numbers of an example: one per pair, or a list with one per loss token. Errors name the key and what was found."""

from __future__ import annotations

import sys

from prefopt.data.bad_rows import RowProblem, kind, short
from prefopt.data.messages import decoded
from prefopt.types import Column


def number(value: object, name: str, column: Column, *, text: bool) -> float:
    """A finite number in the range of a column.

    Args: name: its key in the file. text: whether the file has text only (CSV).
    Raises: RowProblem.
    """
    if text:
        try:
            value = float(str(value))
        except ValueError:
            raise RowProblem("bad number", name, "text that is not a number", "a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowProblem("bad number", name, f"found {kind(value)}", "a number")
    if abs(value) > sys.float_info.max or value != value:
        found = f"found {value}" if isinstance(value, float) else f"found {kind(value)}"
        raise RowProblem("bad number", name, found, "a finite number")
    if not column.low <= value <= column.high:
        raise RowProblem("bad number", name, f"found {value:g}", f"{column.low:g} to {column.high:g}")
    return float(value)


def list_of_numbers(value: object, name: str) -> list[float]:
    """A list of finite numbers, or the same as JSON text. Args: name: its key in the file. Raises: RowProblem."""
    if isinstance(value, str):
        value = decoded(value, name, name)
    if not isinstance(value, list):
        raise RowProblem("bad numbers", name, f"found {kind(value)}", "a list of numbers, one per loss token")
    for i, one in enumerate(value):
        if isinstance(one, bool) or not isinstance(one, int | float):
            raise RowProblem("bad numbers", name, f"found {kind(one)} at index {i}", "a list of numbers")
        if not abs(one) <= sys.float_info.max:
            raise RowProblem("bad numbers", name, f"found {short(str(one), 30)} at index {i}", "finite numbers")
    return [float(one) for one in value]
