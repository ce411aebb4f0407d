"""Odds Ratio Preference Optimization (arXiv 2403.07691): fine-tuning and preferences in one stage, no reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from prefopt.method import Method, logit_accuracy, nll_term, pair_term, per_pair, reference_free_metrics
from prefopt.types import LossOutput, Needs, PairBatch, PairStats

if TYPE_CHECKING:
    import torch

Nll = Literal["token_mean", "sequence_mean"]

_CERTAIN = -1e-7  # a mean log-probability above this one counts as this one: at 0 the odds are infinite


def orpo(chosen_mean_logps: torch.Tensor, rejected_mean_logps: torch.Tensor) -> torch.Tensor:
    """The odds-ratio part of the ORPO loss of each pair; the NLL is a term of its own.

    -log s(log odds(a_w) - log odds(a_l)),  log odds(a) = a - log(1 - e^a),  a = log pi(y|x) / |y|

    Args: chosen_mean_logps, rejected_mean_logps: log-probability per completion token. Shape `(pairs,)`.
    Returns: unreduced loss before its weight lambda, shape `(pairs,)`.
    Reference: Hong et al., ORPO, arXiv 2403.07691, eq. 6 and 7. Differs from the authors' code: log-sigmoid in place of
        the logarithm of a sigmoid, which is -inf below -104 in float32; the mean is over the completion alone, theirs
        holds one pad position more where a row is padded.
    """
    from torch.nn.functional import logsigmoid

    return -logsigmoid(log_odds(chosen_mean_logps) - log_odds(rejected_mean_logps))


def log_odds(mean_logps: torch.Tensor) -> torch.Tensor:
    """a - log(1 - e^a) for a <= 0, exact at both ends. Args: mean_logps: a. Shape `(pairs,)`."""
    return mean_logps - log1mexp(mean_logps.clamp(max=_CERTAIN))


def log1mexp(a: torch.Tensor) -> torch.Tensor:
    """log(1 - e^a) for a < 0, by the form that loses no digits on its side of -ln 2."""
    import torch

    near, far = a.clamp(min=-math.log(2)), a.clamp(max=-math.log(2))
    return torch.where(a > -math.log(2), torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


@dataclass(frozen=True)
class ORPO(Method):
    """Odds Ratio Preference Optimization: the NLL of the chosen side plus a weighted log odds ratio; no reference."""

    default_lr: ClassVar[float | None] = 5e-6
    default_lr_source: ClassVar[str] = "the authors' scripts, arXiv 2403.07691"

    odds_weight: float = 0.1
    """Weight lambda of the log odds ratio; >= 0. TRL calls it beta."""
    # 0.1 in the authors' script for Mistral-ORPO-beta, 0.05 for Capybara

    nll: Nll = "token_mean"
    """NLL of the chosen completions: mean over the tokens of the global batch, or over sequences of token means."""
    # token_mean in the authors' code, there over prompt and completion; sequence_mean in LLaMA-Factory

    def __post_init__(self) -> None:
        self._require_not_negative("odds_weight")
        self._require_choice("nll", Nll)

    @property
    def needs(self) -> Needs:
        return Needs(reference="none")

    def loss(self, stats: PairStats, batch: PairBatch) -> LossOutput:
        chosen, rejected = stats.chosen_mean_logps, stats.rejected_mean_logps
        losses = orpo(chosen, rejected)
        ratio = (log_odds(chosen) - log_odds(rejected)).detach()
        metrics = reference_free_metrics(self.odds_weight * chosen, self.odds_weight * rejected)
        metrics |= per_pair(log_odds_ratio=ratio) | logit_accuracy(ratio)
        terms = (*nll_term(stats, 1.0, self.nll), pair_term(losses, "odds_ratio", self.odds_weight))
        return LossOutput(terms=terms, metrics=metrics)

    def other_optimum(self) -> str:
        return "pi* is the optimum of reward and KL; ORPO has no KL term, and another optimum."

    def describe(self) -> str:
        return f"odds_weight {self.odds_weight:g}, nll {self.nll}"
