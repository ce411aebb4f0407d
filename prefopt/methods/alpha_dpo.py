"""AlphaDPO (arXiv 2410.10148): SimPO whose target margin grows with the pair's margin over the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prefopt.method import Method, ahead, logit_accuracy, pair_term, per_pair, reference_free_metrics
from prefopt.types import NO_STATE, LossOutput, LossState, Needs, PairBatch, PairStats

if TYPE_CHECKING:
    import torch

MOMENTUM = 0.9  # of the running averages, in the authors' code
LEAST_STD = 1e-6  # nats per token; margins that differ by less are rounding errors


def alpha_dpo(
    chosen_mean_logps: torch.Tensor,
    rejected_mean_logps: torch.Tensor,
    standard_scores: torch.Tensor,
    *,
    beta: float,
    gamma_beta_ratio: float,
    alpha: float,
) -> torch.Tensor:
    """The AlphaDPO loss of each pair.

    -log s(beta (A - sg[gamma_beta_ratio + alpha (M - mean) / std]))
    A = a_w - a_l,  a = log pi(y|x) / |y|,  M = A - A_ref

    Args:
        chosen_mean_logps, rejected_mean_logps: a, log-probability per completion token. Shape `(pairs,)`.
        standard_scores: (M - mean) / std, with running averages of the mean and the standard deviation of M over
            global batches. Shape `(pairs,)`.
        beta: scale of the rewards.
        gamma_beta_ratio: target margin in units of beta.
        alpha: weight of the standard score in the margin; 0 is SimPO.
    Returns: unreduced loss, shape `(pairs,)`.
    Reference: Wu et al., AlphaDPO, arXiv 2410.10148. Differs from the authors' code: evaluations do not update the
        averages, and the standard score is 0 where the standard deviation is 0 or of rounding errors alone.
    """
    from torch.nn.functional import logsigmoid

    margin = gamma_beta_ratio + alpha * standard_scores.detach()
    return -logsigmoid(beta * (chosen_mean_logps - rejected_mean_logps - margin))


@dataclass(frozen=True)
class AlphaDPO(Method):
    """AlphaDPO: SimPO with a target margin per pair, from how far policy and reference differ on it."""

    default_lr: ClassVar[float | None] = 1e-6
    default_lr_source: ClassVar[str] = "the authors' config for Llama-3-Instruct, arXiv 2410.10148"

    beta: float = 2.5
    """Scale of the length-normalised rewards; > 0."""
    # beta 2.5, ratio 0.6, alpha 0.2: the authors' config for Llama-3-Instruct

    gamma_beta_ratio: float = 0.6
    """Target margin divided by beta, in nats per token; >= 0."""

    alpha: float = 0.2
    """Weight of the pair's standard score in the target margin, in nats per token; >= 0."""

    bias_correction: bool = False
    """Whether the running mean and standard deviation, which start at 0, are corrected for that as in Adam."""
    # false in the authors' code

    def __post_init__(self) -> None:
        self._require_positive("beta")
        self._require_not_negative("gamma_beta_ratio")
        self._require_not_negative("alpha")

    @property
    def needs(self) -> Needs:
        state = {"mean": 0.0, "std": 0.0, "steps": 0.0}
        return Needs(reference="sequence", batch_values=("margins",), state=state)

    def batch_values(self, stats: PairStats, batch: PairBatch) -> Mapping[str, torch.Tensor]:
        assert stats.rejected_lengths is not None
        chosen, rejected = stats.chosen_logratios, stats.rejected_logratios
        return {"margins": chosen / stats.chosen_lengths - rejected / stats.rejected_lengths}

    def next_state(self, state: Mapping[str, float], values: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        margins = values["margins"]
        if not len(margins):
            return state
        std = float(margins.std()) if len(margins) > 1 else 0.0
        return {
            "mean": MOMENTUM * state["mean"] + (1 - MOMENTUM) * float(margins.mean()),
            "std": MOMENTUM * state["std"] + (1 - MOMENTUM) * std,
            "steps": state["steps"] + 1,
        }

    def loss(self, stats: PairStats, batch: PairBatch, state: LossState = NO_STATE) -> LossOutput:
        assert stats.rejected_lengths is not None
        chosen, rejected = stats.chosen_mean_logps, stats.rejected_mean_logps
        scores = self._standard_scores(self.batch_values(stats, batch)["margins"].detach(), state.state)
        losses = alpha_dpo(
            chosen,
            rejected,
            scores,
            beta=self.beta,
            gamma_beta_ratio=self.gamma_beta_ratio,
            alpha=self.alpha,
        )
        target = self.gamma_beta_ratio + self.alpha * scores
        rewards = (
            self.beta * stats.chosen_logratios / stats.chosen_lengths,
            self.beta * stats.rejected_logratios / stats.rejected_lengths,
        )
        metrics = reference_free_metrics(*rewards) | logit_accuracy(chosen - rejected)
        metrics |= per_pair(margin_reached=ahead(chosen - rejected, target), target_margin=target)
        return LossOutput(terms=(pair_term(losses),), metrics=metrics)

    def _standard_scores(self, margins: torch.Tensor, state: Mapping[str, float]) -> torch.Tensor:
        """(M - mean) / std of each pair, 0 where there is no deviation yet."""
        mean, std = state["mean"], state["std"]
        if self.bias_correction and state["steps"]:
            seen = 1 - MOMENTUM ** state["steps"]
            mean, std = mean / seen, std / seen
        return margins.new_zeros(margins.shape) if std < LEAST_STD else (margins - mean) / std

    @property
    def tied_at_reference(self) -> tuple[str, ...]:
        # the logit compares the policy's own log-probabilities
        return tuple(name for name in super().tied_at_reference if name != "accuracy/logit")

    def other_optimum(self) -> str:
        return "pi* is the optimum of reward and KL; AlphaDPO has no KL term, and another optimum."

    def describe(self) -> str:
        corrected = ", bias_correction" if self.bias_correction else ""
        return f"beta {self.beta:g}, gamma_beta_ratio {self.gamma_beta_ratio:g}, alpha {self.alpha:g}{corrected}"
