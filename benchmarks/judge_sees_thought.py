"""Thought PO as it would be if the judge saw thoughts too: for the study of what hiding them is worth."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.methods.thought_po import ThoughtPO
from prefopt.types import Response


@dataclass(frozen=True)
class JudgeSeesThought(ThoughtPO):
    """Hands the judge all that was written, where it holds a response."""

    def judge_view(self, text: str) -> Response | str:
        seen = super().judge_view(text)
        return seen if isinstance(seen, str) else Response(text)
