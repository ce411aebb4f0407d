"""What every judge promises. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from prefopt.types import Judgement, Question


class Judge(Protocol):
    """Says how good responses are."""

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """One judgement per question, of as many responses as it has, in order.

        What fails for one response is NaN and counted in the judgement's `problems`.
        Raises: RoundError when the judge as a whole cannot answer (a server that is gone, a function that raises).
        """

    def describe(self) -> dict[str, Any]:
        """What decides its judgements: kind, model and its hash, template, settings."""

    def close(self) -> None:
        """Free what it holds."""
