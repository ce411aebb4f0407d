"""AlphaPO (arXiv 2501.03884): SimPO with a reward that a parameter bends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prefopt.method import Method, ahead, logit_accuracy, pair_term, per_pair, reference_free_metrics
from prefopt.types import LossOutput, Needs, PairBatch, PairStats

if TYPE_CHECKING:
    import torch


def alpha_po(
    chosen_mean_logps: torch.Tensor,
    rejected_mean_logps: torch.Tensor,
    *,
    beta: float,
    gamma: float,
    alpha: float,
) -> torch.Tensor:
    """The AlphaPO loss of each pair.

    -log s(beta (r_w - r_l) - gamma),  r = (1 - e^(-alpha a)) / alpha,  a = log pi(y|x) / |y|

    Args:
        chosen_mean_logps, rejected_mean_logps: log-probability per completion token. Shape `(pairs,)`.
        beta: scale of the rewards.
        gamma: target margin.
        alpha: shape of the reward; towards 0 the reward is a, and the loss SimPO's. At 0 it is exactly that.
    Returns: unreduced loss, shape `(pairs,)`.
    Reference: AlphaPO, arXiv 2501.03884. Differs from TRL's `alphapo`: the exponential is taken of -alpha a at once, so
        that it does not underflow first; exponents beyond the dtype's range are capped.
    """
    from torch.nn.functional import logsigmoid

    def reward(mean_logps: torch.Tensor) -> torch.Tensor:
        return shaped_reward(mean_logps, alpha)

    return -logsigmoid(beta * (reward(chosen_mean_logps) - reward(rejected_mean_logps)) - gamma)


def shaped_reward(mean_logps: torch.Tensor, alpha: float) -> torch.Tensor:
    """(1 - e^(-alpha a)) / alpha, and a at alpha = 0. Args: mean_logps: a. Shape `(pairs,)`."""
    import torch

    if alpha == 0:
        return mean_logps
    most = math.log(torch.finfo(mean_logps.dtype).max) - 8
    return -torch.expm1((-alpha * mean_logps).clamp(max=most)) / alpha


@dataclass(frozen=True)
class AlphaPO(Method):
    """AlphaPO: SimPO whose reward is bent by alpha, which sets how hard likelihoods are displaced; no reference."""

    default_lr: ClassVar[float | None] = 7e-7
    default_lr_source: ClassVar[str] = "Mistral-Instruct in arXiv 2501.03884"

    beta: float = 2.5
    """Scale of the rewards; > 0."""
    # 2.5, gamma 0.1, alpha 0.25 for Mistral-Instruct, arXiv 2501.03884

    gamma: float = 0.1
    """Target margin, not multiplied by beta; >= 0."""

    alpha: float = 0.25
    """Shape of the reward; at 0 the loss is SimPO's."""

    def __post_init__(self) -> None:
        self._require_positive("beta")
        self._require_not_negative("gamma")
        self._require(math.isfinite(self.alpha), "alpha", "a finite number")

    @property
    def needs(self) -> Needs:
        return Needs(reference="none")

    def loss(self, stats: PairStats, batch: PairBatch) -> LossOutput:
        chosen, rejected = stats.chosen_mean_logps, stats.rejected_mean_logps
        losses = alpha_po(chosen, rejected, beta=self.beta, gamma=self.gamma, alpha=self.alpha)
        rewards = [self.beta * shaped_reward(one, self.alpha) for one in (chosen, rejected)]
        gap = rewards[0] - rewards[1]
        metrics = reference_free_metrics(*rewards) | logit_accuracy(gap)
        metrics |= per_pair(margin_reached=ahead(gap, self.gamma))
        return LossOutput(terms=(pair_term(losses),), metrics=metrics)

    def other_optimum(self) -> str:
        return "pi* is the optimum of reward and KL; AlphaPO has no KL term, and another optimum."

    def describe(self) -> str:
        return f"beta {self.beta:g}, gamma {self.gamma:g}, alpha {self.alpha:g}"
