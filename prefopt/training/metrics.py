"""Metrics that do not depend on micro-batches and ranks: sums and counts are added up, then divided once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefopt import storage
from prefopt.storage import read_lines, write_whole
from prefopt.types import LossOutput, PairStats

if TYPE_CHECKING:
    from prefopt.training.runtime import Runtime

# Keys of a metrics line that depend on the machine, not on the run.
WALL_CLOCK_KEYS = ("seconds", "tokens_per_second", "pairs_per_second", "peak_memory_gib")


@dataclass(frozen=True)
class Evaluation:
    """What an evaluator returns if it has more than figures.

    Args:
        figures: by name, for the metrics line.
        tables: by name; all rows of a table have the same keys, values are text and numbers. Each table goes to the
            file `NAME.jsonl` in the output folder, a line per row with the step first, and to the trackers.
        shown: text to print.
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
        """The means over all ranks; names whose count is zero everywhere are omitted."""
        names = sorted(self.totals)
        if not names:
            return {}
        totals = runtime.sum(torch.stack([self.totals[name] for name in names])).cpu()
        return {name: float(s / c) for name, (s, c) in zip(names, totals, strict=True) if c > 0}


def shared_metrics(stats: PairStats) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The metrics that every method logs, as far as they were computed, under TRL's names: per pair (sum, count).

    `logps/*`, `kl/*` (forward, KL(reference || policy)) and `reverse_kl/*` are sums over a completion, averaged over
    pairs; `kl/margin` is chosen minus rejected. `entropy` is the policy's, in nats per completion token of both sides.
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


def loss_metrics(output: LossOutput) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each term of a loss as the metric `loss/<term>`: per pair (value, count)."""
    return {f"loss/{term.name}": (term.value.detach(), term.count) for term in output.terms}


def total_loss(output: LossOutput, means: Mapping[str, float]) -> float:
    """The weighted sum of the terms' means. Args: means: by metric name, see `loss_metrics`."""
    return sum(term.weight * means.get(f"loss/{term.name}", 0.0) for term in output.terms)


class MetricsFile:
    """A file of JSON lines with a step each, such as metrics.jsonl; a resumed run can undo what it will write again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Remove the lines of steps after `step`, and a last line that a kill left incomplete.

        Raises: Damaged naming a damaged line; Unreadable.
        """
        if storage.is_there(self.path):
            self._write(line for line in read_lines(self.path) if line["step"] <= step)

    def replace(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the rows of `step` after those of earlier steps, in place of those of this step and later ones."""
        before = [line for line in self.lines() if line["step"] < step]
        self._write([*before, *({"step": step, **row} for row in rows)])

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        write_whole(self.path, (json.dumps(line) + "\n" for line in lines))

    def seal(self) -> dict[str, Any]:
        """Flush all lines to the disk. Returns: their checksums for `restore`, as JSON values."""
        content = storage.read_bytes(self.path)
        if content is not None:
            storage.flush_file(self.path)
        return storage.sums_of(content or b"")

    def restore(self, sums: Mapping[str, Any], since: str) -> None:
        """Remove all lines that were written after `seal`.

        Args: sums: what `seal` returned. since: the checkpoint that holds them, for errors.
        Raises: Damaged naming the first line that has changed since; Unreadable.
        """
        content = storage.read_bytes(self.path) or b""
        wrong = storage.other_line(self.path, content, sums, since)
        if wrong is not None:
            raise wrong
        before = [line.decode() + "\n" for line in content.split(b"\n")[: sums["lines"]]]
        if len("".join(before).encode()) != len(content):
            write_whole(self.path, before)

    def lines(self) -> list[dict[str, Any]]:
        """All lines."""
        return read_lines(self.path)

    def has(self, step: int, split: str) -> bool:
        """Whether a line of this step and split was written."""
        return any(line["step"] == step and line["split"] == split for line in self.lines())

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
