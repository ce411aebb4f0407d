"""A classifier with one logit: it scores prompt and response, encoded as in its training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from prefopt.data.comparison import plain_text
from prefopt.data.encoder import CutPair, Encoder
from prefopt.data.rows import BadRow, Messages
from prefopt.judges.base import Judge, JudgeContext, JudgeKind
from prefopt.judges.classifier import Classifier, ClassifierKind, check_conversations, check_template, joins
from prefopt.settings import JudgeConfig
from prefopt.types import Judgement, PairRow, Question


class _Apart(Encoder):
    """As in training; but where prompt and response merge into one token each is tokenised alone, as it was sampled."""

    splits_text = True


class RewardModelJudge(ClassifierKind, JudgeKind):
    """Scores responses by a classifier with one logit.

    A decoder reads a conversation through its own chat template and plain text as it stands, with its EOS or
    end-of-turn token; an encoder, whose tokenizer has a CLS token, reads them as its tokenizer joins two texts. What
    cannot be read (a response of white space alone, an EOS token inside) is `unreadable`; what is truncated is
    `truncated`, and scored.

    Args: classifier: opened.
    """

    @classmethod
    def check_prompts(cls, settings: JudgeConfig, prompts: Iterable[str | Messages]) -> None:
        """See `JudgeKind`: conversations need a chat template."""
        if not all(isinstance(prompt, str) for prompt in prompts):
            assert settings.path is not None
            check_conversations(settings.path, settings.trust_remote_code)

    @classmethod
    def open(cls, settings: JudgeConfig, context: JudgeContext) -> Judge:
        """See `JudgeKind`."""
        return cls(cls.open_classifier(settings, context))

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.joins = joins(classifier.tokenizer)
        self.encoder = _Apart(classifier.tokenizer, classifier.max_length)

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """See `Judge`. Raises: DataError for conversations that it has no chat template for."""
        if any(not isinstance(question.prompt, str) for question in questions):
            check_template(self.classifier.tokenizer, self.classifier.path)
        asked = [(question, response.text) for question in questions for response in question.responses]
        texts = [(question, text) for question, text in asked if text.strip()]
        encoded = iter(self._join(texts) if self.joins else self._encode(texts))
        read: list[tuple[Any, Any, bool]] = [
            next(encoded) if text.strip() else (None, None, False) for _, text in asked
        ]
        known = [i for i, (ids, _, _) in enumerate(read) if ids is not None]
        types = [read[i][1] for i in known] if known and read[known[0]][1] is not None else None
        values = [math.nan] * len(read)
        for i, value in zip(known, self.classifier.scores([read[i][0] for i in known], types), strict=True):
            values[i] = value
        judgements, at = [], 0
        for question in questions:
            mine = range(at, at := at + len(question.responses))
            problems = {
                "unreadable": sum(read[i][0] is None for i in mine),
                "truncated": sum(read[i][2] for i in mine),
                "nan": sum(read[i][0] is not None and not math.isfinite(values[i]) for i in mine),
            }
            scores = tuple(values[i] if math.isfinite(values[i]) else math.nan for i in mine)
            judgements.append(Judgement(scores=scores, problems={name: n for name, n in problems.items() if n}))
        return judgements

    def _encode(self, asked: Sequence[tuple[Question, str]]) -> list[tuple[Any, Any, bool]]:
        """(ids or None, nothing, whether something was cut) of each."""

        def ids(found: CutPair | BadRow) -> tuple[Any, Any, bool]:
            if isinstance(found, BadRow):
                return None, None, False
            pair = found.pair
            return [*pair.prompt_ids, *pair.chosen_ids], None, found.cut_prompt or found.cut_completion

        return [ids(found) for found in self.encoder.rows(_row(question.prompt, text) for question, text in asked)]

    def _join(self, asked: Sequence[tuple[Question, str]]) -> list[tuple[Any, Any, bool]]:
        """(ids, types of tokens, whether something was cut) of each."""
        out: list[tuple[Any, Any, bool]] = []
        tokenizer, most = self.classifier.tokenizer, self.classifier.max_length
        typed = getattr(self.classifier.config, "type_vocab_size", 0) > 1
        for question, text in asked:
            texts = (plain_text(question.prompt), text)
            whole = tokenizer(*texts, return_token_type_ids=typed, verbose=False)
            cut = len(whole["input_ids"]) > most
            if cut:
                whole = tokenizer(*texts, return_token_type_ids=typed, truncation=True, max_length=most)
            out.append((whole["input_ids"], whole["token_type_ids"] if typed else None, cut))
        return out

    def describe(self) -> dict[str, Any]:
        """See `Judge`."""
        return {"kind": "reward_model", **self.classifier.describe()}

    def close(self) -> None:
        """Free the model."""
        self.classifier.close()


def _row(prompt: str | Messages, text: str) -> PairRow:
    response: str | Messages = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    return PairRow(prompt, response, None, {}, "")
