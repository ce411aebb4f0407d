"""Kahneman-Tversky Optimization (arXiv 2402.01306): single completions with a label, against a reference point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from prefopt.method import Method, pair_term, per_pair, unpaired_metrics
from prefopt.types import LABEL, NO_STATE, LossOutput, LossState, Needs, PairBatch, PairStats

if TYPE_CHECKING:
    import torch

ReferencePoint = Literal["global_batch", "micro_batch", "process_means"]


def kto(
    logratios: torch.Tensor,
    labels: torch.Tensor,
    reference_point: torch.Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """The KTO loss of each completion.

    desirable    lambda_D (1 - s(beta (D - z0))),  D = log pi(y|x) - log pi_ref(y|x)
    undesirable  lambda_U (1 - s(beta (z0 - D)))

    Args:
        logratios: D, log policy minus log reference, summed over tokens. Shape `(rows,)`.
        labels: 1 for a desirable completion, 0 for another one. Shape `(rows,)`.
        reference_point: z0, max(0, mean of D over completions of other prompts), without gradient.
        beta: KL-regularisation strength.
        desirable_weight, undesirable_weight: lambda_D and lambda_U.
    Returns: unreduced loss, shape `(rows,)`; its mean is over rows, not over weights.
    Reference: Ethayarajh et al., KTO, arXiv 2402.01306, eq. 7. Differs from the authors' code (HALOs): nothing but z0,
        see the method's page.
    """
    import torch

    gap = beta * (logratios - reference_point)
    desirable = labels > 0.5
    losses = torch.where(desirable, -gap, gap).sigmoid()
    return torch.where(desirable, desirable_weight * losses, undesirable_weight * losses)


@dataclass(frozen=True)
class KTO(Method):
    """Kahneman-Tversky Optimization: desirable and undesirable completions, each against a common reference point."""

    ambiguous: ClassVar[tuple[str, ...]] = ("kto_pair",)
    default_lr: ClassVar[float | None] = 5e-6
    default_lr_source: ClassVar[str] = "the authors' code, arXiv 2402.01306"

    beta: float = 0.1
    """KL-regularisation strength; > 0."""
    # 0.1 in the authors' config

    desirable_weight: float = 1.0
    """Weight lambda_D of desirable completions; >= 0."""
    # 1 in the authors' config; lambda_D n_D / (lambda_U n_U) should be from 1 to 4/3, eq. 8

    undesirable_weight: float = 1.0
    """Weight lambda_U of undesirable completions; >= 0."""
    # 1 in the authors' config

    z0: ReferencePoint = "global_batch"
    """Mean behind the reference point: micro_batch and process_means depend on how the step is cut."""
    # the authors take the mean over all processes; process_means is TRL's

    def __post_init__(self) -> None:
        self._require_positive("beta")
        self._require_not_negative("desirable_weight")
        self._require_not_negative("undesirable_weight")
        self._require(
            self.desirable_weight + self.undesirable_weight > 0, "desirable_weight", "one of the two weights > 0"
        )
        self._require_choice("z0", ReferencePoint)

    @property
    def needs(self) -> Needs:
        return Needs("sequence", rows="unpaired", mismatched=True, batch_values=("mismatched",), columns=(LABEL,))

    def batch_values(self, stats: PairStats, batch: PairBatch) -> Mapping[str, torch.Tensor]:
        return {"mismatched": stats.chosen_logratios}

    def loss(self, stats: PairStats, batch: PairBatch, state: LossState = NO_STATE) -> LossOutput:
        assert stats.chosen_logps is not None
        logratios, labels = stats.chosen_logratios, batch.columns[LABEL.name]
        point = self._reference_point(state, len(logratios)).to(logratios)
        losses = kto(
            logratios,
            labels,
            point,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        metrics = unpaired_metrics(self.beta * logratios, stats.chosen_logps, labels)
        return LossOutput(terms=(pair_term(losses),), metrics=metrics | per_pair(z0=point.expand(losses.shape)))

    def _reference_point(self, state: LossState, rows: int) -> torch.Tensor:
        """z0 in nats, shape (). Args: rows: of the micro-batch."""
        values = state.batch_values["mismatched"]
        if self.z0 == "micro_batch":
            values = values[state.offset : state.offset + rows]
        if self.z0 == "process_means":
            means = [part.mean() for part in values.split(list(state.ranks)) if len(part)]
            return (sum(means, start=values.new_zeros(())) / max(1, len(means))).clamp(min=0)
        return (values.sum() / max(1, len(values))).clamp(min=0)

    @property
    def depends_on_cut(self) -> bool:
        return self.z0 != "global_batch"

    def loss_at_reference(self) -> float | None:
        return self.desirable_weight / 2 if self.desirable_weight == self.undesirable_weight else None

    def other_optimum(self) -> str:
        return "pi* is where DPO's sigmoid loss leads; KTO's rewards saturate, and its optimum is another one."

    def describe(self) -> str:
        weights = f"{self.desirable_weight:g}, {self.undesirable_weight:g}"
        point = "" if self.z0 == "global_batch" else f", z0 {self.z0}"
        return f"beta {self.beta:g}, weights {weights}{point}"
