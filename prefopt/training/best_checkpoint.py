"""Which evaluation of a run was the best, and for how long none has been better. Reads lines of metrics.jsonl alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SELECTED = "selected.json"  # in the folder of a kept model: which step it is of


@dataclass(frozen=True)
class Selection:
    """What makes one evaluation better than another. The start is no candidate.

    Args: metric: its name in the lines of evaluations. lower: whether the lowest is the best.
    """

    metric: str
    lower: bool

    @classmethod
    def of(cls, select: str) -> Selection:
        """As `eval.select` has it: a metric, and maybe `:min` or `:max`. Losses are best where they are lowest."""
        metric, _, direction = select.partition(":")
        loss = metric == "loss" or metric.startswith("loss/")
        return cls(metric, direction == "min" if direction else loss)

    def best(self, lines: Sequence[Mapping[str, Any]]) -> int | None:
        """The step of the best evaluation so far, the first of equals; None before there is one."""
        found = [
            (float(line[self.metric]), int(line["step"]))
            for line in _candidates(lines)
            if self.metric in line and math.isfinite(line[self.metric])
        ]
        return min(found, key=lambda one: (one[0] if self.lower else -one[0], one[1]))[1] if found else None

    def stale(self, lines: Sequence[Mapping[str, Any]]) -> int:
        """How many evaluations have come since the best one; all of them where none knows the metric."""
        best = self.best(lines)
        return sum(best is None or line["step"] > best for line in _candidates(lines))


def _candidates(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [line for line in lines if line["split"] == "eval" and line["step"] > 0]
