"""What every inference engine promises, and what a file of this folder declares to be one. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from prefopt.errors import RoundError
from prefopt.settings import GenerateConfig, ModelConfig
from prefopt.storage import text_number
from prefopt.types import Completion

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        n: completions per prompt.
        temperature: softmax temperature; 0 takes the most likely token. Below 1e-5 it is 0: logits divided by less
            overflow.
        top_p, top_k: nucleus and top-k sampling; 1 and 0 sample from the whole distribution.
        max_tokens: most tokens per completion, the EOS or end-of-turn token included.
        stop: texts that end a completion beside the model's own EOS and end-of-turn tokens.
        logprobs: whether the log-probability of each token is returned.
    """

    n: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    logprobs: bool = False

    def __post_init__(self) -> None:
        if self.temperature < 1e-5:
            object.__setattr__(self, "temperature", 0.0)

    @classmethod
    def of(cls, settings: GenerateConfig, **changed: Any) -> Sampling:
        """Those of the settings, but for what is named."""
        names = ("n", "temperature", "top_p", "top_k", "max_tokens", "stop", "logprobs")
        return cls(**{name: getattr(settings, name) for name in names} | changed)


# Called with the index of a prompt and its completions, as soon as these are known.
Done = Callable[[int, list[Completion]], None]


class Engine(Protocol):
    """An inference engine with a policy: it samples completions of prompts.

    `context` is how many positions the model has for a prompt and its answer, None where it has no end.
    """

    context: int | None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        done: Done | None = None,
    ) -> list[list[Completion]]:
        """`sampling.n` completions of each prompt, in order.

        Args:
            prompts: token ids.
            seeds: one per prompt, at least `n` apart: completion i draws with seed + i.
            done: called once for each prompt as soon as its completions are known, in any order and maybe from several
                threads at once, so that they can be written before all others are known. What it raises ends the call.
        Raises: RoundError when the engine returns fewer than requested, or cannot be reached.
        """

    def describe(self) -> dict[str, Any]:
        """What decides its completions beside prompts, sampling and seeds: name, versions, precision."""

    def close(self) -> None:
        """Free what it holds."""


@dataclass(frozen=True)
class PolicySource:
    """The policy that an inference engine is to have.

    Args:
        path: where it lies, a model or an adapter of one.
        load: loads it into this process.
        model: the settings with which it is loaded.
        tokenizer: its tokenizer.
    """

    path: str
    load: Callable[[], nn.Module]
    model: ModelConfig
    tokenizer: Any


class EngineKind:
    """An inference engine that `generate.engine` can name: one file NAME_engine.py of this folder with one subclass.

    A subclass defines `open`, and `generate`, `describe` and `close` of `Engine`.
    """

    reads: ClassVar[tuple[str, ...]] = ()  # settings of the group `generate` that not every engine reads
    in_ranks: ClassVar[bool] = False  # whether it can run inside the ranks of a training run

    @classmethod
    def check(cls, settings: GenerateConfig) -> None:
        """Refuse what can be refused before anything is loaded. Raises: ConfigError naming the setting."""

    @classmethod
    def inputs(cls, settings: GenerateConfig) -> list[Any] | None:
        """The settings in `reads` that completions depend on, by rounding at least; those of another are not reused."""
        return None

    @classmethod
    def open(cls, settings: GenerateConfig, policy: PolicySource) -> Engine:
        """The engine, ready to answer. Raises: RoundError or TrainError when it cannot be opened."""
        raise NotImplementedError(f"{cls.__name__} must define open(settings, policy)")


def limits(prompts: Sequence[Sequence[int]], context: int | None, max_tokens: int) -> list[int]:
    """Most tokens of an answer to each prompt: `max_tokens`, or what the model has positions left for.

    Args: context: positions of the model, None where it has no end.
    Raises: RoundError for a prompt that leaves none, or that has no token.
    """
    if not all(len(prompt) for prompt in prompts):
        raise RoundError("generate: found a prompt without a token, expected at least one (BOS)")
    if context is None:
        return [max_tokens] * len(prompts)
    room = [context - len(prompt) for prompt in prompts]
    if min(room, default=1) < 1:
        raise RoundError(
            f"generate: {sum(left < 1 for left in room)} of {len(prompts)} prompts fill the model's {context} "
            f"positions (the longest has {max(map(len, prompts))} tokens), expected room for an answer "
            "(lower data.max_length)"
        )
    return [min(max_tokens, left) for left in room]


def seeds_of(seed: int, round_: int | str, shard: int, prompts: int, n: int) -> list[int]:
    """The seed of each prompt of a shard, `n` apart: a function of (run, round, shard) and nothing else."""
    base = text_number(f"{seed}:{round_}:{shard}")
    return [base % (2**31 - prompts * n) + i * n for i in range(prompts)]
