"""How near the rounds of a run are to exact self-play, from the tables of their policies. Numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prefopt.testbed import truth


@dataclass(frozen=True)
class SelfPlay:
    """What became of a policy in R rounds, each a list over them; means over prompts.

    Args:
        last: exploitability of the policy after round 0 (the start), 1, ..., R.
        average: exploitability of the average of the policies after rounds 1..k, k = 1..R; the start at k = 0.
        average_of_starts: the same of those that rounds 1..k began with, which is the average in the theory.
        step: total variation between each round's policy and one exact step from the policy that it began with.
        path: total variation between each round's policy and the same number of exact steps from the first policy.
    """

    last: tuple[float, ...]
    average: tuple[float, ...]
    average_of_starts: tuple[float, ...]
    step: tuple[float, ...]
    path: tuple[float, ...]


def self_play(policies: Sequence[torch.Tensor], preference: torch.Tensor, eta: float) -> SelfPlay:
    """The figures of a run.

    Args: policies: log-probabilities before round 1 and after each round, `(P, K)` each. preference: of row against
        column, `(P, K, K)`. eta: of the exact step, `truth.multiplicative_weights`.
    """

    def exploitability(table: torch.Tensor) -> float:
        return float(truth.exploitability(table, preference).mean())

    def distance(one: torch.Tensor, other: torch.Tensor) -> float:
        return float(truth.total_variation(one, other).mean())

    exact = exact_path(policies[0], preference, eta, len(policies) - 1)
    steps = [truth.multiplicative_weights(table, preference, eta) for table in policies[:-1]]
    rounds = range(1, len(policies))
    last = [exploitability(table) for table in policies]
    return SelfPlay(
        last=(*last,),
        average=(last[0], *(exploitability(truth.mixture(policies[1 : k + 1])) for k in rounds)),
        average_of_starts=(last[0], *(exploitability(truth.mixture(policies[:k])) for k in rounds)),
        step=(*map(distance, policies[1:], steps),),
        path=(*map(distance, policies[1:], exact[1:]),),
    )


def exact_path(start: torch.Tensor, preference: torch.Tensor, eta: float, rounds: int) -> list[torch.Tensor]:
    """The start and what so many exact steps make of it, `(P, K)` each."""
    tables = [start]
    for _ in range(rounds):
        tables.append(truth.multiplicative_weights(tables[-1], preference, eta))
    return tables
