"""Where a completion ends, and its text: the same for every inference engine that returns tokens. Knows no model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from prefopt.data import structure
from prefopt.settings import ModelConfig
from prefopt.types import Completion

if TYPE_CHECKING:
    from prefopt.training.model_sources import ModelSource


def end_tokens(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """The EOS and end-of-turn tokens of a model: those of its generation config, and those of training.

    The latter are the tokenizer's EOS, and the chat template's own end-of-turn token where that is another.
    """
    named = getattr(generation_config, "eos_token_id", None)
    named = named if isinstance(named, (list, tuple)) else [named]
    return structure.completion_end_tokens(tokenizer) | {int(token) for token in named if token is not None}


def end_tokens_of(weights: ModelSource, model: ModelConfig, tokenizer: Any) -> frozenset[int]:
    """The same of a model that is not in this process, from its small files."""
    from transformers import GenerationConfig

    from prefopt.training.models import load_config

    settings = weights.base_settings(model)
    try:
        named = GenerationConfig.from_pretrained(weights.base, revision=settings.revision or "main")
    except OSError:  # it has none, and its config is used
        named = GenerationConfig.from_model_config(load_config(weights.base, settings))
    return end_tokens(named, tokenizer)


def positions_of(weights: ModelSource, model: ModelConfig) -> int | None:
    """Positions of a model that is not in this process; None where its config names none."""
    from prefopt.training.models import load_config

    config = load_config(weights.base, weights.base_settings(model))
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def vocabulary_of(weights: ModelSource, model: ModelConfig) -> int:
    """The number of token ids of a model that is not in this process."""
    from prefopt.training.model_checks import vocabulary_size
    from prefopt.training.models import load_config

    return vocabulary_size(load_config(weights.base, weights.base_settings(model)))


class Ends:
    """Ends of completions.

    Args:
        tokenizer: one of transformers'.
        end_tokens: token ids that end a completion.
        stop: texts that end one. A text that is one of the tokenizer's special tokens ends it by its id, because
            special tokens have no text.
    """

    def __init__(self, tokenizer: Any, end_tokens: Iterable[int], stop: Sequence[str] = ()) -> None:
        special = {str(token): id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.tokenizer = tokenizer
        self.tokens = frozenset(end_tokens) | {special[text] for text in stop if text in special}
        self.texts = tuple(text for text in stop if text not in special)
        # A token has at least one byte, so a stop text just completed lies within so many tokens; a few more, since
        # the first of them may decode to less alone than after its neighbours.
        self._window = max((len(text.encode()) for text in self.texts), default=0) + 4

    def reached(self, ids: Sequence[int]) -> bool:
        """Whether the last of these tokens completes an end token or a stop text."""
        if ids[-1] in self.tokens:
            return True
        if not self.texts or self._stopped(self.text(ids[-self._window :])) is None:
            return False
        return self._stopped(self.text(ids)) is not None

    def completion(
        self, ids: Sequence[int], logps: Sequence[float] | None = None, *, stopped: bool | None = None
    ) -> Completion:
        """What was generated, with its text and the reason for its end.

        Args: stopped: whether an inference engine reports that it ended by itself, where these ends do not show it.
        """
        ended = bool(ids) and ids[-1] in self.tokens
        text = self.text(ids[:-1] if ended else ids)
        at = self._stopped(text)
        return Completion(
            token_ids=tuple(ids),
            text=text if at is None else text[:at],
            finish_reason="stop" if ended or at is not None or stopped else "length",
            logps=None if logps is None else tuple(logps),
        )

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _stopped(self, text: str) -> int | None:
        """Where the first stop text begins, or None."""
        found = [at for at in (text.find(stop) for stop in self.texts) if at >= 0]
        return min(found, default=None)
