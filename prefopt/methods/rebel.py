"""REBEL (arXiv 2404.16767): the difference of two log-ratios is regressed on the difference of two scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prefopt.method import CHOSEN_SCORE, REJECTED_SCORE, Method, logit_accuracy, pair_term, per_pair, reward_metrics
from prefopt.rounds_method import ScoredRoundsMethod
from prefopt.types import LossOutput, Needs, PairBatch, PairStats

if TYPE_CHECKING:
    import torch


def rebel(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    chosen_scores: torch.Tensor,
    rejected_scores: torch.Tensor,
    *,
    eta: float,
) -> torch.Tensor:
    """The REBEL loss of each pair.

    (D_w - D_l - eta (r_w - r_l))^2

    Args:
        chosen_logratios, rejected_logratios: D, log policy minus log reference, summed. Shape `(pairs,)`.
        chosen_scores, rejected_scores: r, what a judge gave the completions. Shape `(pairs,)`.
        eta: nats per unit of score.
    Returns: unreduced loss in squared nats, shape `(pairs,)`.
    Reference: Gao et al., REBEL, arXiv 2404.16767, algorithm 1, as the authors' code scales it: the paper divides the
        log-ratios by eta, and its loss is this one divided by eta^2.
    """
    target = eta * (chosen_scores - rejected_scores).to(chosen_logratios.dtype)
    return (chosen_logratios - rejected_logratios - target) ** 2


@dataclass(frozen=True)
class REBEL(ScoredRoundsMethod, Method):
    """REBEL: squared error between the difference of log-ratios and that of scores, which are columns of the data."""

    default_lr: ClassVar[float | None] = 3e-7
    default_lr_source: ClassVar[str] = "the authors' scripts, arXiv 2404.16767"

    eta: float = 1.0
    """Nats of log-ratio per unit of score difference; > 0. Set it by the scale of the scores."""
    # 1 in three of the authors' scripts, 1e6 in the one for large batches

    def __post_init__(self) -> None:
        self._require_positive("eta")

    @property
    def needs(self) -> Needs:
        return Needs(reference="sequence", columns=(CHOSEN_SCORE, REJECTED_SCORE))

    def loss(self, stats: PairStats, batch: PairBatch) -> LossOutput:
        chosen, rejected = stats.chosen_logratios, stats.rejected_logratios
        scores = batch.columns[CHOSEN_SCORE.name], batch.columns[REJECTED_SCORE.name]
        losses = rebel(chosen, rejected, *scores, eta=self.eta)
        gap = (scores[0] - scores[1]).to(chosen.dtype)
        metrics = reward_metrics(stats, 1 / self.eta) | logit_accuracy(chosen - rejected) | per_pair(score_gap=gap)
        return LossOutput(terms=(pair_term(losses),), metrics=metrics)

    def other_optimum(self) -> str:
        return "pi* is where DPO's sigmoid loss leads; REBEL regresses on the scores of the data, and leads elsewhere."

    def describe(self) -> str:
        return f"eta {self.eta:g}"
