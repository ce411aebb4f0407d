"""Numbers for people: no exponent where digits can be read."""

import math
import re
from pathlib import Path

import pytest

from prefopt.figures import aligned, readable

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.5, "-0.5"),
        (1220.0, "1220"),
        (9999.7, "10,000"),
        (12345.6, "12,346"),
        (-1234567.0, "-1,234,567"),
        (0.00012, "0.00012"),
        (2.5e-6, "2.5e-6"),
        (1e-6, "1e-6"),
        (9.99996e-5, "0.0001"),
        (1e20, "1e20"),
        (12, "12"),
        (1234567, "1,234,567"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_number_when_a_person_reads_it_then_it_has_an_exponent_only_where_digits_cannot_be_read(value, text):
    assert readable(value) == text
    if value and math.isfinite(value):
        assert float(text.replace(",", "")) == pytest.approx(value, rel=1e-3)


def test_number_when_fewer_digits_are_asked_for_then_large_ones_have_no_exponent_either():
    assert [readable(value, 2) for value in (1220.0, 0.1234, 99.6)] == ["1220", "0.12", "100"]


def test_aligned_when_cells_differ_in_length_then_columns_line_up():
    assert aligned([["a", "long"], ["longer", "b"]]) == ["a       long", "longer     b"]


def test_no_room_formats_a_number_of_any_size_by_significant_digits_itself():
    """`.3g` and `.4g` write 1.22e+03. What is bounded (a fraction, gigabytes) may use them in these files, and FLOP."""
    bounded = {
        "planner",
        "sweeps",
        "training/layout_choice.py",
        "training/preflight.py",
        "training/reference.py",
        "data/mixture.py",
        "figures.py",
    }
    found = [
        f"{path.relative_to(ROOT)}:{number_}"
        for path in sorted((ROOT / "prefopt").rglob("*.py"))
        if not {path.parent.name, path.relative_to(ROOT / "prefopt").as_posix()} & bounded
        for number_, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r":,?\.\d+g\}", line) and "flops" not in line
    ]
    assert found == []
