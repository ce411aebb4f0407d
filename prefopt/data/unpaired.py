"""Encoded unpaired examples: pairs as two of them, and mismatched completions for methods that compare with one.

A mismatched completion is that of another prompt. An example carries it as its rejected completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from prefopt.data.loader import Batches, Shares
from prefopt.data.pairs import PairView, blocks, pair_metadata
from prefopt.errors import DataError
from prefopt.types import LABEL, EncodedPair


def encoded_as_two(pair: EncodedPair) -> list[EncodedPair]:
    """A pair as two unpaired examples, the chosen completion first."""
    assert pair.rejected_ids is not None
    assert pair.rejected_mask is not None
    sides = ((pair.chosen_ids, pair.chosen_mask, 1.0), (pair.rejected_ids, pair.rejected_mask, 0.0))
    return [
        replace(
            pair,
            chosen_ids=ids,
            chosen_mask=mask,
            rejected_ids=None,
            rejected_mask=None,
            columns={**pair.columns, LABEL.name: label},
        )
        for ids, mask, label in sides
    ]


def with_mismatched(pair: EncodedPair, other: EncodedPair, max_length: int) -> EncodedPair:
    """The example with the completion of another one as its rejected completion, right-truncated to `max_length`."""
    room = max(1, max_length - len(pair.prompt_ids))
    return replace(pair, rejected_ids=other.chosen_ids[:room], rejected_mask=other.chosen_mask[:room])


def rotated(pairs: Sequence[EncodedPair], max_length: int) -> list[EncodedPair]:
    """A few examples, each with the completion of the next one that has another prompt."""
    keys = np.array([hash(tuple(pair.prompt_ids)) for pair in pairs])
    return [with_mismatched(pair, pairs[j], max_length) for pair, j in zip(pairs, partners(keys), strict=True)]


def partners(keys: np.ndarray) -> np.ndarray:
    """For each example the index of the next one, cyclically, whose key is another; its own if all keys are equal.

    Args: keys: `(n,)`, equal where prompts are equal. Returns: `(n,)` int32.
    """
    n = len(keys)
    following = np.arange(1, n + 1, dtype=np.int64)  # of the doubled array: index of the next example with another key
    doubled = np.concatenate((keys, keys))
    change = np.flatnonzero(doubled[1:] != doubled[:-1]) + 1
    if not len(change):
        return np.arange(n, dtype=np.int32)
    following = change[np.searchsorted(change, np.arange(n), side="right")]
    return (following % n).astype(np.int32)


class Mismatched(PairView):
    """Examples of a data source, each with the completion of another prompt as its rejected completion.

    Which one depends on the source alone: the next example in a random order that the source's size fixes, so that
    neither epochs, batches and ranks nor a resumed run change it, and a reference can be cached.

    Args: max_length: of prompt and completion together; a longer mismatched completion is right-truncated.
    Raises: DataError where all examples have one prompt.
    """

    def __init__(self, pairs: Sequence[EncodedPair], max_length: int, name: str = "") -> None:
        self.pairs, self.max_length = pairs, max_length
        keys = self._all("raw_prompt_key")
        self._lengths = self._all("chosen").astype(np.int32)
        order = np.random.default_rng(0).permutation(len(pairs))
        self._partner = np.empty(len(pairs), np.int32)
        self._partner[order] = order[partners(keys[order])]
        if len(pairs) and bool((self._partner == np.arange(len(pairs))).all()):
            raise DataError(
                f"{name or 'data.train'}: all {len(pairs):,} examples have the same prompt, expected two prompts: the "
                "method compares each completion with one of another prompt"
            )

    def _all(self, name: str) -> np.ndarray:
        return np.concatenate([pair_metadata(self.pairs, name, begin, end) for begin, end in blocks(self.pairs)])

    def __len__(self) -> int:
        return len(self.pairs)

    def _at(self, i: int) -> EncodedPair:
        return with_mismatched(self.pairs[i], self.pairs[int(self._partner[i])], self.max_length)

    def metadata(self, name: str, begin: int, end: int) -> np.ndarray:
        """See `pairs.pair_metadata`."""
        if name == "rejected_loss_tokens":  # a truncated mask is not known without reading it
            return np.array([sum(self._at(i).rejected_mask or ()) for i in range(begin, end)], np.int64)
        if name != "rejected":
            return pair_metadata(self.pairs, name, begin, end)
        lengths = self._lengths[self._partner[begin:end]].astype(np.int64)
        room = np.maximum(1, self.max_length - pair_metadata(self.pairs, "prompt", begin, end))
        return np.minimum(lengths, room)


class UnpairedStream:
    """An endless stream of pairs as unpaired examples, two for each pair; mismatched completions are of the same step.

    Args: stream: of half as many pairs per step. mismatched: whether examples get one. max_length: see `Mismatched`.
    """

    steps_per_epoch: int | None = None
    grouped: Shares | None = None

    def __init__(self, stream: Batches, max_length: int, mismatched: bool) -> None:
        self.stream, self.max_length, self.mismatched = stream, max_length, mismatched
        self.fingerprint, self.order_hash = f"{stream.fingerprint}-unpaired", stream.order_hash
        self.steps, self.epochs = stream.steps, stream.epochs

    def counted_pairs(self, step: int) -> float:
        return 2 * self.stream.counted_pairs(step)

    def global_batch(self, step: int) -> list[EncodedPair]:
        rows = [example for pair in self.stream.global_batch(step) for example in encoded_as_two(pair)]
        return rotated(rows, self.max_length) if self.mismatched else rows
