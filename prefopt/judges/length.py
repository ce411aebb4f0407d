"""The response with fewer characters is better: a baseline for other judges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from prefopt.judges.base import JudgeKind
from prefopt.types import Judgement, Question


class LengthJudge(JudgeKind):
    """Scores a response by minus its characters."""

    reads: ClassVar[tuple[str, ...]] = ("reward_scale",)

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """See `Judge`."""
        return [
            Judgement(scores=tuple(-float(len(response.text)) for response in question.responses))
            for question in questions
        ]

    def describe(self) -> dict[str, Any]:
        """See `Judge`."""
        return {"kind": "length", "better": "shorter, in characters"}
