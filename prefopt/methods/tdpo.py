"""Token-level Direct Preference Optimization (arXiv 2404.11999): DPO with sequential KL terms in its logit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prefopt.method import Method, ahead, logit_accuracy, pair_term, per_pair, reward_metrics
from prefopt.types import LossOutput, Needs, PairBatch, PairStats

if TYPE_CHECKING:
    import torch

Variant = Literal["tdpo1", "tdpo2"]
ALPHA = 0.5  # the authors' config/loss/tdpo.yaml


def tdpo(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    chosen_kl: torch.Tensor,
    rejected_kl: torch.Tensor,
    *,
    beta: float,
    alpha: float,
    detach_chosen_kl: bool,
) -> torch.Tensor:
    """The TDPO loss of each pair.

    TDPO1: alpha = 1, detach_chosen_kl=False.   TDPO2: any alpha, detach_chosen_kl=True.
    -log s(beta [(chosen_logratios - rejected_logratios) - alpha (rejected_kl - sg(chosen_kl))])

    Args:
        chosen_logratios, rejected_logratios: log policy minus log reference, summed over tokens. Shape `(pairs,)`.
        chosen_kl, rejected_kl: forward KL(reference || policy), summed over the completion's tokens. Shape `(pairs,)`.
        beta: KL-regularisation strength.
        alpha: weight of the difference of the two KL terms.
        detach_chosen_kl: whether gradients stop at the chosen completion's KL, `sg` above.
    Returns: unreduced loss, shape `(pairs,)`.
    Reference: Zeng et al., Token-level Direct Preference Optimization, arXiv 2404.11999, objectives TDPO1 and TDPO2.
        Differs from the authors' code: the loss does not; the KL is computed by log_softmax, theirs by
        softmax().log(), which is NaN when a probability underflows.
    """
    from torch.nn.functional import logsigmoid

    return -logsigmoid(
        beta * _logits(chosen_logratios, rejected_logratios, chosen_kl, rejected_kl, alpha, detach_chosen_kl)
    )


def _logits(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    chosen_kl: torch.Tensor,
    rejected_kl: torch.Tensor,
    alpha: float,
    detach_chosen_kl: bool,
) -> torch.Tensor:
    if detach_chosen_kl:
        chosen_kl = chosen_kl.detach()
    return (chosen_logratios - rejected_logratios) - alpha * (rejected_kl - chosen_kl)


@dataclass(frozen=True)
class TDPO(Method):
    """Token-level DPO: DPO with the sequential forward KL of both completions inside the logit."""

    beta: float = 0.1
    """KL-regularisation strength beta: a larger beta keeps the policy closer to the reference; > 0."""
    # config/loss/tdpo.yaml of the authors: beta 0.1

    variant: Variant = "tdpo2"
    """tdpo2 stops the gradient of the chosen KL and weights the KL difference by alpha; tdpo1 does neither."""
    # the paper's proposal; the authors' config says if_tdpo2: false, so that their README's command trains tdpo1

    alpha: float | None = None
    """Weight of the KL difference in tdpo2; None: 0.5. It must not be given with tdpo1."""
    # config/loss/tdpo.yaml of the authors: alpha 0.5

    def __post_init__(self) -> None:
        self._require_positive("beta")
        self._require_choice("variant", Variant)
        if self.variant == "tdpo1":
            self._require(self.alpha is None, "alpha", "no alpha with variant tdpo1, which has none (use tdpo2)")
        elif self.alpha is not None:
            self._require(math.isfinite(self.alpha) and self.alpha >= 0, "alpha", "a finite number >= 0")

    @property
    def _alpha(self) -> float:
        if self.variant == "tdpo1":
            return 1.0
        return ALPHA if self.alpha is None else self.alpha

    @property
    def needs(self) -> Needs:
        return Needs(reference="token")

    def loss(self, stats: PairStats, batch: PairBatch) -> LossOutput:
        assert stats.chosen_kl is not None
        assert stats.rejected_kl is not None
        chosen, rejected, detach = stats.chosen_logratios, stats.rejected_logratios, self.variant == "tdpo2"
        sides = (chosen, rejected, stats.chosen_kl, stats.rejected_kl)
        losses = tdpo(*sides, beta=self.beta, alpha=self._alpha, detach_chosen_kl=detach)
        # the paper's reward, as its authors log it: the KL has weight 1 for any alpha
        chosen_rewards = self.beta * (chosen + stats.chosen_kl)
        rejected_rewards = self.beta * (rejected + stats.rejected_kl)
        metrics = (
            reward_metrics(stats, self.beta)
            | per_pair(
                rewards_tdpo__chosen=chosen_rewards,
                rewards_tdpo__rejected=rejected_rewards,
                rewards_tdpo__margins=chosen_rewards - rejected_rewards,
                rewards_tdpo__accuracies=ahead(chosen_rewards, rejected_rewards),
            )
            | logit_accuracy(_logits(*sides, self._alpha, detach))
        )
        return LossOutput(terms=(pair_term(losses),), metrics=metrics)

    def loss_at_reference(self) -> float | None:
        return math.log(2)

    def other_optimum(self) -> str:
        return (
            f"{self.variant.upper()} does not converge to pi*, the star of the plot: the KL terms in its logit keep "
            "the policy closer to the reference than beta alone does."
        )

    def describe(self) -> str:
        alpha = f", alpha {self._alpha:g}" if self.variant == "tdpo2" else ""
        return f"{self.variant}{alpha}, beta {self.beta:g}"
