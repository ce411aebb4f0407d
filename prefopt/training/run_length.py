"""How long a run trains: a number of optimizer steps, of tokens processed, or of seconds of optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefopt.settings import RunConfig


@dataclass
class RunLength:
    """The length of a run and how much of it is spent; checkpoints keep it, so that attempts add up.

    Args:
        steps: optimizer steps; None where tokens or seconds end the run.
        max_tokens: tokens processed on all ranks, as `tokens_processed` in the metrics.
        max_seconds: seconds of optimizer steps, as `seconds` of the training lines in the metrics, without start-up,
            evaluations and checkpoints.
        tokens, seconds: spent in the steps that the current weights have taken; steps that a kill undid do not count.
    """

    steps: int | None
    max_tokens: int | None = None
    max_seconds: float | None = None
    tokens: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, config: RunConfig, steps: int | None) -> RunLength:
        return cls(steps, config.train.max_tokens, config.train.max_seconds)

    @property
    def of_total(self) -> str:
        """` of 24` for a line that begins with a number of steps; empty where tokens or seconds end the run."""
        return f" of {self.steps}" if self.steps else ""

    def over(self, done: int) -> bool:
        """Whether `done` steps complete the run."""
        fraction = self._fraction()
        return fraction >= 1 if fraction is not None else done >= (self.steps or 0)

    def _fraction(self, tokens: int = 0, seconds: float = 0.0) -> float | None:
        """The fraction of the length that is spent, with these added to it; None where steps end the run."""
        if self.max_tokens is not None:
            return (self.tokens + tokens) / self.max_tokens
        if self.max_seconds is not None:
            return (self.seconds + seconds) / self.max_seconds
        return None

    def progress(self, done: int) -> float:
        """The finished share of the run after `done` steps, from 0 to 1."""
        fraction = self._fraction()
        return min(1.0, fraction if fraction is not None else done / (self.steps or 1))

    def spent(self, tokens: int, seconds: float) -> tuple[float, float] | None:
        """The fraction of the length that is spent before a step of so many tokens and seconds, and after it."""
        before, after = self._fraction(), self._fraction(tokens, seconds)
        return None if before is None or after is None else (before, after)

    def spend(self, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds

    def state(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "seconds": self.seconds}

    def restore(self, state: dict[str, Any]) -> None:
        self.tokens, self.seconds = int(state["tokens"]), float(state["seconds"])
