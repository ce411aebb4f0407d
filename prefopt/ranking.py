"""Win probabilities and rankings of K candidates from a judge's output. Tables are `(K, K)`, row against column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from prefopt.types import Judgement, WinProb


def pairwise_scores(logits: np.ndarray) -> np.ndarray:
    """How much row is preferred to column, averaged over both orders of presentation: `s_ij = (L_ij - L_ji) / 2`.

    Args: logits: the judge's logit that row beats column, with row presented first. Shape `(K, K)`.
    Returns: skew-symmetric table, shape `(K, K)`.
    """
    return (logits - logits.T) / 2


def win_probabilities(judgement: Judgement, mode: WinProb = "pairwise_sigmoid") -> np.ndarray:
    """P(row beats column) for each pair of candidates, one half on the diagonal, NaN where the judge failed.

    pairwise_sigmoid  sigmoid(s_ij), s_ij from both orders, or the difference of two scores
    blender_score     sigmoid(S_i - S_j), S_i = mean_j (L_ij - L_ji) over all K, i itself included

    Scores and logits are multiplied by the judgement's `scale` before the sigmoid.

    Args: judgement: scores, logits or probabilities. `pairwise_sigmoid` only averages probabilities over both orders.
    Returns: shape `(K, K)`, float64.
    Raises: ValueError for an unknown mode, or for probabilities with `blender_score`, which needs logits or scores.
    Reference: Wu et al., arXiv 2405.00675, section 4: the first is the paper's text, the second the authors' code,
        which for consistent logits is a sigmoid of twice the difference of scores.
    """
    if mode not in get_args(WinProb):
        raise ValueError(f"unknown mode of win probabilities {mode!r}")
    if mode == "blender_score":
        rank = order_scores(judgement, mode)
        return _sigmoid(_scaled(_difference(rank), judgement.scale))
    if judgement.probs is not None:
        probs = np.array(judgement.probs, dtype=np.float64)
        return (probs + 1 - probs.T) / 2  # both orders
    return _sigmoid(_scaled(_preferences(judgement), judgement.scale))


def reward_scale(setting: float | Literal["std"], judgements: Sequence[Judgement]) -> float:
    """The factor on a judge's scores before the sigmoid: the number itself, or 1 / std for the setting `std`.

    std = sqrt(sum over prompts and responses of (score - mean of the prompt)^2 / sum over prompts of (K - 1))

    This is the pooled within-prompt standard deviation; differences between prompts do not count, because only
    responses of the same prompt are compared. For logits, a response's score is its row mean. If all scores of each
    prompt are equal the factor is 1.

    Raises: ValueError for `std` with a judge that returns probabilities.
    """
    if setting != "std":
        return float(setting)
    squares, free = 0.0, 0
    groups = [np.array([])]
    for judgement in judgements:
        if judgement.probs is not None:
            raise ValueError("a judge that returns probabilities has no scores whose standard deviation could be used")
        order = order_scores(judgement)
        groups.append(order[np.isfinite(order)])
    largest = max(float(np.abs(group).max(initial=0.0)) for group in groups)
    unit = largest if largest > _MAX_SQUARED else 1.0  # keeps the squares below finite
    for group in groups:
        if len(group) > 1:
            squares += float(((group / unit - safe_mean(group / unit)) ** 2).sum())
            free += len(group) - 1
    spread = float(np.sqrt(squares / free)) if free else 0.0
    return 1 / spread / unit if spread > 1e-12 * max(1.0, largest / unit) else 1.0


def safe_mean(values: np.ndarray | Sequence[float]) -> float:
    """The mean, also of numbers whose sum overflows."""
    array = np.asarray(values, dtype=np.float64)
    with np.errstate(over="ignore"):
        mean = float(array.mean())
    return mean if np.isfinite(mean) or not np.isfinite(array).all() else float((array / array.size).sum())


def order_scores(judgement: Judgement, mode: WinProb = "pairwise_sigmoid") -> np.ndarray:
    """The numbers by which candidates are ranked, highest is best; NaN for a candidate without judgement. `(K,)`.

    pairwise_sigmoid  scores unchanged; logits: mean_k s_ik over all K, i itself included; probabilities: their mean
    blender_score     S_i = mean_j (L_ij - L_ji)
    """
    if mode == "blender_score":
        if judgement.probs is not None:
            raise ValueError("'blender_score' needs logits or scores, but this judge returns probabilities")
        return 2 * _row_means(_preferences(judgement))
    if judgement.scores is not None:
        return np.array(judgement.scores, dtype=np.float64)
    return _row_means(win_probabilities(judgement) if judgement.probs is not None else _preferences(judgement))


def mean_win_probabilities(judgement: Judgement) -> np.ndarray:
    """Mean probability that each response beats one of the K, counting itself as a tie; NaN without judgement. `(K,)`.

    For K = 1 it is one half.
    """
    table = win_probabilities(judgement)
    return table[0] if len(table) == 1 else _row_means(table)


def best_and_worst(order: np.ndarray) -> tuple[int, int] | str:
    """The indices of the highest and the lowest number (the first among equals); or the reason why there are none.

    Args: order: NaN for candidates without judgement. Shape `(K,)`.
    """
    known = np.flatnonzero(np.isfinite(order))
    if len(known) < 2:
        return "fewer than two judged"
    if order[known].max() == order[known].min():
        return "all scores equal"
    return int(known[order[known].argmax()]), int(known[order[known].argmin()])


def length_controlled(scores: np.ndarray, lengths: np.ndarray, *, rho: float, ddof: int = 0) -> np.ndarray:
    """Scores with a length penalty; both are standardised over the responses of one prompt.

    `s_i = (r_i - mean r) / std r - rho (l_i - mean l) / std l`; where all values are equal the standard score is 0.

    Args:
        scores, lengths: of the responses; responses whose score is NaN are excluded from both means. Shape `(K,)`.
        rho: weight of the length penalty; 0 turns it off.
        ddof: 0 divides variances by K, 1 by K - 1. It scales both terms alike, so the ranking does not depend on it.
    Returns: shape `(K,)`, NaN where the score is NaN.
    Reference: Wu et al., Thinking LLMs, arXiv 2410.10630, section on length control.
    """
    known = np.isfinite(scores)
    out = np.full(len(scores), np.nan)
    out[known] = _standard(scores[known], ddof) - rho * _standard(lengths[known].astype(np.float64), ddof)
    return out


def _standard(values: np.ndarray, ddof: int) -> np.ndarray:
    """The standard scores (values - mean) / std; zeros if the standard deviation is not above rounding error."""
    largest = float(np.abs(values).max(initial=0.0))
    values = values / largest if largest > _MAX_SQUARED else values
    std = values.std(ddof=ddof) if len(values) > ddof else 0.0
    if not std > 1e-12 * max(1.0, float(np.abs(values).max(initial=0.0))):
        return np.zeros(len(values))
    return (values - values.mean()) / std


def elo(wins: np.ndarray, *, ridge: float = 0.01) -> np.ndarray:
    """Elo ratings of candidates from pairwise wins: a Bradley-Terry fit with a ridge penalty.

    The ratings minimise `-sum_ij wins_ij log sigmoid(e_i - e_j) + ridge sum_i e_i^2`. They are in nats, with mean 0.

    Args:
        wins: number or fraction of comparisons that row won against column; NaN counts as 0. Shape `(K, K)`.
        ridge: weight of the penalty; without it a candidate that wins every comparison has no finite rating.
    Returns: shape `(K,)`.
    Raises: ValueError when there is no finite fit, which is possible with `ridge=0` only.
    Reference: Wu et al., Thinking LLMs, arXiv 2410.10630. The paper has no penalty.
    """
    from scipy.sparse.csgraph import connected_components

    wins = np.where(np.isnan(wins), 0.0, wins)
    np.fill_diagonal(wins, 0.0)
    if ridge == 0 and connected_components(wins > 0, connection="strong")[0] > 1:
        raise ValueError("no finite ratings: some candidates won every comparison with the others (use a ridge)")
    both, strengths = wins + wins.T, np.zeros(len(wins))

    def objective(e: np.ndarray) -> float:
        return float((wins * np.logaddexp(0, e[None, :] - e[:, None])).sum() + ridge * (e**2).sum())

    for _ in range(100):  # Newton's method on a convex function; steps are halved until they decrease it
        p = _sigmoid(strengths[:, None] - strengths[None, :])
        gradient = (wins * (1 - p)).sum(0) - (wins * (1 - p)).sum(1) + 2 * ridge * strengths
        weight = both * p * (1 - p)
        hessian = np.diag(weight.sum(1) + 2 * ridge) - weight
        # without a penalty the Hessian is singular, since adding a constant to all ratings changes nothing
        step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        if np.abs(step).max(initial=0.0) < 1e-12:
            break
        before = objective(strengths)
        while objective(strengths - step) > before and np.abs(step).max() > 1e-12:
            step = step / 2
        strengths = strengths - step
    return strengths - strengths.mean()


def _preferences(judgement: Judgement) -> np.ndarray:
    """s_ij, (K, K): the difference of two scores, or the pairwise scores of logits."""
    if judgement.scores is not None:
        return _difference(np.array(judgement.scores, dtype=np.float64))
    if judgement.logits is None:
        raise ValueError("this judge returns probabilities, but logits or scores are needed")
    with np.errstate(over="ignore"):
        return np.clip(pairwise_scores(np.array(judgement.logits, dtype=np.float64)), -_LARGEST, _LARGEST)


# Sums of a few numbers up to _LARGEST, and squares of numbers up to _MAX_SQUARED, do not overflow.
_LARGEST, _MAX_SQUARED = 1e300, 1e150


def _difference(scores: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.clip(scores[:, None] - scores[None, :], -_LARGEST, _LARGEST)


def _scaled(table: np.ndarray, scale: float) -> np.ndarray:
    with np.errstate(over="ignore"):
        return table * scale


def _row_means(table: np.ndarray) -> np.ndarray:
    """Means of each row without its NaNs; NaN where a candidate was compared with no other one."""
    known = ~np.isnan(table)
    others = known.sum(1) - known.diagonal()
    total = np.where(known, table, 0.0).sum(1)
    return np.where(others > 0, total / np.maximum(known.sum(1), 1), np.nan)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(x / 2)) / 2  # this form does not overflow
