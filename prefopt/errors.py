"""Errors that a user can cause: one line that says where, what was found, what was expected and the nearest mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from prefopt.redaction import printable

_LONGEST = 4000  # characters of a line; what is longer holds a value that nobody reads


class PrefoptError(Exception):
    """Anything a user can mend; entry points print it as one line, without a traceback, and exit with 2.

    Its text is that line: without secrets, and with control characters, line breaks among them, as escapes.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > _LONGEST:
            text = printable(text)
            text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
        return printable(text)


class ConfigError(PrefoptError):
    """A setting is unknown, malformed or in conflict with another."""


class DataError(PrefoptError):
    """A file or a row cannot be used."""


class TrainError(PrefoptError):
    """A run cannot start, continue or be saved."""


class RendezvousError(TrainError):
    """The processes of a run did not come together; each says it, since there may be no first one that could."""


class RoundError(PrefoptError):
    """A stage of a round cannot start, continue or be trusted."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion to append to an error, `; did you mean 'x'?`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
