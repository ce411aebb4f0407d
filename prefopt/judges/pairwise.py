"""A classifier that reads two responses at once; each pair is compared in both orders."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from prefopt.data.comparison import BothOrders, plain_text
from prefopt.data.rows import BadRow
from prefopt.judges import pairrm
from prefopt.judges.base import Judge, JudgeContext, JudgeKind
from prefopt.judges.classifier import Classifier, ClassifierKind, Comparison
from prefopt.settings import JudgeConfig
from prefopt.types import Judgement, PairRow, Question

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


class PairwiseJudge(ClassifierKind, JudgeKind):
    """Gives the logit that a response is better than another, for each two responses in each order.

    Two responses of the same text are not asked about: neither is better. What cannot be read (an empty response, an
    end-of-turn token inside) is `unreadable`; what is cut is `truncated`; both count comparisons.

    Args: classifier: opened. encode: how it reads.
    """

    @staticmethod
    def model_class(config: Any) -> Any:
        """See `ClassifierKind`: PairRM's, which transformers does not have."""
        return pairrm.PairRM if pairrm.is_pairrm(config) else None

    @classmethod
    def open(cls, settings: JudgeConfig, context: JudgeContext) -> Judge:
        """See `JudgeKind`."""
        classifier = cls.open_classifier(settings, context)
        if pairrm.is_pairrm(classifier.config):
            encode = pairrm.encode(classifier.tokenizer, classifier.config, classifier.max_length)
        else:
            encode = encode_both(BothOrders(classifier.tokenizer, classifier.max_length))
        return cls(classifier, encode)

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
