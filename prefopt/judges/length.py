"""The shorter response is better: a baseline that any judge worth asking must beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefopt.types import Judgement, Question


class LengthJudge:
    """Scores a response by minus its characters."""

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """See `Judge`."""
        return [
            Judgement(scores=tuple(-float(len(response.text)) for response in question.responses))
            for question in questions
        ]

    def describe(self) -> dict[str, Any]:
        """See `Judge`."""
        return {"kind": "length", "better": "shorter, in characters"}

    def close(self) -> None:
        """Nothing is held."""
