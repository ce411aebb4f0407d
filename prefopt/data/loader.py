"""Which pairs make up which step. The order is a function of (seed, epoch) alone, so a position is one number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from prefopt.types import EncodedPair

POOL = 50  # steps whose pairs are sorted together: more save little padding, and leave fewer ways to fall into batches


def padded_length(pair: EncodedPair) -> int:
    """Tokens that each row of a pair takes up in the padded layout: the prompt and the longer completion."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids or ()))


class Batches(Protocol):
    """What the loop trains on: the pairs of each optimizer step, whatever the number of processes."""

    @property
    def steps_per_epoch(self) -> int | None:
        """None for an endless stream."""

    @property
    def fingerprint(self) -> str:
        """A hash of the content; a run is resumed on the same fingerprint only."""

    @property
    def order_hash(self) -> str:
        """A hash of which pairs make up which step; recorded in the run card, and the same when a run is continued."""

    @property
    def grouped(self) -> Sequence[EncodedPair] | None:
        """All pairs, where those of a batch are of like length and so no random sample of all; None where they are."""

    def global_batch(self, step: int) -> list[EncodedPair]:
        """The pairs of optimizer step `step`, counted from 0 over the whole run."""


class Converted:
    """Batches whose pairs are each turned into another one, such as one that reads the same in another form.

    Args: batches: an endless stream, or of a fixed set. convert: a pair's other form. form: its name.
    """

    def __init__(self, batches: Batches, convert: Callable[[EncodedPair], EncodedPair], form: str) -> None:
        self.batches, self.convert = batches, convert
        self.steps_per_epoch = batches.steps_per_epoch
        self.fingerprint, self.order_hash = f"{batches.fingerprint}-{form}", batches.order_hash
        self.grouped = None if batches.grouped is None else [convert(pair) for pair in batches.grouped]

    def global_batch(self, step: int) -> list[EncodedPair]:
        return [self.convert(pair) for pair in self.batches.global_batch(step)]


class FileBatches:
    """A fixed set of pairs, shuffled anew in each epoch; one batch of an epoch may be smaller, no pair is dropped.

    Args:
        pairs: the encoded rows.
        global_batch: pairs per optimizer step, over all processes.
        seed: of the shuffling.
        fingerprint: content hash of `pairs`.
        group_by_length: whether the pairs of a batch are of like length.
    """

    def __init__(
        self,
        pairs: Sequence[EncodedPair],
        global_batch: int,
        seed: int,
        fingerprint: str,
        group_by_length: bool = False,
    ) -> None:
        self.pairs, self.size, self.seed, self.fingerprint = pairs, global_batch, seed, fingerprint
        self.grouped = pairs if group_by_length else None
        self._lengths = torch.tensor([padded_length(pair) for pair in pairs]) if group_by_length else None
        self._order: tuple[int, list[list[int]]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.pairs) // self.size)

    @property
    def order_hash(self) -> str:
        """Of the first epoch; the later ones follow from the same seed."""
        return hashlib.sha256(json.dumps(self.order(0)).encode()).hexdigest()

    def order(self, epoch: int) -> list[list[int]]:
        """The numbers of the pairs of each step of an epoch.

        Grouped by length: pools of `POOL` steps are drawn at random, sorted and cut into batches, and the batches are
        shuffled. Which pairs make up the smaller batch is drawn before any length is looked at: its pairs weigh more
        than others, so each pair must have the same chance to be among them. Then every pair has the same expected
        weight in every step.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        rows = torch.randperm(len(self.pairs), generator=generator)
        if self._lengths is None:
            return [batch.tolist() for batch in rows.split(self.size)]
        smaller = len(rows) % self.size
        batches = [rows[:smaller]] if smaller else []
        for begin in range(smaller, len(rows), POOL * self.size):
            pool = rows[begin : begin + POOL * self.size]
            batches += pool[self._lengths[pool].argsort(stable=True)].split(self.size)
        return [batches[i].tolist() for i in torch.randperm(len(batches), generator=generator)]

    def global_batch(self, step: int) -> list[EncodedPair]:
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self.order(epoch))
        return [self.pairs[i] for i in self._order[1][position]]
