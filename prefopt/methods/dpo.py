"""Direct Preference Optimization (arXiv 2305.18290) and variants that read the same two log-ratios."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prefopt.method import Method, logit_accuracy, pair_term, reward_metrics
from prefopt.types import LossOutput, Needs, PairBatch, PairStats

if TYPE_CHECKING:
    import torch

Variant = Literal["sigmoid", "cdpo", "robust", "ipo_sum", "ipo_mean", "hinge"]
_SMOOTHED = ("cdpo", "robust")


def dpo(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    *,
    beta: float,
    variant: Variant = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: torch.Tensor | None = None,
    rejected_lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """The DPO loss of each pair, in one of six variants.

    h = chosen_logratios - rejected_logratios,  u = beta h,  e = label_smoothing
    sigmoid   -log s(u)
    cdpo      -(1 - e) log s(u) - e log s(-u)
    robust    [-(1 - e) log s(u) + e log s(-u)] / (1 - 2e)
    ipo_sum   (h - 1 / (2 beta))^2
    ipo_mean  (h' - 1 / (2 beta))^2, h' from log-ratios per token
    hinge     max(0, 1 - u)

    Args:
        chosen_logratios, rejected_logratios: log policy minus log reference, summed over tokens. Shape `(pairs,)`.
        beta: KL-regularisation strength.
        variant: one of the six losses above.
        label_smoothing: assumed probability e that the label is wrong, 0 <= e < 0.5; for cdpo and robust only.
        chosen_lengths, rejected_lengths: number of completion tokens, for ipo_mean only. Shape `(pairs,)`.
    Returns: unreduced loss, shape `(pairs,)`.
    Raises: ValueError for an unknown variant, missing or unused lengths, or label_smoothing for a variant without it.
    Reference: Rafailov et al., Direct Preference Optimization, arXiv 2305.18290, eq. 7; cdpo and ipo_sum as in the
        authors' code; IPO: Azar et al., arXiv 2310.12036, eq. 17; robust: Chowdhury et al., arXiv 2403.00409; hinge:
        Zhao et al., SLiC-HF, arXiv 2305.10425. Differs from the authors' code: nothing.
    """
    from torch.nn.functional import logsigmoid

    if label_smoothing and variant not in _SMOOTHED:
        raise ValueError(f"label_smoothing is not read by variant {variant!r}, only by {' and '.join(_SMOOTHED)}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: found {label_smoothing}, expected 0 <= label_smoothing < 0.5")
    if variant == "ipo_mean":
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError("variant 'ipo_mean' needs chosen_lengths and rejected_lengths")
        chosen_logratios, rejected_logratios = chosen_logratios / chosen_lengths, rejected_logratios / rejected_lengths
    elif chosen_lengths is not None or rejected_lengths is not None:
        raise ValueError(f"variant {variant!r} reads no lengths")

    h = chosen_logratios - rejected_logratios
    u, e = beta * h, label_smoothing
    if variant == "sigmoid":
        return -logsigmoid(u)
    if variant == "cdpo":
        return -(1 - e) * logsigmoid(u) - e * logsigmoid(-u)
    if variant == "robust":
        return (-(1 - e) * logsigmoid(u) + e * logsigmoid(-u)) / (1 - 2 * e)
    if variant in ("ipo_sum", "ipo_mean"):
        return (h - 1 / (2 * beta)) ** 2
    if variant == "hinge":
        return (1 - u).clamp(min=0)
    raise ValueError(f"unknown variant {variant!r}")


@dataclass(frozen=True)
class DPO(Method):
    """Direct Preference Optimization: a logistic loss on the difference of two log-ratios."""

    beta: float = 0.1
    """KL-regularisation strength beta: a larger beta keeps the policy closer to the reference; > 0."""
    # 0.1 in the authors' README and, for all tasks but TL;DR (0.5), in the paper's appendix on hyper-parameters

    variant: Variant = "sigmoid"
    """Loss function: sigmoid is the paper's; ipo_sum and ipo_mean are IPO on summed and on per-token log-ratios."""
    # arXiv 2305.18290, eq. 7

    label_smoothing: float = 0.0
    """Assumed probability that a label is wrong, between 0 and 0.5, for cdpo and robust; 0 for other variants."""
    # 0 in the authors' config

    reference_free: bool = False
    """Remove the reference from the loss; logged rewards still use it."""
    # false in the authors' config

    def __post_init__(self) -> None:
        self._require_positive("beta")
        self._require_choice("variant", Variant)
        if self.variant in _SMOOTHED:
            self._require(
                0 < self.label_smoothing < 0.5,
                "label_smoothing",
                f"a number between 0 and 0.5 for variant {self.variant} (with 0 it would be sigmoid)",
            )
        else:
            self._require(
                self.label_smoothing == 0,
                "label_smoothing",
                f"0 for variant {self.variant}; it is read by {' and '.join(_SMOOTHED)} only",
            )

    @property
    def needs(self) -> Needs:
        return Needs(reference="sequence")

    def loss(self, stats: PairStats, batch: PairBatch) -> LossOutput:
        assert stats.chosen_logps is not None
        assert stats.rejected_logps is not None
        assert stats.rejected_lengths is not None
        chosen, rejected = stats.chosen_logratios, stats.rejected_logratios
        if self.reference_free:
            chosen, rejected = stats.chosen_logps, stats.rejected_logps
        per_token = self.variant == "ipo_mean"
        losses = dpo(
            chosen,
            rejected,
            beta=self.beta,
            variant=self.variant,
            label_smoothing=self.label_smoothing,
            chosen_lengths=stats.chosen_lengths if per_token else None,
            rejected_lengths=stats.rejected_lengths if per_token else None,
        )
        if per_token:
            chosen, rejected = chosen / stats.chosen_lengths, rejected / stats.rejected_lengths
        metrics = reward_metrics(stats, self.beta) | logit_accuracy(chosen - rejected)
        return LossOutput(terms=(pair_term(losses),), metrics=metrics)

    def loss_at_reference(self) -> float | None:
        if self.reference_free:
            return None
        if self.variant == "hinge":
            return 1.0
        if self.variant in ("ipo_sum", "ipo_mean"):
            return 1 / (2 * self.beta) ** 2
        return math.log(2)

    @property
    def tied_at_reference(self) -> tuple[str, ...]:
        tied = super().tied_at_reference
        # without the reference in the loss, the logit compares log-probabilities of the policy itself
        return tuple(name for name in tied if name != "accuracy/logit") if self.reference_free else tied

    def other_optimum(self) -> str:
        if self.variant == "sigmoid" and not self.reference_free:
            return ""
        free = " without the reference" if self.reference_free else ""
        return f"pi* is the optimum of DPO's sigmoid loss; {self.variant}{free} has another optimum."

    def describe(self) -> str:
        smoothing = f", label_smoothing {self.label_smoothing:g}" if self.label_smoothing else ""
        free = ", reference_free" if self.reference_free else ""
        return f"{self.variant}, beta {self.beta:g}{smoothing}{free}"
