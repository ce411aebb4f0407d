"""Formatting of numbers and tables for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

NOTHING = "-"  # shown for a value that does not exist, or would be misleading


def readable(value: float, digits: int = 4) -> str:
    """A number with `digits` significant digits: `1,220` instead of 1.22e+03, `0.0012`, and `2e-6` for small ones."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    text = f"{value:.{digits}g}"
    size = abs(float(text))
    if 1e4 > size >= 1e-4 or size == 0:
        return text if "e" not in text else f"{value:.0f}"
    if 1e16 > size >= 1e4:
        return f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column is left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
