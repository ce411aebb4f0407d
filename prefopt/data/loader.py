"""Which pairs make up which step. The order is a function of (seed, epoch) alone, so a position is one number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from prefopt.types import EncodedPair


class Batches(Protocol):
    """What the loop trains on: the pairs of each optimizer step, whatever the number of processes."""

    @property
    def steps_per_epoch(self) -> int | None:
        """None for an endless stream."""

    @property
    def fingerprint(self) -> str:
        """A hash of the content; a run is resumed on the same fingerprint only."""

    def global_batch(self, step: int) -> list[EncodedPair]:
        """The pairs of optimizer step `step`, counted from 0 over the whole run."""


class FileBatches:
    """A fixed set of pairs, shuffled anew in each epoch; the last batch of an epoch may be smaller, none is dropped.

    Args:
        pairs: the encoded rows.
        global_batch: pairs per optimizer step, over all processes.
        seed: of the shuffling.
        fingerprint: content hash of `pairs`.
    """

    def __init__(self, pairs: Sequence[EncodedPair], global_batch: int, seed: int, fingerprint: str) -> None:
        self.pairs, self.size, self.seed, self.fingerprint = pairs, global_batch, seed, fingerprint
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.pairs) // self.size)

    def global_batch(self, step: int) -> list[EncodedPair]:
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self.pairs), generator=generator).tolist())
        return [self.pairs[i] for i in self._order[1][position * self.size : (position + 1) * self.size]]
