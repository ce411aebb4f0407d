"""ConfPO (arXiv 2506.08712): SimPO on the tokens of which the policy is less sure than on average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prefopt.method import Method, ahead, logit_accuracy, pair_term, per_pair, reference_free_metrics
from prefopt.types import LossOutput, Needs, PairBatch, PairStats, TokenView

if TYPE_CHECKING:
    import torch


def confpo(
    chosen_mean_logps: torch.Tensor,
    rejected_mean_logps: torch.Tensor,
    selected: torch.Tensor,
    *,
    beta: float,
    gamma: float,
) -> torch.Tensor:
    """The ConfPO loss of each pair; 0 where one of the two completions has no selected token.

    -log s(beta (a_w - a_l) - gamma),  a = mean of log pi(y_t) over the selected tokens of y
    t is selected where log pi(y_t) < log(1/|y| sum_t pi(y_t)), without gradient

    Args:
        chosen_mean_logps, rejected_mean_logps: log-probability per selected token. Shape `(pairs,)`.
        selected: whether both completions have a selected token, bool. Shape `(pairs,)`.
        beta: scale of the rewards.
        gamma: target margin, not multiplied by beta.
    Returns: unreduced loss, shape `(pairs,)`; a pair without selected tokens counts in the mean.
    Reference: Yoon et al., ConfPO, arXiv 2506.08712. Differs from the authors' code: tokens of equal probability are
        never selected; theirs compares with log(exp(.)), so that rounding decides.
    """
    from torch.nn.functional import logsigmoid

    losses = -logsigmoid(beta * (chosen_mean_logps - rejected_mean_logps) - gamma)
    return losses.where(selected, losses.new_zeros(()))


def unsure_tokens(tokens: TokenView) -> torch.Tensor:
    """Which tokens are less likely than the mean probability of their completion's tokens, (N,) bool."""
    import torch

    logps, index = tokens.stats.logp.detach(), tokens.sequence_index
    top = logps.new_full(tokens.lengths.shape, float("-inf")).scatter_reduce(0, index, logps, "amax")
    top = torch.where(tokens.lengths > 0, top, 0.0)
    # relative to the largest one, so that equal tokens have the mean 1 exactly and none of them is below it
    relative = logps - tokens.of_tokens(top)
    return relative < tokens.of_tokens(tokens.means(relative.exp()).log())


@dataclass(frozen=True)
class ConfPO(Method):
    """ConfPO: a preference loss on the tokens of low confidence, without a reference model."""

    default_lr: ClassVar[float | None] = 3e-7
    default_lr_source: ClassVar[str] = "the authors' script for Mistral, arXiv 2506.08712"

    beta: float = 1.5
    """Scale of the length-normalised rewards; > 0."""
    # 1.5 and gamma 1.6 in the authors' script for Mistral

    gamma: float = 1.6
    """Target margin, not multiplied by beta; >= 0."""

    def __post_init__(self) -> None:
        self._require_positive("beta")
        self._require_not_negative("gamma")

    @property
    def needs(self) -> Needs:
        return Needs(reference="none")

    def loss(self, stats: PairStats, batch: PairBatch) -> LossOutput:
        assert stats.rejected_lengths is not None
        tokens = stats.tokens
        unsure = unsure_tokens(tokens)
        counts = tokens.sums(unsure.to(tokens.stats.logp.dtype))
        chosen, rejected = tokens.sides(tokens.sums(tokens.stats.logp * unsure) / counts.clamp(min=1))
        chosen_count, rejected_count = tokens.sides(counts)
        selected = (chosen_count > 0) & (rejected_count > 0)
        losses = confpo(chosen, rejected, selected, beta=self.beta, gamma=self.gamma)
        gap = chosen - rejected
        metrics = reference_free_metrics(self.beta * chosen, self.beta * rejected) | logit_accuracy(gap)
        metrics |= per_pair(margin_reached=ahead(gap, self.gamma / self.beta), selected__pairs=selected.to(gap.dtype))
        metrics["selected/chosen"] = (chosen_count, stats.chosen_lengths.to(gap.dtype))
        metrics["selected/rejected"] = (rejected_count, stats.rejected_lengths.to(gap.dtype))
        return LossOutput(terms=(pair_term(losses),), metrics=metrics)

    def other_optimum(self) -> str:
        return "pi* is the optimum of reward and KL; ConfPO has no KL term, and another optimum."

    def describe(self) -> str:
        return f"beta {self.beta:g}, gamma {self.gamma:g}"
