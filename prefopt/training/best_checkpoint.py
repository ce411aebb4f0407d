"""Which evaluation of a run is the best, and how many have passed since. It reads lines of metrics.jsonl only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SELECTED = "selected.json"  # in the folder of a selected model: its step


@dataclass(frozen=True)
class Selection:
    """What makes one evaluation better than another. The evaluation before the first step never counts.

    Args: metric: its name in the lines of evaluations. lower: whether the lowest value is the best.
    """

    metric: str
    lower: bool

    @classmethod
    def of(cls, select: str) -> Selection:
        """From eval.select: a metric, optionally with `:min` or `:max`. The lowest loss is the best by default."""
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
        """How many evaluations have passed since the best one; all of them if none has the metric."""
        best = self.best(lines)
        return sum(best is None or line["step"] > best for line in _candidates(lines))


def _candidates(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [line for line in lines if line["split"] == "eval" and line["step"] > 0]
