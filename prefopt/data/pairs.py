"""Views of sequences of encoded pairs: subsets, concatenations and conversions.

A view holds indices instead of pairs, so that large data sets remain in the memory-mapped file. Lengths and prompt keys
are read as arrays, without reading tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import overload

import numpy as np

from prefopt.storage import text_hash
from prefopt.types import EncodedPair

BLOCK = 1 << 16  # pairs whose metadata is in memory at once


def _key(pair: EncodedPair) -> int:
    """The key of the prompt; for pairs that were not read from a file, a hash of the prompt's token ids."""
    key = pair.prompt_key or text_hash(str(pair.prompt_ids))[:16]
    return int(key, 16)


_METADATA: dict[str, Callable[[EncodedPair], int]] = {
    "prompt": lambda pair: len(pair.prompt_ids),
    "chosen": lambda pair: len(pair.chosen_ids),
    "rejected": lambda pair: len(pair.rejected_ids or ()),
    "chosen_loss_tokens": lambda pair: sum(pair.chosen_mask),
    "rejected_loss_tokens": lambda pair: sum(pair.rejected_mask or ()),
    "prompt_key": _key,
    "raw_prompt_key": lambda pair: int(pair.raw_prompt_key, 16) if pair.raw_prompt_key else _key(pair),
}


def pair_metadata(pairs: Sequence[EncodedPair], name: str, begin: int, end: int) -> np.ndarray:
    """One number for each of the pairs `begin` to `end`; a memory-mapped set reads it without reading tokens.

    Args:
        name: `prompt`, `chosen` or `rejected` for the number of tokens; `chosen_loss_tokens` or `rejected_loss_tokens`;
            `prompt_key` or `raw_prompt_key`; or `column.NAME`. Lengths are 0 for a pair without rejected completion.
    Returns: int64, uint64 for keys, float64 for columns. Shape `(end - begin,)`.
    """
    if hasattr(pairs, "metadata"):
        found: np.ndarray = pairs.metadata(name, begin, end)
        return found
    rows = pairs[begin:end]
    if name.startswith("column."):
        return np.array([pair.columns[name.removeprefix("column.")] for pair in rows], np.float64)
    return np.array([_METADATA[name](pair) for pair in rows], np.uint64 if name.endswith("prompt_key") else np.int64)


def blocks(pairs: Sequence[EncodedPair]) -> Iterator[tuple[int, int]]:
    """(begin, end) of consecutive blocks of at most BLOCK pairs, whose metadata fits in memory."""
    return ((begin, min(begin + BLOCK, len(pairs))) for begin in range(0, len(pairs), BLOCK))


def _over_blocks(pairs: Sequence[EncodedPair], of: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """One number per pair, computed block by block. Args: of: function (begin, end) -> (end - begin,)."""
    out = np.empty(len(pairs), np.int32)
    for begin, end in blocks(pairs):
        out[begin:end] = of(begin, end)
    return out


def padded_lengths(pairs: Sequence[EncodedPair]) -> np.ndarray:
    """`loader.padded_length` of each pair: length of the prompt and the longer completion. (n,) int32."""

    def of(begin: int, end: int) -> np.ndarray:
        prompt, chosen, rejected = (pair_metadata(pairs, name, begin, end) for name in ("prompt", "chosen", "rejected"))
        return prompt + np.maximum(chosen, rejected)

    return _over_blocks(pairs, of)


def input_tokens(pairs: Sequence[EncodedPair]) -> np.ndarray:
    """Number of input tokens of each pair: prompt and completion of both sequences. (n,) int32.

    The prompt counts once per completion, also in layouts in which the two completions share it.
    """

    def of(begin: int, end: int) -> np.ndarray:
        prompt, chosen, rejected = (pair_metadata(pairs, name, begin, end) for name in ("prompt", "chosen", "rejected"))
        return prompt * (1 + (rejected > 0)) + chosen + rejected

    return _over_blocks(pairs, of)


class PairView(Sequence[EncodedPair]):
    """Base class of the views. A slice of a view is a list."""

    def _at(self, i: int) -> EncodedPair:
        raise NotImplementedError

    @overload
    def __getitem__(self, i: int) -> EncodedPair: ...
    @overload
    def __getitem__(self, i: slice) -> list[EncodedPair]: ...
    def __getitem__(self, i: int | slice) -> EncodedPair | list[EncodedPair]:
        if isinstance(i, slice):
            return [self._at(j) for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        return self._at(i % len(self))


class Subset(PairView):
    """A subset of the pairs of a sequence, in its order.

    Args: rows: (n,) their indices, ascending.
    """

    def __init__(self, pairs: Sequence[EncodedPair], rows: np.ndarray) -> None:
        self.pairs, self.rows = pairs, rows

    def __len__(self) -> int:
        return len(self.rows)

    def _at(self, i: int) -> EncodedPair:
        return self.pairs[int(self.rows[i])]

    def metadata(self, name: str, begin: int, end: int) -> np.ndarray:
        """See `pair_metadata`."""
        rows = self.rows[begin:end]
        first, last = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
        parts = [np.empty(0, np.int64)]
        for start in range(first, last, BLOCK):  # in blocks, since pairs outside of the subset are read too
            stop = min(start + BLOCK, last)
            mine = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]
            if len(mine):
                parts.append(pair_metadata(self.pairs, name, start, stop)[mine - start])
        return np.concatenate(parts[1:] or parts)


class Concatenated(PairView):
    """Several sequences of pairs, concatenated. `bounds` are the indices at which each begins, and the end."""

    def __init__(self, parts: Sequence[Sequence[EncodedPair]]) -> None:
        self.parts = tuple(parts)
        self.bounds = [0, *accumulate(map(len, self.parts))]

    def __len__(self) -> int:
        return self.bounds[-1]

    def _at(self, i: int) -> EncodedPair:
        part = bisect_right(self.bounds, i) - 1
        return self.parts[part][i - self.bounds[part]]

    def metadata(self, name: str, begin: int, end: int) -> np.ndarray:
        """See `pair_metadata`."""
        found = [np.empty(0, np.int64)]
        for part, start in zip(self.parts, self.bounds, strict=False):
            low, high = max(begin - start, 0), min(end - start, len(part))
            if low < high:
                found.append(pair_metadata(part, name, low, high))
        return np.concatenate(found[1:] or found)


class ConvertedPairs(PairView):
    """A view that converts each pair when it is read."""

    def __init__(self, pairs: Sequence[EncodedPair], convert: Callable[[EncodedPair], EncodedPair]) -> None:
        self.pairs, self.convert = pairs, convert

    def __len__(self) -> int:
        return len(self.pairs)

    def _at(self, i: int) -> EncodedPair:
        return self.convert(self.pairs[i])
