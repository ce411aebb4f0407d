"""The pairs of each step. The order is a function of (seed, epoch) alone, so a position in it is one number."""

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
from prefopt.data.pairs import ConvertedPairs, input_tokens, padded_lengths
from prefopt.errors import DataError
from prefopt.storage import running_hash
from prefopt.types import EncodedPair

POOL = 50  # steps whose pairs are sorted together; a larger pool saves little padding and makes batches less random
Shares = Sequence[tuple[float, Sequence[EncodedPair]]]  # (fraction of an epoch's pairs, pairs) of each set


def padded_length(pair: EncodedPair) -> int:
    """Row length of a pair in the padded layout: prompt and longer completion."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids or ()))


class Batches(Protocol):
    """The pairs of each optimizer step, independent of the world size."""

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps of the first epoch; others may differ by a few. None for an endless stream."""

    def steps(self, epochs: float) -> int:
        """Optimizer steps of the first `epochs` epochs, rounded up. Not for an endless stream."""

    def epochs(self, steps: int) -> float:
        """Epochs of the first `steps` steps. Not for an endless stream."""

    @property
    def fingerprint(self) -> str:
        """A hash of the content; a run is resumed on the same fingerprint only."""

    @property
    def order_hash(self) -> str:
        """A hash of which pairs make up which step; recorded in the run card, and the same when a run is resumed."""

    @property
    def grouped(self) -> Shares | None:
        """All pairs, if batches are grouped by length and therefore no random samples of them; else None."""

    def counted_pairs(self, step: int) -> float:
        """Number of pairs that a grouped step is divided by, so that all pairs have the same weight."""

    def global_batch(self, step: int) -> list[EncodedPair]:
        """The pairs of optimizer step `step`, counted from 0 over the whole run."""


class Converted:
    """Batches whose pairs are converted to another form.

    Args: convert: from a pair to its other form. form: the name of that form.
    """

    def __init__(self, batches: Batches, convert: Callable[[EncodedPair], EncodedPair], form: str) -> None:
        self.batches, self.convert = batches, convert
        self.steps_per_epoch, self.steps, self.epochs = batches.steps_per_epoch, batches.steps, batches.epochs
        self.fingerprint, self.order_hash = f"{batches.fingerprint}-{form}", batches.order_hash
        self.counted_pairs = batches.counted_pairs
        shares = batches.grouped
        self.grouped = None if shares is None else [(part, ConvertedPairs(pairs, convert)) for part, pairs in shares]

    def global_batch(self, step: int) -> list[EncodedPair]:
        return [self.convert(pair) for pair in self.batches.global_batch(step)]


class FileBatches:
    """A fixed set of pairs, shuffled anew in each epoch; one batch of an epoch may be smaller, no pair is dropped.

    Only a few numbers per pair are in memory: lengths where they are needed, and the order of one epoch.

    Args:
        pairs: the encoded pairs.
        global_batch: pairs per optimizer step, over all ranks.
        seed: of the shuffling.
        fingerprint: content hash of `pairs`.
        group_by_length: whether the pairs of a batch have similar lengths.
        tokens_per_batch: most tokens per step, see `pairs.input_tokens`; it replaces `global_batch`. A step then takes
            pairs in their order while they fit, so epochs differ in steps.
        mixture: pairs per epoch of each source; None: each pair once.

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
        self._tokens = None if tokens_per_batch is None else input_tokens(pairs)
        if tokens_per_batch is not None and self._tokens is not None:
            _refuse_longest(pairs, self._tokens, tokens_per_batch)
            self.size = max(1, int(tokens_per_batch / self._tokens.mean()))  # of pools
        self._firsts = [0]  # the first step of each epoch that was looked at, where epochs differ
        self._plan: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))

    def described(self) -> str:
        """Steps of a token budget, in one line."""
        rows, edges = self.plan(0)
        pairs = np.diff(edges)
        tokens = np.add.reduceat(self._tokens[rows], edges[:-1]) if self._tokens is not None else pairs
        return (
            f"steps of up to {self.budget:,} tokens: {len(pairs):,} in the first epoch, with {pairs.min():,} to "
            f"{pairs.max():,} pairs each, on average {tokens.mean() / (self.budget or 1):.1%} full"
        )

    # Number of steps

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
        """Index of the first step of an epoch."""
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

    # Pairs of a step

    @property
    def order_hash(self) -> str:
        """Hash of the first epoch's order; the later ones follow from the same seed."""
        digest, (rows, edges) = running_hash(), self.plan(0)
        for position, (begin, end) in enumerate(pairwise(edges.tolist())):
            digest.update((", " if position else "[").encode() + json.dumps(rows[begin:end].tolist()).encode())
        digest.update(b"]")
        return digest.hexdigest()

    def order(self, epoch: int) -> list[list[int]]:
        """Indices of the pairs of each step of an epoch."""
        rows, edges = self.plan(epoch)
        return [rows[begin:end].tolist() for begin, end in pairwise(edges.tolist())]

    def plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(indices of the pairs of an epoch in their order, (n,) int32; the first of each step, and the end).

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
        """The first of these pairs of each step, and the end."""
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
        if self.budget is not None:  # the average, since a step of short pairs has more of them
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
