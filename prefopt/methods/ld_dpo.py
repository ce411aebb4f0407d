"""Length-desensitised DPO (arXiv 2409.06411): tokens beyond the shorter completion's length count less."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prefopt.method import Method, logit_accuracy, pair_term, reward_metrics
from prefopt.types import LossOutput, Needs, PairBatch, PairStats, TokenView

if TYPE_CHECKING:
    import torch

Reference = Literal["both", "plain"]


def ld_dpo(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    chosen_excess: torch.Tensor,
    rejected_excess: torch.Tensor,
    *,
    beta: float,
    alpha: float,
) -> torch.Tensor:
    """The LD-DPO loss of each pair: DPO's, in which the tokens of the longer completion's excess count alpha.

    -log s(beta (D'_w - D'_l)),  D' = sum_{t <= n} d_t + alpha sum_{t > n} d_t = D - (1 - alpha) sum_{t > n} d_t
    d_t = log pi(y_t) - log pi_ref(y_t),  n = min(|y_w|, |y_l|)

    Args:
        chosen_logratios, rejected_logratios: D, log policy minus log reference over all tokens. Shape `(pairs,)`.
        chosen_excess, rejected_excess: the sum over tokens beyond n of d_t; of log pi(y_t) alone where the reference
            counts all tokens alike. Shape `(pairs,)`.
        beta: KL-regularisation strength.
        alpha: weight of the excess; 1 is DPO.
    Returns: unreduced loss, shape `(pairs,)`.
    Reference: Liu et al., arXiv 2409.06411. Differs from TRL's `ld_alpha`: nothing. There is no code of the authors.
    """
    from torch.nn.functional import logsigmoid

    return -logsigmoid(beta * _gap(chosen_logratios, rejected_logratios, chosen_excess, rejected_excess, alpha))


def _gap(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    chosen_excess: torch.Tensor,
    rejected_excess: torch.Tensor,
    alpha: float,
) -> torch.Tensor:
    return (chosen - rejected) - (1 - alpha) * (chosen_excess - rejected_excess)


@dataclass(frozen=True)
class LDDPO(Method):
    """Length-desensitised DPO: DPO in which the part of a completion beyond the other's length counts less."""

    beta: float = 0.1
    """KL-regularisation strength; > 0."""
    # DPO's; arXiv 2409.06411 follows it

    alpha: float = 0.5
    """Weight of the tokens beyond the shorter completion's length, from 0 to 1; 1 is DPO."""
    # 0.5 in TRL's documentation of the paper; turbo-alignment has 0.1

    reference: Reference = "both"
    """Whether the weight applies to the reference's log-probabilities too; plain: to the policy's alone."""
    # TRL: both; LLaMA-Factory: plain

    def __post_init__(self) -> None:
        self._require_positive("beta")
        self._require(0 <= self.alpha <= 1, "alpha", "a number from 0 to 1")
        self._require_choice("reference", Reference)

    @property
    def needs(self) -> Needs:
        return Needs(reference="sequence")

    def loss(self, stats: PairStats, batch: PairBatch) -> LossOutput:
        assert stats.rejected_lengths is not None
        tokens = stats.tokens
        chosen, rejected = stats.chosen_logratios, stats.rejected_logratios
        excess = tokens.sides(_excess(tokens, tokens.logratios if self.reference == "both" else tokens.stats.logp))
        losses = ld_dpo(chosen, rejected, *excess, beta=self.beta, alpha=self.alpha)
        metrics = reward_metrics(stats, self.beta) | logit_accuracy(_gap(chosen, rejected, *excess, self.alpha))
        return LossOutput(terms=(pair_term(losses),), metrics=metrics)

    def loss_at_reference(self) -> float | None:
        return math.log(2) if self.reference == "both" or self.alpha == 1 else None

    @property
    def tied_at_reference(self) -> tuple[str, ...]:
        tied = super().tied_at_reference
        return tied if self.loss_at_reference() else tuple(name for name in tied if name != "accuracy/logit")

    def other_optimum(self) -> str:
        if self.alpha == 1:
            return ""
        return "pi* is where DPO leads; LD-DPO with alpha below 1 counts the tokens of long completions less."

    def describe(self) -> str:
        return f"beta {self.beta:g}, alpha {self.alpha:g}, reference {self.reference}"


def _excess(tokens: TokenView, values: torch.Tensor) -> torch.Tensor:
    """Sums of the values of tokens beyond the length of the shorter completion of a pair, (N,) -> (2B,)."""
    chosen, rejected = tokens.sides(tokens.lengths)
    shorter = chosen.minimum(rejected).repeat(2)
    beyond = tokens.positions >= tokens.of_tokens(shorter)
    return tokens.sums(values * beyond)
