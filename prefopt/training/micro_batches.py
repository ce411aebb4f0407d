"""Partitions the pairs of a step over ranks and micro-batches: similar tokens per rank, similar lengths per batch."""

from __future__ import annotations

import heapq
import math

import numpy as np


def micro_batches(lengths: np.ndarray, tokens: np.ndarray, size: int, world: int) -> list[list[np.ndarray]]:
    """The indices of the pairs in each micro-batch of each rank; every pair is in exactly one of them.

    Sorting by length reduces padding. It does not change the gradient, because the pairs of one optimizer step are
    summed. Pairs are assigned from the longest to the shortest, each to the rank with the fewest tokens so far that has
    not reached its maximum. All ranks have the same, minimal number of micro-batches; some may be empty.

    Args:
        lengths: padded length of each pair. Shape `(n,)`.
        tokens: input tokens of each pair. Shape `(n,)`.
        size: maximum number of pairs per micro-batch.
        world: number of ranks.
    Returns: for each rank its micro-batches, each int64 indices from the longest pair to the shortest.
    """
    passes = max(1, math.ceil(len(lengths) / (size * world)))
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    by_rank = [order] if world == 1 else _assign(order, tokens, passes * size, world)
    return [[mine[len(mine) * i // passes : len(mine) * (i + 1) // passes] for i in range(passes)] for mine in by_rank]


def _assign(order: np.ndarray, tokens: np.ndarray, maximum: int, world: int) -> list[np.ndarray]:
    """Assign each pair of `order` to the rank with the fewest tokens so far, at most `maximum` pairs per rank."""
    loads = [(0, rank) for rank in range(world)]  # a heap of (tokens so far, rank)
    assigned: list[list[int]] = [[] for _ in range(world)]
    for number in order.tolist():
        load, rank = heapq.heappop(loads)
        assigned[rank].append(number)
        if len(assigned[rank]) < maximum:
            heapq.heappush(loads, (load + int(tokens[number]), rank))
    return [np.array(indices, np.int64) for indices in assigned]
