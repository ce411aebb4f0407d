"""Weighted Preference Optimization (arXiv 2406.11827): DPO, a pair weighted by how likely the policy is to write it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prefopt.method import Method, logit_accuracy, pair_term, per_pair, reward_metrics
from prefopt.types import LossOutput, Needs, PairBatch, PairStats

if TYPE_CHECKING:
    import torch


def wpo(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    chosen_log_weights: torch.Tensor,
    rejected_log_weights: torch.Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    clamp: bool = True,
) -> torch.Tensor:
    """The WPO loss of each pair: DPO's, weighted by how likely the policy is to write the two completions.

    W [-(1 - e) log s(beta h) - e log s(-beta h)],  h = D_w - D_l,  e = label_smoothing,  W = min(1, w(y_w) w(y_l))
    w(y) = exp(1/|y| sum_t [log pi(y_t) - log sum_v pi(v)^2]), without gradient

    A token that is as likely as the policy's samples are on average has weight 1.

    Args:
        chosen_logratios, rejected_logratios: log policy minus log reference, summed over tokens. Shape `(pairs,)`.
        chosen_log_weights, rejected_log_weights: log w of each completion. Shape `(pairs,)`.
        beta: KL-regularisation strength.
        label_smoothing: assumed probability e that the label is wrong, 0 <= e < 0.5.
        clamp: whether W is cut at 1.
    Returns: unreduced loss, shape `(pairs,)`; the mean over pairs is not divided by the sum of weights.
    Reference: Zhou et al., WPO, arXiv 2406.11827, eq. 2. Differs from the authors' code: nothing; TRL does not cut W.
    """
    from torch.nn.functional import logsigmoid

    u = beta * (chosen_logratios - rejected_logratios)
    losses = -(1 - label_smoothing) * logsigmoid(u) - label_smoothing * logsigmoid(-u)
    return _weights(chosen_log_weights, rejected_log_weights, clamp) * losses


def _weights(chosen_log_weights: torch.Tensor, rejected_log_weights: torch.Tensor, clamp: bool) -> torch.Tensor:
    logs = (chosen_log_weights + rejected_log_weights).detach()
    return (logs.clamp(max=0) if clamp else logs).exp()


@dataclass(frozen=True)
class WPO(Method):
    """Weighted Preference Optimization: DPO on pairs weighted as if the policy had sampled them."""

    default_lr: ClassVar[float | None] = 1e-6
    default_lr_source: ClassVar[str] = "the authors' config for Llama-3-Instruct, arXiv 2406.11827"

    beta: float = 0.01
    """KL-regularisation strength; > 0."""
    # 0.01 in the authors' configs

    clamp: bool = True
    """Whether the weight of a pair is cut at 1; false is TRL's."""
    # the authors' code

    label_smoothing: float = 0.0
    """Assumed probability that a label is wrong; from 0 to below 0.5."""
    # 0 in the authors' configs

    def __post_init__(self) -> None:
        self._require_positive("beta")
        self._require(0 <= self.label_smoothing < 0.5, "label_smoothing", "a number from 0 to below 0.5")

    @property
    def needs(self) -> Needs:
        return Needs(reference="sequence", statistics=("log_sum_p2",))

    def loss(self, stats: PairStats, batch: PairBatch) -> LossOutput:
        tokens = stats.tokens
        assert tokens.stats.log_sum_p2 is not None
        chosen, rejected = stats.chosen_logratios, stats.rejected_logratios
        logs = tokens.sides(tokens.means((tokens.stats.logp - tokens.stats.log_sum_p2).detach()))
        losses = wpo(chosen, rejected, *logs, beta=self.beta, label_smoothing=self.label_smoothing, clamp=self.clamp)
        metrics = reward_metrics(stats, self.beta) | logit_accuracy(chosen - rejected)
        metrics |= per_pair(pair_weight=_weights(*logs, self.clamp))
        return LossOutput(terms=(pair_term(losses),), metrics=metrics)

    def other_optimum(self) -> str:
        # a weight that is the same for either order of a pair leaves the optimum of the pair where it is
        if self.label_smoothing == 0:
            return ""
        return "pi* is where the loss without label_smoothing leads; with it the optimum is another one."

    def describe(self) -> str:
        smoothing = f", label_smoothing {self.label_smoothing:g}" if self.label_smoothing else ""
        return f"beta {self.beta:g}{smoothing}{'' if self.clamp else ', weights not cut'}"
