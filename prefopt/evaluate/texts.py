"""Statistics of completions: length, diversity, how they ended."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from prefopt.types import Completion

ORDERS = (1, 2, 3)


@dataclass(frozen=True)
class TextFigures:
    """Of completions in groups, a group being those of one prompt. Fractions are of all completions, in [0, 1].

    Args:
        completions: how many there are.
        tokens, characters: mean length; tokens as generated, the EOS or end-of-turn token among them.
        distinct: distinct-1, -2 and -3 over the tokens of all completions together.
        distinct_in_group: the same within a group, averaged over groups; near 1 for a group of one.
        cut: fraction that reached the limit of tokens before an EOS or end-of-turn token.
        empty: fraction whose text is empty or white space.
        duplicates: fraction whose text occurred in its group before.
    """

    completions: int
    tokens: float
    characters: float
    distinct: tuple[float, ...]
    distinct_in_group: tuple[float, ...]
    cut: float
    empty: float
    duplicates: float


def distinct_n(sequences: Iterable[Sequence[Hashable]], n: int) -> float:
    """Different n-grams per n-gram, in (0, 1]; NaN where no sequence has n items.

    n-grams do not cross from one sequence into the next. It falls as more text is counted: compare only figures of as
    many completions of like length.

    Reference: Li et al., A Diversity-Promoting Objective Function for Neural Conversation Models, arXiv 1510.03055.
        Differs: they divide by the number of tokens, this by the number of n-grams, so that each order can reach 1.
    """
    grams = [tuple(seq[i : i + n]) for seq in sequences for i in range(len(seq) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def describe_texts(groups: Sequence[Sequence[Completion]]) -> TextFigures:
    """The figures of these completions, one group per prompt. Raises: ValueError when there are none."""
    every = [completion for group in groups for completion in group]
    if not every:
        raise ValueError("no completions to describe")
    within = np.array([[distinct_n([c.token_ids for c in group], n) for n in ORDERS] for group in groups])
    known = ~np.isnan(within)
    totals = np.where(known, within, 0.0).sum(0)
    repeated = sum(len(group) - len({c.text for c in group}) for group in groups)
    return TextFigures(
        completions=len(every),
        tokens=float(np.mean([len(c.token_ids) for c in every])),
        characters=float(np.mean([len(c.text) for c in every])),
        distinct=tuple(distinct_n([c.token_ids for c in every], n) for n in ORDERS),
        distinct_in_group=tuple(float(t / k) if k else float("nan") for t, k in zip(totals, known.sum(0), strict=True)),
        cut=float(np.mean([c.finish_reason == "length" for c in every])),
        empty=float(np.mean([not c.text.strip() for c in every])),
        duplicates=repeated / len(every),
    )
