"""Supervised fine-tuning on the chosen completion, the usual stage before preference training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prefopt.method import Method
from prefopt.types import LossOutput, Needs, PairBatch, PairStats, Term

if TYPE_CHECKING:
    import torch


def sft(chosen_logps: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of each chosen completion.

    L = -log pi(y_w|x) = -sum_t log pi(y_t|x, y_<t)

    Args:
        chosen_logps: summed log-probability. Shape `(pairs,)`.
    Returns: unreduced loss in nats per completion, shape `(pairs,)`; divide the sum by the number of tokens.
    """
    return -chosen_logps


@dataclass(frozen=True)
class SFT(Method):
    """Token negative log-likelihood of the chosen completion, averaged over the tokens of the global batch."""

    # 2e-5 for the 7B and 13B models of Tülu 2 (arXiv 2311.10702, appendix), and for Alpaca's and Zephyr's
    default_lr: ClassVar[float | None] = 2e-5
    default_lr_source: ClassVar[str] = "Tülu 2, arXiv 2311.10702"

    @property
    def needs(self) -> Needs:
        return Needs(reference="none", rows="chosen_only")

    def loss(self, stats: PairStats, batch: PairBatch) -> LossOutput:
        assert stats.chosen_logps is not None
        losses = sft(stats.chosen_logps)
        # normalised by the tokens of the global batch: a mean per micro-batch would weigh tokens by its size
        return LossOutput(terms=(Term("nll", losses, stats.chosen_lengths),))
