"""What an optimizer step computed, before it is logged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all ranks.

    Args:
        step: its number, from 1.
        epoch: passes over the training set so far; None for an endless stream.
        loss: the objective: the weighted sum of all terms, and of the router loss if there is one.
        metrics: means over the pairs of the step, by name.
        pairs, completion_tokens: in the step.
        tokens_processed: input tokens without padding. positions: with padding.
        grad_norm: before clipping; None where a gradient scaler skipped the step.
        loss_scale: of the gradient scaler; None without one. skipped: whether it skipped the step.
        seconds: wall-clock time of the step.
        peak_memory_gib: of the GPU, since the start; None on a CPU.
    """

    step: int
    epoch: float | None
    loss: float
    metrics: Mapping[str, float]
    learning_rate: float
    pairs: int
    completion_tokens: int
    tokens_processed: int
    positions: int
    grad_norm: float | None
    loss_scale: float | None
    skipped: bool
    seconds: float
    peak_memory_gib: float | None

    def line(self) -> dict[str, Any]:
        """The line of this step in metrics.jsonl."""
        line: dict[str, Any] = {"step": self.step, "split": "train"}
        line |= {} if self.epoch is None else {"epoch": self.epoch}
        line |= {"loss": self.loss, **self.metrics, "learning_rate": self.learning_rate, "pairs": self.pairs}
        line |= {"completion_tokens": self.completion_tokens, "tokens_processed": self.tokens_processed}
        line |= {} if self.grad_norm is None else {"grad_norm": self.grad_norm}
        if self.loss_scale is not None:
            line |= {"loss_scale": self.loss_scale, "skipped_step": int(self.skipped)}
        line |= {"padding_fraction": 1 - self.tokens_processed / self.positions, "seconds": self.seconds}
        line |= {"pairs_per_second": self.pairs / self.seconds}
        line |= {"tokens_per_second": self.tokens_processed / self.seconds}
        return line if self.peak_memory_gib is None else line | {"peak_memory_gib": self.peak_memory_gib}
