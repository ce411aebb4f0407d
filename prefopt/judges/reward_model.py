"""A classifier with one logit as judge: it scores prompt and response, which it reads as in its training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from prefopt.config import ModelConfig
from prefopt.data.comparison import plain_text
from prefopt.data.encode import BadRow, CutPair, Encoder, pad_token
from prefopt.data.rows import Messages
from prefopt.engine import adapters, models
from prefopt.errors import DataError, RoundError, TrainError
from prefopt.types import Judgement, PairRow, Question

KEY = "judge.path"
_FAR = 10**6  # tokenizers say so of a length that nobody has named


class Classifier:
    """A classifier and its tokenizer: sequences of ids in, a number for each out.

    Args:
        path: a folder or hub id of a model, or an adapter of one.
        max_length: most tokens of a sequence; None: what the model takes.
        kind: from a config to the class of its model, None where transformers knows it.
        batch: sequences per forward pass.
        trust_remote_code: whether code that comes with the weights may run; then the output's `score` is read if it
            has one, as ArmoRM's has.

    Raises: TrainError for what is no classifier with one logit; DataError for a length that it cannot have.
    """

    def __init__(
        self,
        path: str,
        *,
        device: torch.device,
        max_length: int | None = None,
        batch: int = 16,
        trust_remote_code: bool = False,
        kind: Callable[[Any], Any] = lambda config: None,
    ) -> None:
        settings = ModelConfig(trust_remote_code=trust_remote_code)
        weights = adapters.find(path, settings, KEY)
        config = models.load_config(weights.base, weights.base_settings(settings), KEY)
        if device.type == "cuda" and config.dtype in (torch.bfloat16, torch.float16):
            settings = dataclasses.replace(settings, dtype="bfloat16")
        self.path, self.device, self.batch, self.config, self._kind = path, device, batch, config, kind
        self.fingerprint = models.fingerprint(path, config)
        where, its_settings = adapters.tokenizer_path(weights, settings)
        self.tokenizer: Any = models.load_tokenizer(where, its_settings, key=KEY)
        self.tokenizer.pad_token_id, _ = pad_token(self.tokenizer)
        self.max_length = self._limit(config, max_length)
        self.lm: Any = self._open(config, weights, settings).to(device).eval()
        text = adapters.base_of(self.lm).config.get_text_config()
        # an adapter's base may say of EOS that it pads, and the adapter was trained to read it
        self._pads = None if weights.adapter is not None else text.pad_token_id
        self._text = text

    def _open(self, config: Any, weights: adapters.Weights, settings: ModelConfig) -> nn.Module:
        if weights.adapter is not None:
            if weights.adapter.task_type != adapters.CLASSIFIER:
                raise TrainError(f"{KEY}: '{self.path}' is an adapter of a language model, expected a classifier's")
            return adapters.load_frozen(weights, settings, KEY)
        if not settings.trust_remote_code:
            models.check_scorer(config, self.path, KEY)
        return models.load_classifier(self.path, settings, KEY, self._kind(config))

    def _limit(self, config: Any, asked: int | None) -> int:
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
        most = min(positions, self.tokenizer.model_max_length)
        if asked is None:
            if most >= _FAR:
                raise DataError(f"judge.max_length: found none, and '{self.path}' names no limit; expected a number")
            return int(most)
        if asked > positions:
            raise DataError(f"judge.max_length: found {asked}, and '{self.path}' has {positions} positions")
        return asked

    @torch.no_grad()
    def scores(self, sequences: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None) -> list[float]:
        """The score of each sequence of ids, in order. They are batched by length; a batch is padded on the right.

        Args: types: of the tokens, for encoders that tell two texts apart by them.
        """
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
        found = [math.nan] * len(sequences)
        for begin in range(0, len(order), self.batch):
            mine = order[begin : begin + self.batch]
            rows = [list(sequences[i]) for i in mine]
            pad = self._pads if self._pads is not None else _unused(rows, self._text.vocab_size)
            inputs = {"input_ids": _filled(rows, pad), "attention_mask": _filled([[1] * len(row) for row in rows], 0)}
            if types is not None:
                inputs["token_type_ids"] = _filled([list(types[i]) for i in mine], 0)
            self._text.pad_token_id = pad  # by which transformers finds the last token of each row
            output = self.lm(**{name: value.to(self.device) for name, value in inputs.items()})
            values = self._values(output)
            for i, value in zip(mine, values.float().tolist(), strict=True):
                found[i] = value
        return found

    def _values(self, output: Any) -> torch.Tensor:
        """(rows,)"""
        score = getattr(output, "score", None)
        values = output.logits if score is None else score
        if values.ndim == 2 and values.shape[1] != 1:
            raise RoundError(f"{KEY}: '{self.path}' gives {values.shape[1]} numbers for a text, expected one")
        return values.reshape(-1)

    def describe(self) -> dict[str, Any]:
        """What decides its scores."""
        return {"path": self.path, "sha256": self.fingerprint, "max_length": self.max_length}

    def close(self) -> None:
        """Free the model."""
        self.lm = None


def _filled(rows: list[list[int]], pad: int) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])


def _unused(rows: list[list[int]], vocabulary: int) -> int:
    """An id that stands in none of these rows, so that whoever looks for padding finds padding alone."""
    used = {token for row in rows for token in row}
    return next(token for token in range(vocabulary) if token not in used)


class _Apart(Encoder):
    """As in training; but where prompt and response merge into one token each is tokenised alone, as it was sampled."""

    def _side(self, key: str, side: Any, parts: list[list[int]]) -> tuple[list[int], list[int], list[bool]]:
        prompt, whole = parts[0], parts[-1]
        if whole[: len(prompt)] != prompt:
            parts = [prompt, prompt + self._tokenize([side.text[len(side.prompt) :]])[0]]
        return super()._side(key, side, parts)


class RewardModelJudge:
    """Scores responses by a classifier with one logit.

    A decoder reads a conversation through its own chat template and plain text as it stands, with its terminator; an
    encoder, whose tokenizer has a CLS token, reads them as its tokenizer joins two texts. What cannot be read (an empty
    response, a terminator inside) is `unreadable`; what is cut is `truncated`, and scored.

    Args: classifier: opened.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.joins = classifier.tokenizer.cls_token_id is not None
        self.encoder = _Apart(classifier.tokenizer, classifier.max_length)

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """See `Judge`."""
        asked = [(question, response.text) for question in questions for response in question.responses]
        read = self._join(asked) if self.joins else self._encode(asked)
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
        """(ids or None, types of tokens, whether something was cut) of each."""
        out: list[tuple[Any, Any, bool]] = []
        tokenizer, most = self.classifier.tokenizer, self.classifier.max_length
        typed = getattr(self.classifier.config, "type_vocab_size", 0) > 1
        for question, text in asked:
            if not text.strip():
                out.append((None, None, False))
                continue
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
