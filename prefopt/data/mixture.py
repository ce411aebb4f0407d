"""Several sources with weights: how many pairs of each an epoch takes, and which."""

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
    """Draws the pairs of each epoch from several sources, as many of each as its weight says.

    An epoch has as many pairs as all sources together. Each source is gone through in passes, every pass shuffled anew,
    and an epoch goes on where the one before it has stopped: none of its pairs is drawn once more before all others
    were drawn as often. So a source whose share exceeds its size is repeated in whole passes and a random remainder.

    Args:
        bounds: the numbers of the first pair of each source, and of all pairs; no source is empty.
        weights: of each source, finite and above 0; only their ratios count.
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
        """The numbers of the pairs of an epoch, source by source, (n,) int32: a function of (seed, epoch) alone."""
        parts = []
        for source, (first, size, draws) in enumerate(zip(self.bounds, self.sizes, self.draws, strict=False)):
            begin, end = epoch * draws, (epoch + 1) * draws
            for turn in range(begin // size, -(-end // size)):
                one = self._pass(source, turn, size)
                parts.append(one[max(begin - turn * size, 0) : end - turn * size] + first)
        return torch.cat(parts)

    def shares(self, pairs: Sequence[EncodedPair]) -> list[tuple[float, Sequence[EncodedPair]]]:
        """The pairs of each source, and what share of an epoch's pairs it has."""
        ranges = zip(self.bounds, self.bounds[1:], self.draws, strict=False)
        return [
            (draws / len(self), Subset(pairs, np.arange(begin, end, dtype=np.int32))) for begin, end, draws in ranges
        ]

    def lines(self, names: Iterable[str]) -> list[str]:
        """What an epoch takes of each source, one line each."""
        out = [f"an epoch takes {len(self):,} pairs by weight:"]
        for name, draws, size in zip(names, self.draws, self.sizes, strict=True):
            out.append(f"  {name}: {draws:,} ({draws / len(self):.1%}), each of its {size:,} {draws / size:.3g} times")
        return out

    def _pass(self, source: int, turn: int, size: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(text_number(f"{self.seed}:{source}:{turn}", 7))
        return torch.randperm(size, generator=generator, dtype=torch.int32)


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` shared out in whole numbers by weight; what is left over goes to the largest remainders, first to first.

    Args: weights: finite, not negative, not all 0.
    """
    largest = max(weights)
    scaled = [weight / largest for weight in weights]  # so that their sum is finite
    exact = [total * weight / math.fsum(scaled) for weight in scaled]
    whole = [math.floor(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    return whole


def mixture_of(pairs: Sequence[EncodedPair], weights: Mapping[str, float], seed: int) -> Mixture:
    """The mixture of what is left of several sources.

    Args: pairs: of all sources, one after the other, or some of them; weights: of each source, above 0, in that order.
    Raises: DataError when nothing is left of a source.
    """
    whole = pairs.pairs if isinstance(pairs, Subset) else pairs
    bounds = whole.bounds if isinstance(whole, Concatenated) else [0, len(whole)]
    if isinstance(pairs, Subset):
        bounds = pairs.rows.searchsorted(bounds).tolist()
    for name, begin, end in zip(weights, bounds, bounds[1:], strict=False):
        if begin == end:
            raise DataError(
                f"data.weights: nothing is left of {name} to train on, all its prompts are held out (--data.eval FILE, "
                "a smaller data.eval_fraction, or weight 0)"
            )
    return Mixture(bounds, list(weights.values()), seed)
