"""Sums and counts travel, division happens once: metrics that do not depend on how the work was cut."""

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
from prefopt.types import PairStats

if TYPE_CHECKING:
    from prefopt.training.runtime import Runtime

# Keys of a metrics line that depend on the machine and the moment, not on the run.
WALL_CLOCK_KEYS = ("seconds", "tokens_per_second", "pairs_per_second", "peak_memory_gib")


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
        """Forget lines of steps after `step`, and a line that was cut in half by a kill.

        Raises: Damaged naming a line that is not as it was written; Unreadable.
        """
        if storage.is_there(self.path):
            self._write(line for line in read_lines(self.path) if line["step"] <= step)

    def replace(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the rows of `step` behind those of earlier steps; what stood there of this step or later is gone."""
        before = [line for line in self.lines() if line["step"] < step]
        self._write([*before, *({"step": step, **row} for row in rows)])

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        write_whole(self.path, (json.dumps(line) + "\n" for line in lines))

    def seal(self) -> dict[str, Any]:
        """Wait until all lines are on the disk. Returns: what `restore` knows them by, as JSON values."""
        content = storage.read_bytes(self.path)
        if content is not None:
            storage.flush_file(self.path)
        return storage.sums_of(content or b"")

    def restore(self, sums: Mapping[str, Any], since: str) -> None:
        """Forget all lines behind those that were there at `seal`.

        Args: since: the checkpoint that holds `sums`, for errors.
        Raises: Damaged naming the first line that is not as it was; Unreadable.
        """
        content = storage.read_bytes(self.path) or b""
        wrong = storage.other_line(self.path, content, sums, since)
        if wrong is not None:
            raise wrong
        kept = [line.decode() + "\n" for line in content.split(b"\n")[: sums["lines"]]]
        if len("".join(kept).encode()) != len(content):
            write_whole(self.path, kept)

    def lines(self) -> list[dict[str, Any]]:
        """All that was written and not forgotten."""
        return read_lines(self.path)

    def has(self, step: int, split: str) -> bool:
        """Whether a line of this step and split was written."""
        return any(line["step"] == step and line["split"] == split for line in self.lines())

    def write(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
