"""Several sources with weights: how many pairs of each an epoch takes, and which."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch

from prefopt.data.pairs import Subset
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

    def _pass(self, source: int, turn: int, size: int) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.seed}:{source}:{turn}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
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


def described(names: Sequence[str], mixture: Mixture) -> list[str]:
    """What an epoch takes of each source, one line each."""
    drawn = np.array(mixture.draws) / np.array(mixture.sizes)
    return [
        f"  {name}: {draws:,} of {len(mixture):,} pairs of an epoch ({draws / len(mixture):.1%}), each of its {size:,} "
        f"{times:.3g} times"
        for name, draws, size, times in zip(names, mixture.draws, mixture.sizes, drawn.tolist(), strict=True)
    ]
