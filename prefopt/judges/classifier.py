"""A classifier with one logit and its tokenizer, for judges that are made of one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from prefopt.data.encoder import pad_token
from prefopt.data.rows import Messages
from prefopt.errors import ConfigError, DataError, RoundError, TrainError
from prefopt.judges.base import JudgeContext
from prefopt.settings import JudgeConfig, ModelConfig
from prefopt.training import adapter_loading, adapters, model_hashes, model_sources, models, weight_files
from prefopt.training.versions import versions

KEY = "judge.path"
Comparison = tuple[str | Messages, str, str]  # prompt, one response, the other
_FAR = 10**6  # tokenizers give a larger number where they have no limit


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
        # an adapter's base may pad with EOS, and the adapter was trained to read EOS
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
        # models such as DeBERTa may have relative positions alone, and no table that limits them
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

        Args: types: of the tokens, for encoders that distinguish two texts by them.
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
    """The name of the dtype to open a classifier in: its own, if that is of 16 bits and the device computes in it."""
    own = device.type == "cuda" and config.dtype in (torch.bfloat16, torch.float16)
    return str(config.dtype).removeprefix("torch.") if own else "float32"


def _reserved(lm: nn.Module) -> int:
    """Positions that no token has: models such as RoBERTa begin to count after the padding index."""
    tables = [
        m for name, m in lm.named_modules() if name.endswith("position_embeddings") and isinstance(m, nn.Embedding)
    ]
    return max((table.padding_idx + 1 for table in tables if table.padding_idx is not None), default=0)


def check_conversations(path: str, trust_remote_code: bool) -> None:
    """Whether the classifier at `path` can read conversations, from its small files. Raises: DataError, TrainError."""
    settings = ModelConfig(trust_remote_code=trust_remote_code)
    check_template(_tokenizer(model_sources.find(path, settings, KEY), settings), path)


def check_template(tokenizer: Any, path: str) -> None:
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
    """An id that occurs in none of these sequences, so that a search for padding finds padding alone."""
    used = {token for row in rows for token in row}
    return next(token for token in range(vocabulary) if token not in used)


class ClassifierKind:
    """The half of a `JudgeKind` that judges made of a classifier have in common."""

    reads: ClassVar[tuple[str, ...]] = ("path", "reward_scale", "batch", "max_length", "trust_remote_code")

    @staticmethod
    def model_class(config: Any) -> Any:
        """The class of the model of a config, where transformers has none; None where it has one."""
        return None

    @classmethod
    def check(cls, settings: JudgeConfig) -> None:
        """See `JudgeKind`."""
        if settings.path is None:
            raise ConfigError(f"{KEY}: found none, expected the folder or hub id of a classifier with one logit")
        if settings.max_length is not None and settings.max_length < 2:
            raise ConfigError(f"judge.max_length: found {settings.max_length}, expected at least 2")
        weight_files.check_path(KEY, settings.path)

    @classmethod
    def check_weights(cls, settings: JudgeConfig) -> None:
        """See `JudgeKind`. Adapters and a model's own code are left to `Classifier`."""
        assert settings.path is not None
        model = ModelConfig(trust_remote_code=settings.trust_remote_code)
        weights = model_sources.find(settings.path, model, KEY)
        if weights.adapter is None and not settings.trust_remote_code:
            config = models.load_config(settings.path, model, KEY)
            models.check_scorer(config, settings.path, KEY)
            models.check_classifier(settings.path, model, KEY, cls.model_class(config))

    @classmethod
    def content(cls, settings: JudgeConfig) -> list[Any]:
        """See `JudgeKind`: the weights, where they are a folder."""
        local = settings.path is not None and Path(settings.path).is_dir()
        return [model_hashes.fingerprint(str(settings.path), None)] if local else []

    @classmethod
    def open_classifier(cls, settings: JudgeConfig, context: JudgeContext) -> Classifier:
        """The classifier that the settings name, opened."""
        assert settings.path is not None
        return Classifier(
            settings.path,
            device=context.device,
            max_length=settings.max_length,
            batch=settings.batch,
            trust_remote_code=settings.trust_remote_code,
            kind=cls.model_class,
        )
