"""TIS-DPO (arXiv 2410.04350): DPO whose tokens have weights, which the data gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefopt.method import Method, logit_accuracy, pair_term, per_pair, reward_metrics
from prefopt.types import LossOutput, Needs, PairBatch, PairStats, TokenColumn

if TYPE_CHECKING:
    import torch

WEIGHTS = TokenColumn("weights", neutral=1.0)


def tis_dpo(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    chosen_kl: torch.Tensor | float = 0.0,
    rejected_kl: torch.Tensor | float = 0.0,
    *,
    beta: float,
    alpha: float = 0.0,
) -> torch.Tensor:
    """The TIS-DPO loss of each pair.

    -log s(beta [sum_t w_t d_t (chosen) - sum_t w_t d_t (rejected) - alpha (K_w - K_l)])
    d_t = log pi(y_t) - log pi_ref(y_t),  K = sum_t w_t KL(pi || pi_ref)

    Args:
        chosen_logratios, rejected_logratios: sums of w_t d_t. Shape `(pairs,)`.
        chosen_kl, rejected_kl: K, with gradient. Shape `(pairs,)`.
        beta: KL-regularisation strength.
        alpha: weight of the difference of the two K; 0: no KL term.
    Returns: unreduced loss, shape `(pairs,)`.
    Reference: Liu et al., TIS-DPO, arXiv 2410.04350. Differs from the authors' code: the KL is computed by log_softmax,
        theirs by softmax().log(), which is NaN when a probability underflows.
    """
    from torch.nn.functional import logsigmoid

    return -logsigmoid(beta * (chosen_logratios - rejected_logratios - alpha * (chosen_kl - rejected_kl)))


@dataclass(frozen=True)
class TISDPO(Method):
    """TIS-DPO: token-level importance sampling, DPO with a weight per token from the data."""

    beta: float = 0.1
    """KL-regularisation strength; > 0."""
    # 0.1 in the authors' config

    kl_term: bool = False
    """Whether the logit has the difference of the weighted KL(policy || reference) of both completions."""
    # `token_level: false` in the authors' config

    alpha: float = 0.5
    """Weight of the KL term, where there is one; >= 0."""
    # 0.5 in the authors' config

    def __post_init__(self) -> None:
        self._require_positive("beta")
        self._require_not_negative("alpha")

    @property
    def needs(self) -> Needs:
        if not self.kl_term:
            return Needs(reference="sequence", token_columns=(WEIGHTS,))
        return Needs(reference="token", statistics=("reverse_kl",), token_columns=(WEIGHTS,))

    def loss(self, stats: PairStats, batch: PairBatch) -> LossOutput:
        tokens = stats.tokens
        weights = batch.token_columns[WEIGHTS.name].to(tokens.stats.logp)
        chosen, rejected = tokens.sides(tokens.sums(weights * tokens.logratios))
        logits = chosen - rejected
        kl: tuple[torch.Tensor, ...] = ()
        if self.kl_term:
            assert tokens.stats.reverse_kl is not None
            kl = tokens.sides(tokens.sums(weights * tokens.stats.reverse_kl))
            logits = logits - self.alpha * (kl[0] - kl[1])
        losses = tis_dpo(chosen, rejected, *kl, beta=self.beta, alpha=self.alpha if self.kl_term else 0.0)
        means = tokens.sides(tokens.means(weights))
        metrics = reward_metrics(stats, self.beta) | logit_accuracy(logits)
        metrics |= per_pair(token_weight__chosen=means[0], token_weight__rejected=means[1])
        return LossOutput(terms=(pair_term(losses),), metrics=metrics)

    def loss_at_reference(self) -> float | None:
        return math.log(2)

    def other_optimum(self) -> str:
        return "pi* is where DPO leads; with weights other than 1, or the KL term, TIS-DPO leads elsewhere."

    def describe(self) -> str:
        return f"beta {self.beta:g}" + (f", kl_term, alpha {self.alpha:g}" if self.kl_term else "")
