"""Errors that a user can cause: one line with the place, what was found, what was expected and the nearest fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from prefopt.redaction import printable

_LONGEST = 4000  # characters of an error's line; a longer one quotes a value that is not worth reading


class PrefoptError(Exception):
    """An error that a user can fix; commands print it as one line, without a traceback, and exit with status 2.

    Its text is that line, with secrets removed and control characters, including line breaks, escaped.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > _LONGEST:
            text = printable(text)
            text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
        return printable(text)


class ConfigError(PrefoptError):
    """A setting is unknown, malformed or in conflict with another one."""


class DataError(PrefoptError):
    """A data file or one of its examples cannot be used."""


class TrainError(PrefoptError):
    """A run cannot start, resume or be saved."""


class RendezvousError(TrainError):
    """The ranks of a run did not find each other; each prints the error, since rank 0 may be missing."""


class RoundError(PrefoptError):
    """A stage of a round cannot start or resume, or its files are damaged."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion to append to an error, `; did you mean 'x'?`; empty where no known word is similar."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
