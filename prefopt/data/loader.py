"""Which pairs make up which step. The order is a function of (seed, epoch) alone, so a position is one number."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from prefopt.data.mixture import Mixture
from prefopt.data.pairs import ConvertedPairs, fed_tokens, padded_lengths
from prefopt.errors import DataError
from prefopt.storage import running_hash
from prefopt.types import EncodedPair

POOL = 50  # steps whose pairs are sorted together: more save little padding, and leave fewer ways to fall into batches
Shares = Sequence[tuple[float, Sequence[EncodedPair]]]  # sets of pairs, and what share of an epoch's pairs each has


def padded_length(pair: EncodedPair) -> int:
    """Tokens that each row of a pair takes up in the padded layout: the prompt and the longer completion."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids or ()))


class Batches(Protocol):
    """What the loop trains on: the pairs of each optimizer step, whatever the number of processes."""

    @property
    def steps_per_epoch(self) -> int | None:
        """Of the first epoch, where others may have some more or less; None for an endless stream."""

    def steps(self, epochs: float) -> int:
        """Optimizer steps of so many epochs from the start, rounded up. Not for an endless stream."""

    def epochs(self, steps: int) -> float:
        """How many epochs so many steps from the start are. Not for an endless stream."""

    @property
    def fingerprint(self) -> str:
        """A hash of the content; a run is resumed on the same fingerprint only."""

    @property
    def order_hash(self) -> str:
        """A hash of which pairs make up which step; recorded in the run card, and the same when a run is continued."""

    @property
    def grouped(self) -> Shares | None:
        """All pairs, where those of a batch are of like length and so no random sample of all; None where they are."""

    def counted_pairs(self, step: int) -> float:
        """By how many pairs a grouped step is divided, so that every pair has the same weight. Of grouped ones only."""

    def global_batch(self, step: int) -> list[EncodedPair]:
        """The pairs of optimizer step `step`, counted from 0 over the whole run."""


class Converted:
    """Batches whose pairs are each turned into another one, such as one that reads the same in another form.

    Args: batches: an endless stream, or of a fixed set. convert: a pair's other form. form: its name.
    """

    def __init__(self, batches: Batches, convert: Callable[[EncodedPair], EncodedPair], form: str) -> None:
        self.batches, self.convert = batches, convert
        self.steps_per_epoch, self.steps, self.epochs = batches.steps_per_epoch, batches.steps, batches.epochs
        self.fingerprint, self.order_hash = f"{batches.fingerprint}-{form}", batches.order_hash
        self.counted_pairs = batches.counted_pairs
        shares = batches.grouped
        self.grouped = None if shares is None else [(share, ConvertedPairs(pairs, convert)) for share, pairs in shares]

    def global_batch(self, step: int) -> list[EncodedPair]:
        return [self.convert(pair) for pair in self.batches.global_batch(step)]


class FileBatches:
    """A fixed set of pairs, shuffled anew in each epoch; one batch of an epoch may be smaller, no pair is dropped.

    Nothing is held but a few numbers per pair: lengths where they are needed, and the order of one epoch.

    Args:
        pairs: the encoded rows.
        global_batch: pairs per optimizer step, over all processes.
        seed: of the shuffling.
        fingerprint: content hash of `pairs`.
        group_by_length: whether the pairs of a batch are of like length.
        tokens_per_batch: tokens that a step may have, see `pairs.fed_tokens`; it takes the place of `global_batch`. A
            step then takes pairs in their order for as long as there is room, so epochs differ in steps.
        mixture: what an epoch takes of which source; None: each pair once.

    Raises: DataError when a pair alone has more tokens than a step may have.
    """

    def __init__(
        self,
        pairs: Sequence[EncodedPair],
        global_batch: int,
        seed: int,
        fingerprint: str,
        group_by_length: bool = False,
        tokens_per_batch: int | None = None,
        mixture: Mixture | None = None,
    ) -> None:
        self.pairs, self.size, self.seed, self.fingerprint = pairs, global_batch, seed, fingerprint
        self.budget, self.mixture = tokens_per_batch, mixture
        self._padded = padded_lengths(pairs) if group_by_length else None
        self._tokens = None if tokens_per_batch is None else fed_tokens(pairs)
        if tokens_per_batch is not None and self._tokens is not None:
            _refuse_longest(pairs, self._tokens, tokens_per_batch)
            self.size = max(1, int(tokens_per_batch / self._tokens.mean()))  # of pools
        self._firsts = [0]  # the first step of each epoch that was looked at, where epochs differ
        self._plan: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))

    def described(self) -> str:
        """What the steps of a token budget are, in one line."""
        rows, edges = self.plan(0)
        pairs = np.diff(edges)
        tokens = np.add.reduceat(self._tokens[rows], edges[:-1]) if self._tokens is not None else pairs
        return (
            f"steps of up to {self.budget:,} tokens: {len(pairs):,} in the first epoch, of {pairs.min():,} to "
            f"{pairs.max():,} pairs, {tokens.mean() / (self.budget or 1):.1%} full"
        )

    # How long it is.

    @property
    def steps_per_epoch(self) -> int:
        return self._first_step(1)

    def steps(self, epochs: float) -> int:
        whole = math.floor(epochs)
        if self.budget is None:
            return math.ceil(epochs * self.steps_per_epoch)
        first = self._first_step(whole)
        return first if epochs == whole else first + math.ceil((epochs - whole) * (self._first_step(whole + 1) - first))

    def epochs(self, steps: int) -> float:
        if self.budget is None:
            return steps / self.steps_per_epoch
        epoch, position = self._place(steps)
        return epoch + position / (self._first_step(epoch + 1) - self._first_step(epoch))

    def _first_step(self, epoch: int) -> int:
        """The number of the first step of an epoch."""
        if self.budget is None:
            return epoch * -(-len(self.pairs) // self.size)
        while len(self._firsts) <= epoch:
            _, edges = self.plan(len(self._firsts) - 1)
            self._firsts.append(self._firsts[-1] + len(edges) - 1)
        return self._firsts[epoch]

    def _place(self, step: int) -> tuple[int, int]:
        """(epoch, step within it)."""
        if self.budget is None:
            return divmod(step, self.steps_per_epoch)
        while self._firsts[-1] <= step:
            self._first_step(len(self._firsts))
        epoch = bisect_right(self._firsts, step) - 1
        return epoch, step - self._firsts[epoch]

    # Which pairs.

    @property
    def order_hash(self) -> str:
        """Of the first epoch; the later ones follow from the same seed."""
        digest, (rows, edges) = running_hash(), self.plan(0)
        for position, (begin, end) in enumerate(pairwise(edges.tolist())):
            digest.update((", " if position else "[").encode() + json.dumps(rows[begin:end].tolist()).encode())
        digest.update(b"]")
        return digest.hexdigest()

    def order(self, epoch: int) -> list[list[int]]:
        """The numbers of the pairs of each step of an epoch."""
        rows, edges = self.plan(epoch)
        return [rows[begin:end].tolist() for begin, end in pairwise(edges.tolist())]

    def plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(the numbers of the pairs of an epoch in their order, (n,) int32; where each step begins, and the end).

        Grouped by length: pools of `POOL` steps are drawn at random, sorted and cut into batches, and the batches are
        shuffled. Which pairs make up the smaller batch is drawn before any length is looked at: its pairs weigh more
        than others, so each pair must have the same chance to be among them. Then every pair has the same expected
        weight in every step.
        """
        if self._plan[0] != epoch:
            self._plan = (epoch, *self._planned(epoch))
        return self._plan[1:]

    def _planned(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.pairs), generator=generator, dtype=torch.int32)
        if self.mixture is not None:
            order = self.mixture.rows(epoch)[order]
        rows = order.numpy()
        if self._padded is None:
            return rows, self._cut(rows)
        smaller = 0 if self.budget is not None else len(rows) % self.size
        edges = [np.array([0, smaller] if smaller else [0])]
        for begin in range(smaller, len(rows), POOL * self.size):
            pool = rows[begin : begin + POOL * self.size]
            pool[:] = pool[self._padded[pool].argsort(kind="stable")]
            edges.append(begin + self._cut(pool)[1:])
        ends = np.concatenate(edges)
        steps = torch.randperm(len(ends) - 1, generator=generator).numpy()
        rows = np.concatenate([rows[ends[step] : ends[step + 1]] for step in steps])
        return rows, np.concatenate(([0], np.diff(ends)[steps].cumsum()))

    def _cut(self, rows: np.ndarray) -> np.ndarray:
        """Where the steps begin that take these pairs in this order, and the end."""
        if self.budget is None or self._tokens is None:
            return np.append(np.arange(0, len(rows), self.size), len(rows))
        ends = self._tokens[rows].cumsum(dtype=np.int64)
        edges = [0]
        while edges[-1] < len(rows):
            before = int(ends[edges[-1] - 1]) if edges[-1] else 0
            edges.append(int(ends.searchsorted(before + self.budget, "right")))
        return np.array(edges)

    @property
    def grouped(self) -> Shares | None:
        if self._padded is None:
            return None
        if self.mixture is None:
            return [(1.0, self.pairs)]
        return self.mixture.shares(self.pairs)

    def counted_pairs(self, step: int) -> float:
        epoch, position = self._place(step)
        rows, edges = self.plan(epoch)
        if self.budget is not None:  # as many as a step has on average, since one of short pairs has more of them
            return len(rows) / (len(edges) - 1)
        return int(edges[position + 1] - edges[position])

    def global_batch(self, step: int) -> list[EncodedPair]:
        epoch, position = self._place(step)
        rows, edges = self.plan(epoch)
        return [self.pairs[i] for i in rows[edges[position] : edges[position + 1]].tolist()]


def _refuse_longest(pairs: Sequence[EncodedPair], tokens: np.ndarray, budget: int) -> None:
    longest = int(tokens.argmax())
    if tokens[longest] > budget:
        raise DataError(
            f"train.tokens_per_batch: found {budget:,}, but {pairs[longest].where or f'pair {longest}'} alone has "
            f"{tokens[longest]:,} tokens in its sequences, expected at least as many (raise it, or lower "
            "data.max_length)"
        )
