"""A classifier that reads two responses at once as judge: it is asked of every pair, in both orders."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from prefopt.data.comparison import BothOrders, plain_text
from prefopt.data.rows import BadRow, Messages
from prefopt.judges.reward_model import Classifier
from prefopt.types import Judgement, PairRow, Question

Comparison = tuple[str | Messages, str, str]  # prompt, one response, the other
# For each comparison: its sequence of ids in either order, or None; and whether something was cut.
Encode = Callable[[Sequence[Comparison]], list[tuple[tuple[list[int], list[int]] | None, bool]]]


def encode_both(encoder: BothOrders) -> Encode:
    """As `BothOrders` reads pairs in training."""

    def encode(asked: Sequence[Comparison]) -> list[tuple[tuple[list[int], list[int]] | None, bool]]:
        rows = (PairRow(plain_text(prompt), one, other, {}, "") for prompt, one, other in asked)
        out: list[tuple[tuple[list[int], list[int]] | None, bool]] = []
        for found in encoder.rows(rows):
            if isinstance(found, BadRow):
                out.append((None, False))
                continue
            pair = found.pair
            assert pair.rejected_ids is not None
            both = ([*pair.prompt_ids, *pair.chosen_ids], [*pair.prompt_ids, *pair.rejected_ids])
            out.append((both, found.cut_prompt or found.cut_completion))
        return out

    return encode


class PairwiseJudge:
    """Gives the logit that a response is better than another, for each two responses in each order.

    Two responses of the same text are not asked about: neither is better. What cannot be read (an empty response, a
    terminator inside) is `unreadable`; what is cut is `truncated`; both count comparisons.

    Args: classifier: opened. encode: how it reads.
    """

    def __init__(self, classifier: Classifier, encode: Encode) -> None:
        self.classifier, self.encode = classifier, encode

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """See `Judge`."""
        places = [
            (number, i, j)
            for number, question in enumerate(questions)
            for i, j in combinations(range(len(question.responses)), 2)
            if question.responses[i].text != question.responses[j].text
        ]
        asked = [
            (questions[n].prompt, questions[n].responses[i].text, questions[n].responses[j].text) for n, i, j in places
        ]
        read = self.encode(asked)
        scores = iter(self.classifier.scores([ids for both, _ in read if both is not None for ids in both]))
        tables = [[[0.0] * len(q.responses) for _ in q.responses] for q in questions]
        problems: list[dict[str, int]] = [{} for _ in questions]
        for (n, i, j), (both, cut) in zip(places, read, strict=True):
            first, second = (next(scores), next(scores)) if both is not None else (math.nan, math.nan)
            wrong = both is not None and not (math.isfinite(first) and math.isfinite(second))
            tables[n][i][j], tables[n][j][i] = (first, second) if not wrong else (math.nan, math.nan)
            for name, counts in (("unreadable", both is None), ("truncated", cut), ("nan", wrong)):
                if counts:
                    problems[n][name] = problems[n].get(name, 0) + 1
        return [
            Judgement(logits=tuple(tuple(row) for row in table), problems=counts)
            for table, counts in zip(tables, problems, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        """See `Judge`."""
        return {"kind": "pairwise", **self.classifier.describe()}

    def close(self) -> None:
        """Free the model."""
        self.classifier.close()
