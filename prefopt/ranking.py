"""From a judge's numbers to win probabilities and an order of candidates. Tables are `(K, K)`, row against column."""

from __future__ import annotations

from typing import get_args

import numpy as np

from prefopt.types import Judgement, WinProb


def pairwise_scores(logits: np.ndarray) -> np.ndarray:
    """How much row is preferred to column, whichever stands first: `s_ij = (L_ij - L_ji) / 2`.

    Args: logits: of row against column with row first. Shape `(K, K)`.
    Returns: skew-symmetric, shape `(K, K)`.
    """
    return (logits - logits.T) / 2


def win_probabilities(judgement: Judgement, mode: WinProb = "pairwise_sigmoid") -> np.ndarray:
    """P(row beats column) of each pair of candidates, one half on the diagonal, NaN where the judge failed.

    pairwise_sigmoid  sigmoid(s_ij), s_ij from both orders, or the difference of two scores
    blender_score     sigmoid(S_i - S_j), S_i = mean_j (L_ij - L_ji) over all K, i itself included

    Args: judgement: with scores, logits or probabilities; the latter are taken as they are by `pairwise_sigmoid`.
    Returns: shape `(K, K)`, float64.
    Raises: ValueError for an unknown mode, or probabilities under `blender_score`, which reads logits.
    Reference: Wu et al., arXiv 2405.00675, section 4: the first is the paper's text, the second the authors' code,
        which for consistent logits is a sigmoid of twice the difference of scores.
    """
    if mode not in get_args(WinProb):
        raise ValueError(f"unknown way to a win probability {mode!r}")
    if mode == "blender_score":
        rank = order_scores(judgement, mode)
        return _sigmoid(rank[:, None] - rank[None, :])
    if judgement.probs is not None:
        probs = np.array(judgement.probs, dtype=np.float64)
        return (probs + 1 - probs.T) / 2  # both orders
    return _sigmoid(_preferences(judgement))


def order_scores(judgement: Judgement, mode: WinProb = "pairwise_sigmoid") -> np.ndarray:
    """The numbers by which candidates are ranked, best highest; NaN where nothing is known of one. Shape `(K,)`.

    pairwise_sigmoid  the mean of s_ik over all K, i itself included; of probabilities, their mean; scores as they are
    blender_score     S_i = mean_j (L_ij - L_ji)
    """
    if mode == "blender_score":
        if judgement.probs is not None:
            raise ValueError("'blender_score' reads a judge's logits or scores, and this judge gives probabilities")
        return 2 * _row_means(_preferences(judgement))
    if judgement.scores is not None:
        return np.array(judgement.scores, dtype=np.float64)
    return _row_means(win_probabilities(judgement) if judgement.probs is not None else _preferences(judgement))


def best_and_worst(order: np.ndarray) -> tuple[int, int] | str:
    """Where the highest and the lowest of these numbers stand, the first of equals; or why there are none, in words.

    Args: order: NaN for what is unknown. Shape `(K,)`.
    """
    known = np.flatnonzero(np.isfinite(order))
    if len(known) < 2:
        return "fewer than two judged"
    if order[known].max() == order[known].min():
        return "all scores equal"
    return int(known[order[known].argmax()]), int(known[order[known].argmin()])


def _preferences(judgement: Judgement) -> np.ndarray:
    if judgement.scores is not None:
        scores = np.array(judgement.scores, dtype=np.float64)
        return scores[:, None] - scores[None, :]
    if judgement.logits is None:
        raise ValueError("this judge gives probabilities, and logits or scores are needed")
    return pairwise_scores(np.array(judgement.logits, dtype=np.float64))


def _row_means(table: np.ndarray) -> np.ndarray:
    """Means over what is known of each row; NaN where nothing but the candidate itself is."""
    known = ~np.isnan(table)
    others = known.sum(1) - known.diagonal()
    total = np.where(known, table, 0.0).sum(1)
    return np.where(others > 0, total / np.maximum(known.sum(1), 1), np.nan)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(x / 2)) / 2
