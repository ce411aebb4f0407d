"""The split into training and held-out pairs, by prompt: independent of tokenizer, truncation and order of the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from prefopt.data.pairs import Subset, blocks, pair_metadata
from prefopt.errors import DataError
from prefopt.storage import text_number
from prefopt.types import EncodedPair

VERSION = 2
_KEYS = {1: "prompt_key", 2: "raw_prompt_key"}


def mark(version: int) -> str:
    """The suffix of the fingerprint of held-out pairs, by which a resumed run knows how they were chosen."""
    return "" if version == 1 else f"-v{version}"


def version_of(fingerprint: str) -> int:
    """The version of the split in a run card's fingerprint; the first version has no suffix."""
    return next((version for version in _KEYS if version > 1 and fingerprint.endswith(mark(version))), 1)


def _keys(pairs: Sequence[EncodedPair], name: str = "prompt_key") -> Iterator[tuple[int, np.ndarray]]:
    """(index of the first pair, keys) of each block of pairs."""
    return ((begin, pair_metadata(pairs, name, begin, end)) for begin, end in blocks(pairs))


def prompt_keys(pairs: Sequence[EncodedPair]) -> Iterator[str]:
    """The key of each pair's prompt; pairs that do not come from a file are keyed by the prompt's ids."""
    return (f"{key:016x}" for _, keys in _keys(pairs) for key in keys.tolist())


def split_by_prompt(
    pairs: Sequence[EncodedPair], fraction: float, *, seed: int = 0, version: int = VERSION
) -> tuple[Subset, Subset]:
    """(train, eval): a prompt goes to eval when the hash of (seed, prompt) falls below `fraction`.

    The side of a pair depends on its own prompt alone, so adding pairs moves none. Where a side would be empty, the
    prompt with the nearest hash goes there.

    Args:
        pairs: all pairs.
        fraction: of the prompts to hold out, between 0 and 1.
        seed: of the hash.
        version: 2: by the prompt of the file, so that all tokenizers and templates hold out the same prompts; 1: by its
            rendering, for runs that were started with the first version.
    Raises: DataError when there are fewer than two prompts.
    """
    if not 0 < fraction < 1:
        raise DataError(f"data.eval_fraction: found {fraction:g}, expected a number between 0 and 1")

    def quantile(key: int) -> float:
        return text_number(f"{seed}:{key:016x}") / 2**64

    held_out = np.zeros(len(pairs), bool)
    lowest, highest = (2.0, 0), (-1.0, 0)  # (hash in [0, 1), key)
    for begin, keys in _keys(pairs, _KEYS[version]):
        known, row_of = np.unique(keys, return_inverse=True)
        places = [quantile(key) for key in known.tolist()]
        held_out[begin : begin + len(keys)] = (np.array(places) < fraction)[row_of]
        found = [*zip(places, known.tolist(), strict=True)]
        lowest, highest = min(lowest, *found), max(highest, *found)
    if lowest[1] == highest[1]:
        raise DataError(
            f"a split by prompt needs two prompts, found {min(len(pairs), 1)} (give held-out pairs: --data.eval)"
        )
    if not held_out.any() or held_out.all():
        key, side = (lowest[1], True) if not held_out.any() else (highest[1], False)
        for begin, keys in _keys(pairs, _KEYS[version]):
            held_out[begin : begin + len(keys)][keys == key] = side
    train, rest = (np.flatnonzero(side).astype(np.int32) for side in (~held_out, held_out))
    return Subset(pairs, train), Subset(pairs, rest)


def sample(pairs: Sequence[EncodedPair], most: int) -> Sequence[EncodedPair]:
    """At most `most` of the pairs, in their order; the same ones in every run on the same pairs, whatever its seed.

    They are the first `most` of a permutation from seed 0, so a smaller sample is a subset of a larger one.
    """
    if most >= len(pairs):
        return pairs
    return Subset(pairs, np.sort(np.random.default_rng(0).permutation(len(pairs))[:most]).astype(np.int32))


def shared_prompts(train: Sequence[EncodedPair], held_out: Sequence[EncodedPair]) -> int:
    """Number of held-out pairs whose prompt is trained on too."""
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *(keys for _, keys in _keys(held_out))]))
    seen = np.zeros(len(known), bool)
    for _, keys in _keys(train):
        seen |= np.isin(known, keys)
    return int(sum(seen[np.searchsorted(known, keys)].sum() for _, keys in _keys(held_out)))
