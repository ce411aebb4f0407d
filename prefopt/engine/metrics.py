"""Sums and counts travel, division happens once: metrics that do not depend on how the work was cut."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefopt.types import PairStats

if TYPE_CHECKING:
    from prefopt.engine.runtime import Runtime

# Keys of a metrics line that depend on the machine and the moment, not on the run.
WALL_CLOCK_KEYS = ("seconds", "tokens_per_second", "pairs_per_second", "peak_memory_gb")


@dataclass(frozen=True)
class Evaluation:
    """What an evaluator says of a policy beside plain figures.

    Args:
        figures: by name, for the metrics line.
        tables: by name, rows with the same keys in each, of text and numbers: each goes to a file `NAME.jsonl` in the
            output folder, a line per row with the step before it, and to the trackers.
        shown: lines to print.
    """

    figures: Mapping[str, float]
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    shown: str = ""


Evaluator = Callable[[nn.Module], Mapping[str, float] | Evaluation]


class Meter:
    """Running sums and counts by name, in float64."""

    def __init__(self) -> None:
        self.totals: dict[str, torch.Tensor] = {}  # name -> (sum, count)

    def add(self, values: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add per-pair (sum, count) vectors; shapes (B,), B may be 0."""
        for name, (value, count) in values.items():
            pair = torch.stack((value.detach().double().sum(), count.detach().double().sum()))
            self.totals[name] = self.totals[name] + pair if name in self.totals else pair

    def averages(self, runtime: Runtime) -> dict[str, float]:
        """The global averages; names whose global count is zero are left out."""
        names = sorted(self.totals)
        if not names:
            return {}
        totals = runtime.sum(torch.stack([self.totals[name] for name in names])).cpu()
        return {name: float(s / c) for name, (s, c) in zip(names, totals, strict=True) if c > 0}


def shared_metrics(stats: PairStats) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What is logged for every method alike, as far as it was computed, under TRL's names.

    `logps/*`, `kl/*` (forward, KL(reference || policy)) and `reverse_kl/*` are sums over a completion, averaged over
    pairs; `kl/margin` is chosen minus rejected. `entropy` is the policy's, in nats per scored token of both sides.
    """
    out: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    ones = torch.ones(stats.chosen_lengths.shape, device=stats.chosen_lengths.device)
    for name in ("logps", "kl", "reverse_kl"):
        for side in ("chosen", "rejected"):
            value = getattr(stats, f"{side}_{name}")
            if value is not None:
                out[f"{name}/{side}"] = (value.detach(), ones)
    if stats.chosen_kl is not None and stats.rejected_kl is not None:
        out["kl/margin"] = ((stats.chosen_kl - stats.rejected_kl).detach(), ones)
    if stats.chosen_entropy is not None:
        entropy, tokens = stats.chosen_entropy.detach(), stats.chosen_lengths
        if stats.rejected_entropy is not None and stats.rejected_lengths is not None:
            entropy, tokens = entropy + stats.rejected_entropy.detach(), tokens + stats.rejected_lengths
        out["entropy"] = (entropy, tokens)
    return out


class MetricsFile:
    """metrics.jsonl: one line per event, each step once, whatever happened to the process in between."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Forget lines of steps after `step`, and a line that was cut in half by a kill."""
        if not self.path.exists():
            return
        kept = [line for line in read_lines(self.path) if line["step"] <= step]
        write_atomically(self.path, (json.dumps(line) + "\n" for line in kept))

    def replace(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the rows of `step` behind those of earlier steps; what stood there of this step or later is gone."""
        self.rewind(step - 1)
        with self.path.open("a") as file:
            file.writelines(json.dumps({"step": step, **row}) + "\n" for row in rows)

    def lines(self) -> list[dict[str, Any]]:
        """All that was written and not forgotten."""
        return read_lines(self.path) if self.path.exists() else []

    def has(self, step: int, split: str) -> bool:
        """Whether a line of this step and split was written."""
        return any(line["step"] == step and line["split"] == split for line in self.lines())

    def write(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break  # the last line of a killed process
    return lines


def write_atomically(path: Path, lines: Iterable[str]) -> None:
    """Write a text file under a temporary name, flush it to the disk, then rename it."""
    temporary = path.with_name(f".{path.name}.tmp")  # the next attempt writes over what a kill leaves
    with temporary.open("w") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
