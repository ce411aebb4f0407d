"""What every engine promises. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prefopt.config import GenerateConfig
from prefopt.types import Completion


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        n: completions per prompt.
        temperature: of the softmax; 0 takes the most likely token.
        top_p, top_k: what of the distribution is kept; 1 and 0 keep all of it.
        max_tokens: most tokens per completion, the terminator included.
        stop: texts that end a completion beside the model's own terminators.
        logprobs: whether the log-probability of each token is wanted.
    """

    n: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    logprobs: bool = False

    @classmethod
    def of(cls, settings: GenerateConfig, **changed: Any) -> Sampling:
        """Those of the settings, but for what is named."""
        names = ("n", "temperature", "top_p", "top_k", "max_tokens", "stop", "logprobs")
        return cls(**{name: getattr(settings, name) for name in names} | changed)


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do, so that what it cannot is refused before it starts.

    Args:
        seeded: the same seed gives the same completion, whatever else is generated beside it.
        logprobs: it can give the log-probability of each token.
        token_ids: it gives the very tokens; otherwise they are the text's, encoded again.
        in_ranks: it can run inside the processes of a training run.
    """

    seeded: bool
    logprobs: bool
    token_ids: bool
    in_ranks: bool


class Engine(Protocol):
    """A policy that answers."""

    capabilities: Capabilities

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """`sampling.n` completions of each prompt, in order.

        Args: prompts: token ids. seeds: one per prompt, at least `n` apart: completion i draws with seed + i.
        Raises: RoundError when the engine gives fewer than were asked for, or cannot be reached.
        """

    def describe(self) -> dict[str, Any]:
        """What decides its completions beside prompts, sampling and seeds: name, versions, precision."""

    def close(self) -> None:
        """Free what it holds."""
