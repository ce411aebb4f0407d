"""Errors of single examples: one line each, and the description of the value that was found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from prefopt.errors import DataError
from prefopt.redaction import escaped
from prefopt.types import PairRow

OnBadRow = Literal["error", "skip"]

DROP = "drop the example, or --data.on_bad_row skip"
MOST_LEVELS = 64  # nesting depth of lists and objects in the values that are read
_MOST_SHOWN = 200  # characters of a found value


@dataclass(frozen=True)
class BadRow:
    """An example that cannot be used. Reports count by `reason`; `message` is the error line."""

    where: str
    reason: str
    message: str


class RowProblem(Exception):
    """What is wrong with an example. Caught where examples are counted; users see `BadRow.message`.

    Args:
        reason: a short name, by which reports count.
        key: the key at fault, or "" for the example as a whole.
        found, expected: the two halves of the error line.
        hint: what the user can do.
    """

    def __init__(self, reason: str, key: str, found: str, expected: str, hint: str = DROP) -> None:
        super().__init__(reason)
        self.reason, self.key, self.found, self.expected, self.hint = reason, key, found, expected, hint

    def at(self, where: str) -> BadRow:
        key = f"'{short(self.key)}': " if self.key else ""
        line = f"{where}: {key}{short(self.found, 3 * _MOST_SHOWN)}, expected {short(self.expected, 5 * _MOST_SHOWN)}"
        return BadRow(where, self.reason, escaped(f"{line} ({self.hint})"))


@dataclass(frozen=True)
class Stored:
    """A value of a column with an Arrow extension type that is not decoded. Args: name: of the type."""

    name: str


def first_bad_row(row: BadRow, rest: Iterator[PairRow | BadRow]) -> DataError:
    """The error for a bad row under `on_bad_row: error`, with the number of bad rows after it in the file."""
    more = sum(isinstance(item, BadRow) for item in rest)
    return DataError(row.message + (f"; {more:,} more bad row{'s' * (more > 1)} in the file" if more else ""))


class BadRows:
    """Counts of bad rows by reason, with the places of the first ones and the message of the very first."""

    def __init__(self, examples: int) -> None:
        self.most = examples
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}
        self._first: dict[str, str] = {}

    def add(self, row: BadRow) -> None:
        self.counts[row.reason] = self.counts.get(row.reason, 0) + 1
        self._first.setdefault(row.reason, row.message)
        places = self.examples.setdefault(row.reason, [])
        if len(places) < self.most:
            places.append(row.where)

    def most_common(self) -> list[tuple[str, int]]:
        return sorted(self.counts.items(), key=lambda item: -item[1])

    def none_left(self, path: str, read: int, what: str = "is usable") -> DataError:
        """The error where every row is bad: counts by reason, and the first message of the most common reasons."""
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in self.most_common())
        first = "; ".join(self._first[reason] for reason, _ in self.most_common()[: self.most])
        return DataError(f"{path}: none of the {read:,} examples {what}: {reasons}; {first}")


def kind(value: object) -> str:
    """Description of a value, for the `found` of an error."""
    if value is None:
        return "null"
    if isinstance(value, Stored):
        return f"a value of the extension type '{value.name}', which is not decoded"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"a number of {_digits(value):,} digits"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, Decimal):
        return f"the decimal {short(str(value))}"
    names = {"str": "a string", "list": "a list", "dict": "an object", "bytes": "binary data", "tuple": "a map's entry"}
    names |= {"datetime": "a time", "date": "a date", "timedelta": "a duration"}
    return names.get(type(value).__name__, f"a {type(value).__name__}")


def _digits(value: int) -> int:
    """Number of decimal digits of an integer, which Python refuses to print beyond some thousand."""
    guess = int(abs(value).bit_length() * 0.30102999566398) + 1
    return guess if abs(value) < 10**guess and abs(value) >= 10 ** (guess - 1) else guess - 1


def short(text: str, most: int = _MOST_SHOWN) -> str:
    """A text from the data, shortened to fit into a line."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def check_text(text: str, name: str) -> None:
    """Raises: RowProblem where the text cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowProblem("invalid text", name, "half of a surrogate pair", "valid Unicode") from None


def plain(value: Any, name: str, level: int = 0) -> Any:
    """A value as JSON can represent it; other values (times, binary data) become None.

    Raises: RowProblem for invalid text, and where lists and objects are nested more than `MOST_LEVELS` deep.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        check_text(value, name)
        return value
    if not isinstance(value, list | dict):
        return None
    if level == MOST_LEVELS:
        raise RowProblem("nested too deeply", name, f"more than {MOST_LEVELS} levels", f"at most {MOST_LEVELS}")
    if isinstance(value, list):
        return [plain(item, name, level + 1) for item in value]
    return {plain(str(key), name): plain(item, name, level + 1) for key, item in value.items()}
