"""A Bradley-Terry reward model: one score per completion; score differences are log-odds of being preferred."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefopt.method import Method, Metrics, ahead, pair_term, per_pair
from prefopt.types import Column, LossOutput, Needs, PairBatch, PairStats

if TYPE_CHECKING:
    import torch

_MARGIN = Column("margin", low=0.0)


def reward_model(
    chosen_scores: torch.Tensor,
    rejected_scores: torch.Tensor,
    *,
    margin: torch.Tensor | None = None,
    center_coefficient: float = 0.0,
) -> torch.Tensor:
    """The Bradley-Terry loss of each pair.

    -log s(s_w - s_l - m) + c (s_w + s_l)^2

    Args:
        chosen_scores, rejected_scores: s_w and s_l, the model's score of each completion. Shape `(pairs,)`.
        margin: m, the margin by which the chosen score should lead; None: 0. Shape `(pairs,)`.
        center_coefficient: c, weight of the penalty that centres scores at 0, which the first term leaves undetermined.
    Returns: unreduced loss, shape `(pairs,)`.
    Reference: Ouyang et al., Training language models to follow instructions with human feedback, arXiv 2203.02155,
        eq. 1, for pairs; the margin: Touvron et al., Llama 2, arXiv 2307.09288, eq. 2; the centring: Eisenstein et al.,
        Helping or Herding?, arXiv 2312.09244, eq. 2. Differs from TRL's code: nothing.
    """
    from torch.nn.functional import logsigmoid

    differences = chosen_scores - rejected_scores
    if margin is not None:
        differences = differences - margin.to(differences.dtype)
    losses = -logsigmoid(differences)
    if center_coefficient:
        losses = losses + center_coefficient * (chosen_scores + rejected_scores) ** 2
    return losses


def score_metrics(stats: PairStats) -> Metrics:
    """The scores as rewards, under the metric names of all methods."""
    assert stats.chosen_scores is not None
    assert stats.rejected_scores is not None
    chosen, rejected = stats.chosen_scores.detach(), stats.rejected_scores.detach()
    return per_pair(
        rewards__chosen=chosen,
        rewards__rejected=rejected,
        rewards__margins=chosen - rejected,
        rewards__accuracies=ahead(chosen, rejected),
    )


@dataclass(frozen=True)
class RewardModel(Method):
    """Bradley-Terry reward model: a classifier with one logit, read at the end of prompt and completion."""

    center_coefficient: float = 0.0
    """Weight of the penalty (chosen score + rejected score)^2, which centres scores at 0; >= 0."""
    # off in TRL; 0.01 is the value of arXiv 2312.09244

    use_margin: bool = False
    """Read the column `margin`: the margin by which the chosen score should lead."""
    # Llama 2's reward models, arXiv 2307.09288, section 3.2.2; ordinary pairs have none

    def __post_init__(self) -> None:
        coefficient = self.center_coefficient
        self._require(math.isfinite(coefficient) and coefficient >= 0, "center_coefficient", "a finite number >= 0")

    @property
    def needs(self) -> Needs:
        return Needs(reference="none", output="scores", columns=(_MARGIN,) if self.use_margin else ())

    def loss(self, stats: PairStats, batch: PairBatch) -> LossOutput:
        assert stats.chosen_scores is not None
        assert stats.rejected_scores is not None
        losses = reward_model(
            stats.chosen_scores,
            stats.rejected_scores,
            margin=batch.columns[_MARGIN.name] if self.use_margin else None,
            center_coefficient=self.center_coefficient,
        )
        return LossOutput(terms=(pair_term(losses),), metrics=score_metrics(stats))

    def describe(self) -> str:
        centred = f"center_coefficient {self.center_coefficient:g}" if self.center_coefficient else ""
        return ", ".join(part for part in (centred, "with margins" if self.use_margin else "") if part)
