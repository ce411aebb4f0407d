"""Which pairs are held out. A prompt is on one side only, whatever the tokenizer, the truncation or the row's place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from prefopt.data.pairs import Subset, blocks, facts
from prefopt.errors import DataError
from prefopt.storage import text_number
from prefopt.types import EncodedPair

VERSION = 2
_KEYS = {1: "prompt_key", 2: "raw_prompt_key"}


def mark(version: int) -> str:
    """What the fingerprint of held-out pairs ends with, by which a continued run knows how they were chosen."""
    return "" if version == 1 else f"-v{version}"


def version_of(fingerprint: str) -> int:
    """The version of the split that a run's card names. Runs from before there were several name none."""
    return next((version for version in _KEYS if version > 1 and fingerprint.endswith(mark(version))), 1)


def _keys(pairs: Sequence[EncodedPair], name: str = "prompt_key") -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first pair, keys) of one stretch of pairs after the other."""
    return ((begin, facts(pairs, name, begin, end)) for begin, end in blocks(pairs))


def prompt_keys(pairs: Sequence[EncodedPair]) -> Iterator[str]:
    """The key of each pair's prompt; pairs that do not come from a file are keyed by the prompt's ids."""
    return (f"{key:016x}" for _, keys in _keys(pairs) for key in keys.tolist())


def split_by_prompt(
    pairs: Sequence[EncodedPair], fraction: float, *, seed: int = 0, version: int = VERSION
) -> tuple[Subset, Subset]:
    """(train, eval): a prompt goes to eval when the hash of (seed, prompt) falls below `fraction`.

    A row's side depends on its own prompt alone, so adding rows moves none. Where the hash would leave a side empty,
    the prompt nearest to it goes there.

    Args:
        pairs: all rows.
        fraction: share of the prompts to hold out, between 0 and 1.
        seed: another seed, another split.
        version: 2: by the prompt as the file has it, so that all tokenizers and templates hold out the same ones; 1: by
            its rendering, as runs that began before have it.
    Raises: DataError when there are fewer than two prompts.
    """
    if not 0 < fraction < 1:
        raise DataError(f"data.eval_fraction: found {fraction:g}, expected a number between 0 and 1")

    def place(key: int) -> float:
        return text_number(f"{seed}:{key:016x}") / 2**64

    held_out = np.zeros(len(pairs), bool)
    lowest, highest = (2.0, 0), (-1.0, 0)  # (place, key)
    for begin, keys in _keys(pairs, _KEYS[version]):
        known, row_of = np.unique(keys, return_inverse=True)
        places = [place(key) for key in known.tolist()]
        held_out[begin : begin + len(keys)] = (np.array(places) < fraction)[row_of]
        found = [*zip(places, known.tolist(), strict=True)]
        lowest, highest = min(lowest, *found), max(highest, *found)
    if lowest[1] == highest[1]:
        raise DataError(
            f"a split by prompt needs two prompts, found {min(len(pairs), 1)} (give eval rows a file: --data.eval)"
        )
    if not held_out.any() or held_out.all():
        key, side = (lowest[1], True) if not held_out.any() else (highest[1], False)
        for begin, keys in _keys(pairs, _KEYS[version]):
            held_out[begin : begin + len(keys)][keys == key] = side
    train, rest = (np.flatnonzero(side).astype(np.int32) for side in (~held_out, held_out))
    return Subset(pairs, train), Subset(pairs, rest)


def sample(pairs: Sequence[EncodedPair], most: int) -> Sequence[EncodedPair]:
    """At most `most` of the pairs, in their order: the same ones for every run on the same pairs, whatever its seed.

    They are the first `most` of a permutation that numpy's generator draws from seed 0, so a smaller sample is part of
    a larger one.
    """
    if most >= len(pairs):
        return pairs
    return Subset(pairs, np.sort(np.random.default_rng(0).permutation(len(pairs))[:most]).astype(np.int32))


def shared_prompts(train: Sequence[EncodedPair], held_out: Sequence[EncodedPair]) -> int:
    """How many of the held-out pairs have a prompt that is trained on as well."""
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *(keys for _, keys in _keys(held_out))]))
    seen = np.zeros(len(known), bool)
    for _, keys in _keys(train):
        seen |= np.isin(known, keys)
    return int(sum(seen[np.searchsorted(known, keys)].sum() for _, keys in _keys(held_out)))
