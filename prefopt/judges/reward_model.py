"""A classifier with one logit as judge: it scores prompt and response, which it reads as in its training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from prefopt.data.comparison import plain_text
from prefopt.data.encoder import CutPair, Encoder, pad_token
from prefopt.data.rows import BadRow, Messages
from prefopt.errors import DataError, RoundError, TrainError
from prefopt.settings import ModelConfig
from prefopt.training import adapter_loading, adapters, model_hashes, model_sources, models
from prefopt.training.versions import versions
from prefopt.types import Judgement, PairRow, Question

KEY = "judge.path"
_FAR = 10**6  # tokenizers say so of a length that nobody has named


class Classifier:
    """A classifier and its tokenizer: sequences of ids in, a number for each out.

    Args:
        path: a folder or hub id of a model, or an adapter of one.
        max_length: most tokens of a sequence; None: what the model takes.
        kind: from a config to the class of its model, None where transformers knows it; its `most_tokens` is then how
            many it reads.
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
        weights = model_sources.find(path, settings, KEY)
        config = models.load_config(weights.base, weights.base_settings(settings), KEY)
        settings = dataclasses.replace(settings, dtype=dtype_on(device, config))
        self.path, self.device, self.batch, self.config, self._kind = path, device, batch, config, kind
        self.fingerprint = model_hashes.fingerprint(path, config)
        self.tokenizer: Any = _tokenizer(weights, settings)
        self.tokenizer.pad_token_id, _ = pad_token(self.tokenizer)
        self.max_length = self._limit(config, max_length)
        self.lm: Any = self._open(config, weights, settings).to(device).eval()
        self.max_length = self._limit(config, max_length, _reserved(self.lm))
        base = adapters.base_of(self.lm)
        self.dtype, text = str(base.dtype).removeprefix("torch."), base.config.get_text_config()
        # an adapter's base may say of EOS that it pads, and the adapter was trained to read it
        self._pads = None if weights.adapter is not None else text.pad_token_id
        self._text = text

    def _open(self, config: Any, weights: model_sources.ModelSource, settings: ModelConfig) -> nn.Module:
        if weights.adapter is not None:
            if weights.adapter.task_type != adapters.CLASSIFIER:
                raise TrainError(f"{KEY}: '{self.path}' is an adapter of a language model, expected a classifier's")
            return adapter_loading.load_frozen(weights, settings, KEY)
        if not settings.trust_remote_code:
            models.check_scorer(config, self.path, KEY)
        return models.load_classifier(self.path, settings, KEY, self._kind(config))

    def _limit(self, config: Any, asked: int | None, reserved: int = 0) -> int:
        """Most tokens of a sequence. Args: reserved: positions in the model's table that no token has."""
        text = config.get_text_config()
        named = getattr(text, "max_position_embeddings", None) or math.inf
        # DeBERTa's kind may have relative positions alone, and no table of them that would end
        table = named - reserved if getattr(text, "position_biased_input", True) else math.inf
        own = getattr(self._kind(config), "most_tokens", math.inf)
        most = min(table, own)
        if asked is not None:
            if asked > most:
                raise DataError(f"judge.max_length: found {asked}, and '{self.path}' takes at most {most} tokens")
            return asked
        if own == math.inf:
            most = min(most, self.tokenizer.model_max_length)
        if most >= _FAR:
            most = named
        if most >= _FAR:
            raise DataError(f"judge.max_length: found none, and '{self.path}' names no limit; expected a number")
        return int(most)

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
        found = versions()
        return {
            "path": self.path,
            "sha256": self.fingerprint,
            "max_length": self.max_length,
            "dtype": self.dtype,
            "device": self.device.type,
            "versions": {name: found[name] for name in ("torch", "transformers", "tokenizers", "peft")},
        }

    def close(self) -> None:
        """Free the model."""
        self.lm = None


def dtype_on(device: torch.device, config: Any) -> Any:
    """The name of the dtype to open a classifier in: its own, if that is of 16 bits and the device has units for it."""
    own = device.type == "cuda" and config.dtype in (torch.bfloat16, torch.float16)
    return str(config.dtype).removeprefix("torch.") if own else "float32"


def _reserved(lm: nn.Module) -> int:
    """Positions that no token has: RoBERTa's kind begins to count behind the id that pads."""
    tables = [
        m for name, m in lm.named_modules() if name.endswith("position_embeddings") and isinstance(m, nn.Embedding)
    ]
    return max((table.padding_idx + 1 for table in tables if table.padding_idx is not None), default=0)


def check_weights(path: str, trust_remote_code: bool, kind: Callable[[Any], Any] = lambda config: None) -> None:
    """Refuse a classifier whose files are not those of one, before anything is sampled; adapters and a model's own code
    are left to `Classifier`.

    Args: as `Classifier`. Raises: TrainError.
    """
    settings = ModelConfig(trust_remote_code=trust_remote_code)
    weights = model_sources.find(path, settings, KEY)
    if weights.adapter is None and not trust_remote_code:
        config = models.load_config(path, settings, KEY)
        models.check_scorer(config, path, KEY)
        models.check_classifier(path, settings, KEY, kind(config))


def check_conversations(path: str, trust_remote_code: bool) -> None:
    """Whether the classifier at `path` can read conversations, from its small files. Raises: DataError, TrainError."""
    settings = ModelConfig(trust_remote_code=trust_remote_code)
    _check_template(_tokenizer(model_sources.find(path, settings, KEY), settings), path)


def _check_template(tokenizer: Any, path: str) -> None:
    if not joins(tokenizer) and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{KEY}: the prompts are conversations and the tokenizer of '{path}' has no chat template, expected a "
            "classifier that was trained on conversations (put its chat_template.jinja beside it)"
        )


def _tokenizer(weights: model_sources.ModelSource, settings: ModelConfig) -> Any:
    return models.load_tokenizer(*model_sources.tokenizer_path(weights, settings), key=KEY)


def joins(tokenizer: Any) -> bool:
    """Whether a tokenizer is an encoder's, which reads prompt and response as two texts."""
    return tokenizer.cls_token_id is not None


def _filled(rows: list[list[int]], pad: int) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])


def _unused(rows: list[list[int]], vocabulary: int) -> int:
    """An id that stands in none of these rows, so that whoever looks for padding finds padding alone."""
    used = {token for row in rows for token in row}
    return next(token for token in range(vocabulary) if token not in used)


class _Apart(Encoder):
    """As in training; but where prompt and response merge into one token each is tokenised alone, as it was sampled."""

    splits_text = True


class RewardModelJudge:
    """Scores responses by a classifier with one logit.

    A decoder reads a conversation through its own chat template and plain text as it stands, with its terminator; an
    encoder, whose tokenizer has a CLS token, reads them as its tokenizer joins two texts. What cannot be read (a
    response of white space alone, a terminator inside) is `unreadable`; what is cut is `truncated`, and scored.

    Args: classifier: opened.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.joins = joins(classifier.tokenizer)
        self.encoder = _Apart(classifier.tokenizer, classifier.max_length)

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """See `Judge`. Raises: DataError for conversations that it has no chat template for."""
        if any(not isinstance(question.prompt, str) for question in questions):
            _check_template(self.classifier.tokenizer, self.classifier.path)
        asked = [(question, response.text) for question in questions for response in question.responses]
        said = [(question, text) for question, text in asked if text.strip()]
        told = iter(self._join(said) if self.joins else self._encode(said))
        read: list[tuple[Any, Any, bool]] = [next(told) if text.strip() else (None, None, False) for _, text in asked]
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
