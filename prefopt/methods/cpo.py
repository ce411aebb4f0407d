"""Contrastive Preference Optimization (arXiv 2401.08417): DPO without its reference, and the chosen side's NLL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from prefopt.method import Method, logit_accuracy, nll_term, pair_term, reference_free_metrics
from prefopt.types import LossOutput, Needs, PairBatch, PairStats

if TYPE_CHECKING:
    import torch

Variant = Literal["sigmoid", "hinge", "ipo"]


def cpo(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    *,
    beta: float,
    variant: Variant = "sigmoid",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The preference part of the CPO loss of each pair; the NLL is a term of its own.

    h = log pi(y_w|x) - log pi(y_l|x)
    sigmoid  -(1 - e) log s(beta h) - e log s(-beta h),  e = label_smoothing
    hinge    max(0, 1 - beta h)
    ipo      (h - 1 / (2 beta))^2

    Args:
        chosen_logps, rejected_logps: log-probability summed over completion tokens. Shape `(pairs,)`.
        beta: scale of the rewards.
        variant: the loss of h.
        label_smoothing: assumed probability e that the label is wrong, 0 <= e < 0.5; sigmoid only.
    Returns: unreduced loss, shape `(pairs,)`.
    Raises: ValueError for an unknown variant, or label_smoothing where it has no meaning.
    Reference: Xu et al., arXiv 2401.08417, eq. 3. Differs from TRL's CPO: nothing but the NLL's mean, see the page.
    """
    from torch.nn.functional import logsigmoid

    if label_smoothing and variant != "sigmoid":
        raise ValueError(f"label_smoothing has no meaning for variant {variant!r}")
    h = chosen_logps - rejected_logps
    if variant == "sigmoid":
        return -(1 - label_smoothing) * logsigmoid(beta * h) - label_smoothing * logsigmoid(-beta * h)
    if variant == "hinge":
        return (1 - beta * h).clamp(min=0)
    if variant == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    raise ValueError(f"unknown variant {variant!r}")


@dataclass(frozen=True)
class CPO(Method):
    """Contrastive Preference Optimization: DPO's loss with a uniform reference, plus the NLL of the chosen side."""

    default_lr: ClassVar[float | None] = 1e-6
    default_lr_source: ClassVar[str] = "TRL's CPOConfig; the authors took 1e-4 for LoRA with an inverse square root"

    beta: float = 0.1
    """Scale of the rewards; > 0."""
    # 0.1 in arXiv 2401.08417

    nll_weight: float = 1.0
    """Weight of the chosen completions' NLL, a mean over the tokens of the global batch; >= 0."""
    # 1 in arXiv 2401.08417, eq. 3; TRL's cpo_alpha

    variant: Variant = "sigmoid"
    """Loss of the log-probability difference: sigmoid is the paper's."""

    label_smoothing: float = 0.0
    """Assumed probability that a label is wrong; from 0 to below 0.5, sigmoid only."""

    def __post_init__(self) -> None:
        self._require_positive("beta")
        self._require_not_negative("nll_weight")
        self._require_choice("variant", Variant)
        self._require(0 <= self.label_smoothing < 0.5, "label_smoothing", "a number from 0 to below 0.5")
        if self.variant != "sigmoid":
            self._require(self.label_smoothing == 0, "label_smoothing", f"0 for variant {self.variant}")

    @property
    def needs(self) -> Needs:
        return Needs(reference="none")

    def loss(self, stats: PairStats, batch: PairBatch) -> LossOutput:
        assert stats.chosen_logps is not None
        assert stats.rejected_logps is not None
        losses = cpo(
            stats.chosen_logps,
            stats.rejected_logps,
            beta=self.beta,
            variant=self.variant,
            label_smoothing=self.label_smoothing,
        )
        metrics = reference_free_metrics(self.beta * stats.chosen_logps, self.beta * stats.rejected_logps)
        metrics |= logit_accuracy(stats.chosen_logps - stats.rejected_logps)
        return LossOutput(terms=(pair_term(losses), *nll_term(stats, self.nll_weight)), metrics=metrics)

    def other_optimum(self) -> str:
        return "pi* is the optimum of reward and KL; CPO has no KL term, and another optimum."

    def describe(self) -> str:
        smoothing = f", label_smoothing {self.label_smoothing:g}" if self.label_smoothing else ""
        return f"{self.variant}, beta {self.beta:g}, nll_weight {self.nll_weight:g}{smoothing}"
