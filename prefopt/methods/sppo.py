"""Self-Play Preference Optimization (arXiv 2405.00675): two regressions of log-ratios on win probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prefopt.method import Method, pair_term, reward_metrics
from prefopt.rounds_method import RoundsMethod
from prefopt.types import ChosenPair, Column, LossOutput, Needs, PairBatch, PairStats, ScoredGroup, WinProb

if TYPE_CHECKING:
    import torch

Variant = Literal["soft", "single", "hard"]
_CHOSEN = Column("chosen_win_prob", aliases=("chosen_probs_win",), low=0.0, high=1.0)
_REJECTED = Column("rejected_win_prob", aliases=("chosen_probs_lose",), low=0.0, high=1.0)
# a column of its own: the authors' files hold both numbers, and P(chosen beats rejected) is not P(chosen beats policy)
_PAIR = Column("pair_win_prob", aliases=("chosen_probs",), low=0.0, high=1.0)


def sppo(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    chosen_win_prob: torch.Tensor | None = None,
    rejected_win_prob: torch.Tensor | None = None,
    *,
    beta: float,
    variant: Variant = "soft",
    target_clamp: float | None = None,
) -> torch.Tensor:
    """The SPPO loss of each pair.

    a = chosen_logratios,  b = rejected_logratios,  eta = 1 / beta; each target eta (.) is clamped to +-target_clamp
    soft    1/2 [(a - eta (P_w - 1/2))^2 + (b - eta (P_l - 1/2))^2]
    single  1/2 [(a - eta (p - 1/2))^2 + (b + eta (p - 1/2))^2]
    hard    (a - eta/2)^2 + (b + eta/2)^2, without the factor 1/2, as in TRL

    Args:
        chosen_logratios, rejected_logratios: log policy minus log reference, summed over tokens. Shape `(pairs,)`.
        chosen_win_prob: soft: P_w, the probability that the chosen completion beats one of the policy; single: p, that
            it beats the rejected one; hard: None. Shape `(pairs,)`.
        rejected_win_prob: soft: P_l, the probability that the rejected completion beats one of the policy; else None.
        beta: 1 / eta of the paper.
        variant: source of the targets, as above.
        target_clamp: largest absolute value of a target, in nats; None: no limit. Not in the paper.
    Returns: unreduced loss, shape `(pairs,)`, in the log-ratios' dtype.
    Raises: ValueError for an unknown variant, or probabilities that are missing or unused.
    Reference: Wu et al., Self-Play Preference Optimization for Language Model Alignment, arXiv 2405.00675,
        algorithm 1. Differs from the authors' code: float64 targets are cast to the log-ratios' dtype, theirs promote
        the loss; `hard` is TRL's.
    """
    given = (chosen_win_prob is not None, rejected_win_prob is not None)
    expected = {"soft": (True, True), "single": (True, False), "hard": (False, False)}.get(variant)
    if expected is None:
        raise ValueError(f"unknown variant {variant!r}")
    if given != expected:
        reads = "chosen_win_prob and rejected_win_prob" if all(expected) else "chosen_win_prob" if any(expected) else ""
        raise ValueError(f"variant {variant!r} reads {reads or 'no probabilities'}, and nothing else")

    limit = math.inf if target_clamp is None else target_clamp
    if variant == "hard":
        target = min(0.5 / beta, limit)
        return (chosen_logratios - target) ** 2 + (rejected_logratios + target) ** 2
    assert chosen_win_prob is not None
    chosen_win_prob = chosen_win_prob.to(chosen_logratios.dtype)
    lose_prob = 1 - chosen_win_prob if rejected_win_prob is None else rejected_win_prob.to(rejected_logratios.dtype)
    chosen_error = chosen_logratios - ((chosen_win_prob - 0.5) / beta).clamp(-limit, limit)
    rejected_error = rejected_logratios - ((lose_prob - 0.5) / beta).clamp(-limit, limit)
    return (chosen_error**2 + rejected_error**2) / 2


@dataclass(frozen=True)
class SPPO(RoundsMethod, Method):
    """Self-Play Preference Optimization: the log-ratio of each completion is regressed on its win probability."""

    beta: float = 1e-3
    """1 / eta of the paper: the targets are (win probability - 1/2) / beta, in nats; > 0."""
    # eta 1e3 in the paper (arXiv 2405.00675), beta 0.001 in the authors' scripts

    variant: Variant = "soft"
    """Source of the targets: soft: the paper's, from columns chosen_win_prob and rejected_win_prob; single: from column
    pair_win_prob, P(chosen beats rejected); hard: probabilities 1 and 0, with twice the loss scale."""
    # arXiv 2405.00675, algorithm 1

    win_prob: WinProb = "pairwise_sigmoid"
    """In rounds, how win probabilities and the ranking follow from the judge: pairwise_sigmoid: the paper's;
    blender_score: the authors' code, about twice as sharp, which ranks by one score per candidate."""
    # arXiv 2405.00675, section 4; rank.py and compute_prob of the authors' code

    target_clamp: float | None = None
    """Largest absolute value of a target, in nats; none: no limit. Limits the effect of over-confident judges."""
    # not in the paper; over-confidence on near-identical responses is reported in arXiv 2606.01561

    def __post_init__(self) -> None:
        self._require_positive("beta")
        self._require_choice("variant", Variant)
        self._require_choice("win_prob", WinProb)
        if self.target_clamp is not None:
            self._require_positive("target_clamp")

    @property
    def needs(self) -> Needs:
        columns = {"soft": (_CHOSEN, _REJECTED), "single": (_PAIR,), "hard": ()}[self.variant]
        return Needs(reference="sequence", columns=columns)

    def loss(self, stats: PairStats, batch: PairBatch) -> LossOutput:
        probs = [batch.columns[column.name] for column in self.needs.columns]
        losses = sppo(
            stats.chosen_logratios,
            stats.rejected_logratios,
            *probs,
            beta=self.beta,
            variant=self.variant,
            target_clamp=self.target_clamp,
        )
        # no accuracy/logit: the completions have separate regressions, and no logit compares them
        return LossOutput(terms=(pair_term(losses),), metrics=reward_metrics(stats, self.beta))

    def other_optimum(self) -> str:
        return (
            "SPPO's log-ratios converge to (win probability - 1/2) / beta, not to reward / beta, so its optimum is not "
            "pi*."
        )

    def loss_at_reference(self) -> float | None:
        target = 0.5 / self.beta if self.target_clamp is None else min(0.5 / self.beta, self.target_clamp)
        return 2 * target**2 if self.variant == "hard" else None

    @property
    def ranks_by(self) -> WinProb:
        return self.win_prob

    def make_pairs(self, group: ScoredGroup) -> Sequence[ChosenPair] | str:
        """The best and the worst candidate by aggregate score, with their mean win probabilities as columns.

        P_i = 1/K sum_k P(i beats k) over the K judged candidates, i itself included as a tie
        (arXiv 2405.00675, algorithm 1, line 5).
        """
        import numpy as np

        from prefopt.ranking import best_and_worst, win_probabilities

        ends = best_and_worst(self.order(group))
        if isinstance(ends, str):
            return ends
        chosen, rejected = ends
        probs = win_probabilities(group.judgement, self.ranks_by)
        columns = {
            _CHOSEN.name: float(np.nanmean(probs[chosen])),
            _REJECTED.name: float(np.nanmean(probs[rejected])),
            _PAIR.name: float(probs[chosen, rejected]),
        }
        unknown = [column.name for column in self.needs.columns if math.isnan(columns[column.name])]
        if unknown:
            return f"{unknown[0]} not judged"
        return [ChosenPair(group.judged[chosen], group.judged[rejected], columns)]

    def describe(self) -> str:
        return f"{self.variant}, beta {self.beta:g} (eta {1 / self.beta:g})"
