"""Figures of a plan as text."""

from __future__ import annotations

from prefopt.planner.memory import GB


def gigabytes(size: float) -> str:
    """Bytes in GB, to one decimal where that is not 0.0."""
    return f"{size / GB:,.1f}" if size >= 0.05 * GB or size == 0 else number(size / GB)


def number(value: float) -> str:
    """Three significant digits, never with an exponent."""
    if value >= 999.5:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 1e-4 or value == 0 else f"{value:.10f}".rstrip("0").rstrip(".") or "0"


def span(values: tuple[float, float]) -> str:
    """A range, `LOW to HIGH`."""
    return f"{number(values[0])} to {number(values[1])}"
