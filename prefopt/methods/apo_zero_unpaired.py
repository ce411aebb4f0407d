"""APO-zero of single completions (arXiv 2408.06266): KTO's loss with the reference point at 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prefopt.method import Method, pair_term, unpaired_metrics
from prefopt.methods.kto import kto
from prefopt.types import LABEL, LossOutput, Needs, PairBatch, PairStats

if TYPE_CHECKING:
    import torch


def apo_zero_unpaired(
    logratios: torch.Tensor,
    labels: torch.Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """The APO-zero loss of each completion.

    desirable    lambda_D (1 - s(beta D)),  D = log pi(y|x) - log pi_ref(y|x)
    undesirable  lambda_U s(beta D)

    Args:
        logratios: D, log policy minus log reference, summed over tokens. Shape `(rows,)`.
        labels: 1 for a desirable completion, 0 for another one. Shape `(rows,)`.
        beta: KL-regularisation strength.
        desirable_weight, undesirable_weight: lambda_D and lambda_U.
    Returns: unreduced loss, shape `(rows,)`.
    Reference: D'Oosterlinck et al., arXiv 2408.06266, eq. 7, its two halves apart. Differs from TRL's: nothing.
    """
    return kto(
        logratios,
        labels,
        0.0,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )


@dataclass(frozen=True)
class APOZeroUnpaired(Method):
    """APO-zero without pairs: desirable completions become likelier than under the reference, others less likely."""

    default_lr: ClassVar[float | None] = 2e-7
    default_lr_source: ClassVar[str] = "arXiv 2408.06266"

    beta: float = 0.1
    """KL-regularisation strength; > 0."""
    # 0.1 in arXiv 2408.06266

    desirable_weight: float = 1.0
    """Weight of desirable completions; >= 0."""

    undesirable_weight: float = 1.0
    """Weight of undesirable completions; >= 0."""

    def __post_init__(self) -> None:
        self._require_positive("beta")
        self._require_not_negative("desirable_weight")
        self._require_not_negative("undesirable_weight")
        self._require(
            self.desirable_weight + self.undesirable_weight > 0, "desirable_weight", "one of the two weights > 0"
        )

    @property
    def needs(self) -> Needs:
        return Needs("sequence", rows="unpaired", columns=(LABEL,))

    def loss(self, stats: PairStats, batch: PairBatch) -> LossOutput:
        assert stats.chosen_logps is not None
        logratios, labels = stats.chosen_logratios, batch.columns[LABEL.name]
        losses = apo_zero_unpaired(
            logratios,
            labels,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        metrics = unpaired_metrics(self.beta * logratios, stats.chosen_logps, labels)
        return LossOutput(terms=(pair_term(losses),), metrics=metrics)

    def loss_at_reference(self) -> float | None:
        return self.desirable_weight / 2 if self.desirable_weight == self.undesirable_weight else None

    def other_optimum(self) -> str:
        return "pi* is where DPO's sigmoid loss leads; APO-zero's rewards saturate, and its optimum is another one."

    def describe(self) -> str:
        return f"beta {self.beta:g}, weights {self.desirable_weight:g}, {self.undesirable_weight:g}"
