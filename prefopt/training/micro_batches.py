"""Who computes which pairs of a step: as many tokens for every process, rows of like length in one pass."""

from __future__ import annotations

import heapq
import math

import numpy as np


def micro_batches(lengths: np.ndarray, tokens: np.ndarray, size: int, world: int) -> list[list[np.ndarray]]:
    """The pairs of each pass of each process, by their numbers; every pair is in one of them.

    Sorting happens inside one optimizer step, whose gradient is a sum: it saves padding and changes nothing. Pairs are
    dealt out from the longest on, each to the process with the fewest tokens so far that has a place left. All have the
    same number of passes, no more than are needed; one of no pairs is legal.

    Args: lengths: (n,) what rows are sorted by; tokens: (n,) the work of each pair; size: most pairs of a pass;
        world: processes.
    Returns: passes of each process, each int64 numbers from the longest row to the shortest.
    """
    passes = max(1, math.ceil(len(lengths) / (size * world)))
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    shares = [order] if world == 1 else _dealt(order, tokens, passes * size, world)
    return [[mine[len(mine) * i // passes : len(mine) * (i + 1) // passes] for i in range(passes)] for mine in shares]


def _dealt(order: np.ndarray, tokens: np.ndarray, places: int, world: int) -> list[np.ndarray]:
    """`order` shared out among processes of so many places each."""
    least = [(0, rank) for rank in range(world)]
    shares: list[list[int]] = [[] for _ in range(world)]
    for number in order.tolist():
        done, rank = heapq.heappop(least)
        shares[rank].append(number)
        if len(shares[rank]) < places:
            heapq.heappush(least, (done + int(tokens[number]), rank))
    return [np.array(share, np.int64) for share in shares]
