"""TGDPO (arXiv 2506.14574): DPO whose tokens are weighted by the log-ratios of a model that is already trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prefopt.method import Method, logit_accuracy, pair_term, reward_metrics
from prefopt.types import LossOutput, Needs, PairBatch, PairStats, TokenColumn

if TYPE_CHECKING:
    import torch

LOGRATIOS = TokenColumn("reward_logratios")  # neutral: 0, a third model that is the reference


def tgdpo(chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, *, beta: float) -> torch.Tensor:
    """The TGDPO loss of each pair.

    -log s(beta [sum_t (1 + alpha beta r_t) d_t (chosen) - sum_t (1 - alpha beta r_t) d_t (rejected)])
    d_t = log pi(y_t) - log pi_ref(y_t),  r_t = log pi_third(y_t) - log pi_ref(y_t)

    Args:
        chosen_logratios, rejected_logratios: the two sums. Shape `(pairs,)`.
        beta: KL-regularisation strength.
    Returns: unreduced loss, shape `(pairs,)`.
    Reference: Zhu et al., TGDPO, arXiv 2506.14574. Differs from the authors' code: nothing.
    """
    from torch.nn.functional import logsigmoid

    return -logsigmoid(beta * (chosen_logratios - rejected_logratios))


@dataclass(frozen=True)
class TGDPO(Method):
    """TGDPO: DPO guided by token rewards, the log-ratios of a third model to the reference, from the data."""

    default_lr: ClassVar[float | None] = 7e-7
    default_lr_source: ClassVar[str] = "the authors' configs, arXiv 2506.14574"

    beta: float = 0.1
    """KL-regularisation strength; > 0."""
    # beta 0.1 and alpha 0.5 in the authors' configs

    alpha: float = 0.5
    """Strength of the token rewards; 0 is DPO; >= 0."""

    def __post_init__(self) -> None:
        self._require_positive("beta")
        self._require_not_negative("alpha")

    @property
    def needs(self) -> Needs:
        return Needs(reference="sequence", token_columns=(LOGRATIOS,))

    def loss(self, stats: PairStats, batch: PairBatch) -> LossOutput:
        tokens = stats.tokens
        rewards = batch.token_columns[LOGRATIOS.name].to(tokens.stats.logp)
        signed = rewards.where(tokens.is_chosen, -rewards)
        weighted = (1 + self.alpha * self.beta * signed) * tokens.logratios
        chosen, rejected = tokens.sides(tokens.sums(weighted))
        losses = tgdpo(chosen, rejected, beta=self.beta)
        metrics = reward_metrics(stats, self.beta) | logit_accuracy(chosen - rejected)
        return LossOutput(terms=(pair_term(losses),), metrics=metrics)

    def loss_at_reference(self) -> float | None:
        return math.log(2)

    def other_optimum(self) -> str:
        if self.alpha == 0:
            return ""
        return "pi* is where DPO leads; where the third model is not the reference, TGDPO leads elsewhere."

    def describe(self) -> str:
        return f"beta {self.beta:g}, alpha {self.alpha:g}"
