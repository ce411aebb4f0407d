"""SimPO (arXiv 2405.14734): a logistic loss on length-normalised log-probabilities, without a reference model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from prefopt.method import Method, ahead, logit_accuracy, nll_term, pair_term, per_pair, reference_free_metrics
from prefopt.types import LossOutput, Needs, PairBatch, PairStats

if TYPE_CHECKING:
    import torch

Variant = Literal["sigmoid", "hinge"]


def simpo(
    chosen_mean_logps: torch.Tensor,
    rejected_mean_logps: torch.Tensor,
    *,
    beta: float,
    gamma_beta_ratio: float,
    variant: Variant = "sigmoid",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The SimPO loss of each pair.

    u = beta (a_w - a_l) - gamma,  a = log pi(y|x) / |y|,  gamma = beta gamma_beta_ratio
    sigmoid  -(1 - e) log s(u) - e log s(-u),  e = label_smoothing
    hinge    max(0, 1 - u)

    Args:
        chosen_mean_logps, rejected_mean_logps: log-probability per completion token. Shape `(pairs,)`.
        beta: scale of the rewards.
        gamma_beta_ratio: target margin in units of beta.
        variant: the loss of the margin.
        label_smoothing: assumed probability e that the label is wrong, 0 <= e < 0.5; sigmoid only.
    Returns: unreduced loss, shape `(pairs,)`.
    Raises: ValueError for an unknown variant, or label_smoothing with hinge.
    Reference: Meng et al., SimPO, arXiv 2405.14734, eq. 6. Differs from the authors' code: nothing. TRL has an absolute
        gamma and adds an NLL term (cpo_alpha) that the paper does not have.
    """
    from torch.nn.functional import logsigmoid

    u = beta * (chosen_mean_logps - rejected_mean_logps - gamma_beta_ratio)
    if variant == "sigmoid":
        return -(1 - label_smoothing) * logsigmoid(u) - label_smoothing * logsigmoid(-u)
    if variant != "hinge":
        raise ValueError(f"unknown variant {variant!r}")
    if label_smoothing:
        raise ValueError("label_smoothing has no meaning for variant 'hinge'")
    return (1 - u).clamp(min=0)


@dataclass(frozen=True)
class SimPO(Method):
    """SimPO: a logistic loss on the difference of log-probabilities per token, with a target margin; no reference."""

    default_lr: ClassVar[float | None] = 6e-7
    default_lr_source: ClassVar[str] = "the authors' config for Llama-3-Base, arXiv 2405.14734"

    beta: float = 2.0
    """Scale of the length-normalised rewards; > 0."""
    # 2.0 for Mistral-Base and Llama-3-Base, 2.5 for their Instruct models, 10 for v2 and Gemma-2: the authors' configs

    gamma_beta_ratio: float = 0.5
    """Target margin divided by beta, in nats per token; >= 0."""
    # 0.5 for Llama-3-Base and Gemma-2; 0.8 and 0.1 for Mistral, 0.55 for Llama-3-Instruct: the authors' configs

    variant: Variant = "sigmoid"
    """Loss of the margin: sigmoid is the paper's, hinge is in the authors' code."""

    label_smoothing: float = 0.0
    """Assumed probability that a label is wrong; from 0 to below 0.5, sigmoid only."""
    # 0 in the authors' configs

    nll_weight: float = 0.0
    """Weight of the chosen completions' NLL, a mean over the tokens of the global batch; >= 0."""
    # `sft_weight` of the authors' code, 0 by default and not in the paper; TRL's cpo_alpha, 1 by default

    def __post_init__(self) -> None:
        self._require_positive("beta")
        self._require_not_negative("gamma_beta_ratio")
        self._require_choice("variant", Variant)
        self._require(0 <= self.label_smoothing < 0.5, "label_smoothing", "a number from 0 to below 0.5")
        if self.variant == "hinge":
            self._require(self.label_smoothing == 0, "label_smoothing", "0 for variant hinge")
        self._require_not_negative("nll_weight")

    @property
    def needs(self) -> Needs:
        return Needs(reference="none")

    def loss(self, stats: PairStats, batch: PairBatch) -> LossOutput:
        chosen, rejected = stats.chosen_mean_logps, stats.rejected_mean_logps
        losses = simpo(
            chosen,
            rejected,
            beta=self.beta,
            gamma_beta_ratio=self.gamma_beta_ratio,
            variant=self.variant,
            label_smoothing=self.label_smoothing,
        )
        terms = (pair_term(losses), *nll_term(stats, self.nll_weight))
        gap = chosen - rejected
        metrics = reference_free_metrics(self.beta * chosen, self.beta * rejected) | logit_accuracy(gap)
        metrics |= per_pair(margin_reached=ahead(gap, self.gamma_beta_ratio))
        return LossOutput(terms=terms, metrics=metrics)

    def other_optimum(self) -> str:
        return "pi* is the optimum of reward and KL; SimPO has no KL term, and another optimum."

    def describe(self) -> str:
        more = f", nll_weight {self.nll_weight:g}" if self.nll_weight else ""
        smoothing = f", label_smoothing {self.label_smoothing:g}" if self.label_smoothing else ""
        return f"{self.variant}, beta {self.beta:g}, gamma_beta_ratio {self.gamma_beta_ratio:g}{smoothing}{more}"
