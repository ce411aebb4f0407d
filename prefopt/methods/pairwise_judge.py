"""A pairwise judge: one logit for a prompt and two completions, whose order in the input matters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefopt.method import Method, ahead, pair_term, per_pair
from prefopt.types import LossOutput, Needs, PairBatch, PairStats

if TYPE_CHECKING:
    import torch


def pairwise_judge(chosen_first: torch.Tensor, rejected_first: torch.Tensor) -> torch.Tensor:
    """The loss of each pair, averaged over both orders of the completions.

    1/2 [-log s(L(w, l)) - log s(-L(l, w))]

    Args:
        chosen_first: L(w, l), the logit that the first completion wins, with the chosen one first. Shape `(pairs,)`.
        rejected_first: L(l, w), the same with the rejected one first. Shape `(pairs,)`.
    Returns: unreduced loss, shape `(pairs,)`.
    Reference: Jiang et al., LLM-Blender, arXiv 2306.02561, section 4 (PairRanker), the binary loss on one quality
        measure. Differs from the authors' code: the model outputs one logit for the pair, theirs a score for each
        completion, whose difference is the logit.
    """
    from torch.nn.functional import softplus

    return (softplus(-chosen_first) + softplus(rejected_first)) / 2


@dataclass(frozen=True)
class PairwiseJudgeMethod(Method):
    """Pairwise judge: a classifier with one logit that reads a prompt and two completions, trained in both orders."""

    @property
    def needs(self) -> Needs:
        return Needs(reference="none", output="scores", sequences="both_orders")

    def loss(self, stats: PairStats, batch: PairBatch) -> LossOutput:
        assert stats.chosen_scores is not None
        assert stats.rejected_scores is not None
        losses = pairwise_judge(stats.chosen_scores, stats.rejected_scores)
        first, second = stats.chosen_scores.detach(), stats.rejected_scores.detach()
        # the score of the chosen completion against the rejected one, over both orders: (L(w, l) - L(l, w)) / 2
        chosen = (first - second) / 2
        metrics = per_pair(
            rewards__chosen=chosen,
            rewards__rejected=-chosen,
            rewards__margins=2 * chosen,
            rewards__accuracies=ahead(chosen),
            # position bias: the mean logit of the first place, and how often both orders disagree
            order__bias=(first + second) / 2,
            order__contradictions=ahead(first.sign() * second.sign()),
        )
        return LossOutput(terms=(pair_term(losses),), metrics=metrics)
