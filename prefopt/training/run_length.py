"""How long a run trains: a number of steps, or until so many tokens were fed or so many seconds were trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prefopt.settings import RunConfig


@dataclass
class RunLength:
    """What ends a run, and how much of it is gone; it goes into each checkpoint, so that attempts add up.

    Args:
        steps: optimizer steps; None where tokens or seconds end the run.
        max_tokens: tokens fed over all processes, counted as `tokens_processed` in the metrics.
        max_seconds: of optimizer steps, as `seconds` of the metrics' train lines: no evaluation, no start, no save.
        tokens, seconds: gone in the steps that the weights have seen. Those that a kill undoes do not count.
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
    def of_them(self) -> str:
        """Behind the number of a step, in a line."""
        return f" of {self.steps}" if self.steps else ""

    def over(self, done: int) -> bool:
        """Whether the run is at its end after `done` steps."""
        share = self.share()
        return share >= 1 if share is not None else done >= (self.steps or 0)

    def share(self, tokens: int = 0, seconds: float = 0.0) -> float | None:
        """How much is gone once this has gone too, from 0; None where steps end the run."""
        if self.max_tokens is not None:
            return (self.tokens + tokens) / self.max_tokens
        if self.max_seconds is not None:
            return (self.seconds + seconds) / self.max_seconds
        return None

    def gone(self, tokens: int, seconds: float) -> tuple[float, float] | None:
        """The share that was gone before the step under way, and with it."""
        before, after = self.share(), self.share(tokens, seconds)
        return None if before is None or after is None else (before, after)

    def spend(self, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds

    def left(self, start: int) -> Iterator[int]:
        """The numbers of the steps from `start` until the end."""
        while not self.over(start):
            yield start
            start += 1

    def state(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "seconds": self.seconds}

    def restore(self, state: dict[str, Any]) -> None:
        self.tokens, self.seconds = int(state["tokens"]), float(state["seconds"])
