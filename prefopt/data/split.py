"""Which pairs are held out. A prompt is on one side only, whatever the tokenizer, the truncation or the row's place."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import overload

from prefopt.errors import DataError
from prefopt.types import EncodedPair


class Subset(Sequence[EncodedPair]):
    """Some of the pairs of a sequence, in its order."""

    def __init__(self, pairs: Sequence[EncodedPair], rows: Sequence[int]) -> None:
        self.pairs, self.rows = pairs, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, i: int) -> EncodedPair: ...
    @overload
    def __getitem__(self, i: slice) -> list[EncodedPair]: ...
    def __getitem__(self, i: int | slice) -> EncodedPair | list[EncodedPair]:
        if isinstance(i, slice):
            return [self.pairs[j] for j in self.rows[i]]
        return self.pairs[self.rows[i]]

    def prompt_keys(self) -> Iterator[str]:
        keys = list(prompt_keys(self.pairs))
        return (keys[j] for j in self.rows)


def prompt_keys(pairs: Sequence[EncodedPair]) -> Iterator[str]:
    """The key of each pair's prompt; pairs that do not come from a file are keyed by the prompt's ids."""
    if hasattr(pairs, "prompt_keys"):
        return pairs.prompt_keys()
    return (pair.prompt_key or hashlib.sha256(str(pair.prompt_ids).encode()).hexdigest()[:16] for pair in pairs)


def split_by_prompt(pairs: Sequence[EncodedPair], fraction: float, *, seed: int = 0) -> tuple[Subset, Subset]:
    """(train, eval): a prompt goes to eval when the hash of (seed, prompt) falls below `fraction`.

    A row's side depends on its own prompt alone, so adding rows moves none. Where the hash would leave a side empty,
    the prompt nearest to it goes there.

    Args: pairs: all rows; fraction: share of the prompts to hold out, between 0 and 1; seed: another seed, another
        split.
    Raises: DataError when there are fewer than two prompts.
    """
    if not 0 < fraction < 1:
        raise DataError(f"data.eval_fraction: found {fraction:g}, expected a number between 0 and 1")
    keys = list(prompt_keys(pairs))
    place = {
        key: int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64 for key in set(keys)
    }
    if len(place) < 2:
        raise DataError(f"a split by prompt needs two prompts, found {len(place)} (give eval rows a file: --data.eval)")
    order = sorted(place, key=lambda key: place[key])
    held_out = {key for key in order if place[key] < fraction} or {order[0]}
    held_out -= {order[-1]} if len(held_out) == len(order) else set()
    train = [i for i, key in enumerate(keys) if key not in held_out]
    return Subset(pairs, train), Subset(pairs, [i for i, key in enumerate(keys) if key in held_out])


def shared_prompts(train: Sequence[EncodedPair], held_out: Sequence[EncodedPair]) -> int:
    """How many of the held-out pairs have a prompt that is trained on as well."""
    seen = set(prompt_keys(train))
    return sum(key in seen for key in prompt_keys(held_out))
