"""Weighted sources: how many pairs of each source an epoch takes, and which."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from prefopt.data.pairs import Concatenated, Subset
from prefopt.errors import DataError
from prefopt.storage import text_number
from prefopt.types import EncodedPair


class Mixture:
    """Draws the pairs of each epoch from several sources, in proportion to their weights.

    An epoch has as many pairs as all sources together. Each source is read in passes, each shuffled anew, and an epoch
    resumes where the one before it stopped: no pair is drawn again before all others of its source were drawn as often.

    Args:
        bounds: index of the first pair of each source, and the number of all pairs; no source is empty.
        weights: of each source, finite and above 0; only their ratios matter.
        seed: of the shuffling.
    """

    def __init__(self, bounds: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.bounds, self.seed = tuple(bounds), seed
        self.draws = apportion(bounds[-1], weights)

    def __len__(self) -> int:
        return self.bounds[-1]

    @property
    def sizes(self) -> list[int]:
        return [end - begin for begin, end in zip(self.bounds, self.bounds[1:], strict=False)]

    def rows(self, epoch: int) -> torch.Tensor:
        """Indices of the pairs of an epoch, source by source, (n,) int32: a function of (seed, epoch) alone."""
        parts = []
        for source, (first, size, draws) in enumerate(zip(self.bounds, self.sizes, self.draws, strict=False)):
            begin, end = epoch * draws, (epoch + 1) * draws
            for turn in range(begin // size, -(-end // size)):
                one = self._pass(source, turn, size)
                parts.append(one[max(begin - turn * size, 0) : end - turn * size] + first)
        return torch.cat(parts)

    def shares(self, pairs: Sequence[EncodedPair]) -> list[tuple[float, Sequence[EncodedPair]]]:
        """(fraction of an epoch's pairs, pairs) of each source."""
        ranges = zip(self.bounds, self.bounds[1:], self.draws, strict=False)
        return [
            (draws / len(self), Subset(pairs, np.arange(begin, end, dtype=np.int32))) for begin, end, draws in ranges
        ]

    def lines(self, names: Iterable[str]) -> list[str]:
        """Lines of the report: pairs per epoch of each source."""
        out = [f"pairs per epoch, by data.weights: {len(self):,}"]
        for name, draws, size in zip(names, self.draws, self.sizes, strict=True):
            times = f"each of its {size:,} is drawn {draws / size:.3g} times"
            out.append(f"  {name}: {draws:,} ({draws / len(self):.1%}), {times}")
        return out

    def _pass(self, source: int, turn: int, size: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(text_number(f"{self.seed}:{source}:{turn}", 7))
        return torch.randperm(size, generator=generator, dtype=torch.int32)


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Partition `total` into integers in proportion to `weights`, by the largest-remainder method (ties: the first).

    Args: weights: finite, not negative, not all 0.
    """
    largest = max(weights)
    scaled = [weight / largest for weight in weights]  # so that their sum is finite
    exact = [total * weight / math.fsum(scaled) for weight in scaled]
    whole = [math.floor(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    return whole


def mixture_of(pairs: Sequence[EncodedPair], weights: Mapping[str, float], seed: int) -> Mixture:
    """The mixture of several sources, of which some pairs may be held out.

    Args: pairs: of all sources, concatenated, or a subset of them; weights: of each source, above 0, in that order.
    Raises: DataError when all pairs of a source are held out.
    """
    whole = pairs.pairs if isinstance(pairs, Subset) else pairs
    bounds = whole.bounds if isinstance(whole, Concatenated) else [0, len(whole)]
    if isinstance(pairs, Subset):
        bounds = pairs.rows.searchsorted(bounds).tolist()
    for name, begin, end in zip(weights, bounds, bounds[1:], strict=False):
        if begin == end:
            raise DataError(
                f"data.weights: all prompts of {name} are held out, so it has no training pairs (use --data.eval FILE, "
                "a smaller data.eval_fraction, or weight 0)"
            )
    return Mixture(bounds, list(weights.values()), seed)
