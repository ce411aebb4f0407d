"""Reward-aware preference optimization (arXiv 2406.11704): implicit and given reward differences are made equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from prefopt.method import CHOSEN_SCORE, REJECTED_SCORE, Method, logit_accuracy, pair_term, per_pair, reward_metrics
from prefopt.rounds_method import ScoredRoundsMethod
from prefopt.types import LossOutput, Needs, PairBatch, PairStats

if TYPE_CHECKING:
    import torch

Distance = Literal["bwd_kl", "fwd_kl", "sq"]


def reward_rpo(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    chosen_scores: torch.Tensor,
    rejected_scores: torch.Tensor,
    *,
    beta: float,
    eta: float,
    distance: Distance = "bwd_kl",
) -> torch.Tensor:
    """The reward-aware loss of each pair.

    u = beta (D_w - D_l),  t = eta (r_w - r_l)
    bwd_kl  KL(Bernoulli s(t) || Bernoulli s(u))
    fwd_kl  KL(Bernoulli s(u) || Bernoulli s(t))
    sq      (u - t)^2

    Args:
        chosen_logratios, rejected_logratios: D, log policy minus log reference, summed. Shape `(pairs,)`.
        chosen_scores, rejected_scores: r, what a judge gave the completions. Shape `(pairs,)`.
        beta: KL-regularisation strength.
        eta: scale of the scores.
        distance: how u and t are compared; for large t bwd_kl is DPO's loss.
    Returns: unreduced loss, shape `(pairs,)`.
    Raises: ValueError for an unknown distance.
    Reference: Nemotron-4, arXiv 2406.11704, and arXiv 2502.00203. Differs from NeMo-Aligner's code: nothing.
    """
    from torch.nn.functional import logsigmoid

    u = beta * (chosen_logratios - rejected_logratios)
    t = eta * (chosen_scores - rejected_scores).to(u.dtype)
    if distance == "sq":
        return (u - t) ** 2
    if distance == "bwd_kl":
        p, q = t, u
    elif distance == "fwd_kl":
        p, q = u, t
    else:
        raise ValueError(f"unknown distance {distance!r}")
    return p.sigmoid() * (logsigmoid(p) - logsigmoid(q)) + (-p).sigmoid() * (logsigmoid(-p) - logsigmoid(-q))


@dataclass(frozen=True)
class RewardRPO(ScoredRoundsMethod, Method):
    """Reward-aware preference optimization: the implicit reward difference is fitted to that of the data's scores."""

    ambiguous: ClassVar[tuple[str, ...]] = ("rpo",)

    beta: float = 0.2
    """KL-regularisation strength; > 0."""
    # 0.2 and eta 1 in NeMo-Aligner's config

    eta: float = 1.0
    """Scale of the scores; > 0."""

    distance: Distance = "bwd_kl"
    """How the two differences are compared: backward KL, forward KL or squared."""

    def __post_init__(self) -> None:
        self._require_positive("beta")
        self._require_positive("eta")
        self._require_choice("distance", Distance)

    @property
    def needs(self) -> Needs:
        return Needs(reference="sequence", columns=(CHOSEN_SCORE, REJECTED_SCORE))

    def loss(self, stats: PairStats, batch: PairBatch) -> LossOutput:
        chosen, rejected = stats.chosen_logratios, stats.rejected_logratios
        scores = batch.columns[CHOSEN_SCORE.name], batch.columns[REJECTED_SCORE.name]
        losses = reward_rpo(chosen, rejected, *scores, beta=self.beta, eta=self.eta, distance=self.distance)
        gap = (scores[0] - scores[1]).to(chosen.dtype)
        metrics = reward_metrics(stats, self.beta) | logit_accuracy(chosen - rejected) | per_pair(score_gap=gap)
        return LossOutput(terms=(pair_term(losses),), metrics=metrics)

    def other_optimum(self) -> str:
        return "pi* is where DPO's sigmoid loss leads; this loss fits the scores of the data, and leads elsewhere."

    def describe(self) -> str:
        return f"{self.distance}, beta {self.beta:g}, eta {self.eta:g}"
