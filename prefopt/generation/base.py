"""What every engine promises. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prefopt.errors import RoundError
from prefopt.settings import GenerateConfig
from prefopt.storage import text_number
from prefopt.types import Completion


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        n: completions per prompt.
        temperature: of the softmax; 0 takes the most likely token. Below 1e-5 it is 0: logits divided by less overflow.
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

    def __post_init__(self) -> None:
        if self.temperature < 1e-5:
            object.__setattr__(self, "temperature", 0.0)

    @classmethod
    def of(cls, settings: GenerateConfig, **changed: Any) -> Sampling:
        """Those of the settings, but for what is named."""
        names = ("n", "temperature", "top_p", "top_k", "max_tokens", "stop", "logprobs")
        return cls(**{name: getattr(settings, name) for name in names} | changed)


# Told of a prompt, by its place in what was asked, and its completions, as soon as these are known.
Done = Callable[[int, list[Completion]], None]


class Engine(Protocol):
    """A policy that answers.

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
                threads at once, so that they can be kept before all others are known. What it raises ends the call.
        Raises: RoundError when the engine gives fewer than were asked for, or cannot be reached.
        """

    def describe(self) -> dict[str, Any]:
        """What decides its completions beside prompts, sampling and seeds: name, versions, precision."""

    def close(self) -> None:
        """Free what it holds."""


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
