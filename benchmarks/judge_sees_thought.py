"""A variant of thought PO whose judge sees thoughts too, for the study of the effect of hiding them."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.methods.thought_po import ThoughtPO
from prefopt.types import Response


@dataclass(frozen=True)
class JudgeSeesThought(ThoughtPO):
    """Passes the whole completion to the judge, if it contains a response."""

    def judge_view(self, text: str) -> Response | str:
        seen = super().judge_view(text)
        return seen if isinstance(seen, str) else Response(text)
