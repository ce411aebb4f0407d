"""The base class of every method: a frozen dataclass of hyper-parameters with their validation and the loss."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from prefopt.errors import ConfigError, did_you_mean
from prefopt.types import Column, LossOutput, LossState, Needs, PairBatch, PairStats, Term

if TYPE_CHECKING:
    import torch

Metrics = dict[str, "tuple[torch.Tensor, torch.Tensor]"]
Reduction = Literal["token_mean", "sequence_mean", "sum"]

# what a judge or a reward model gave the two completions of a pair; the second names are UltraFeedback's
CHOSEN_SCORE = Column("chosen_score", aliases=("score_chosen",))
REJECTED_SCORE = Column("rejected_score", aliases=("score_rejected",))


@dataclass(frozen=True)
class Method:
    """A training objective: `needs` declares what the trainer computes, `loss` turns these statistics into loss terms.

    Subclasses are frozen dataclasses whose fields are their hyper-parameters; `__post_init__` validates them. One file
    holds one subclass of Method, and the file's name is the method's name.
    """

    ambiguous: ClassVar[tuple[str, ...]] = ()  # names that could mean this method or another one; they are rejected
    default_lr: ClassVar[float | None] = None  # default of optim.lr; None: the default of all methods
    default_lr_source: ClassVar[str] = ""  # where default_lr comes from, such as a paper

    @property
    def needs(self) -> Needs:
        raise NotImplementedError(f"{type(self).__name__} must declare its needs")

    def loss(self, stats: PairStats, batch: PairBatch) -> LossOutput:
        raise NotImplementedError(f"{type(self).__name__} must define loss(stats, batch)")

    def batch_values(self, stats: PairStats, batch: PairBatch) -> Mapping[str, torch.Tensor]:
        """Numbers of each pair that the loss reads of the whole global batch: `needs.batch_values`, (B,) each.

        It is called without gradient, before `loss`, on every micro-batch of a step. With `needs.mismatched`,
        statistics and batch are those of the mismatched completions, as chosen ones.
        """
        return {}

    def next_state(self, state: Mapping[str, float], values: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        """The numbers of `needs.state` after a global batch; called once per optimizer step, before its losses.

        Args: state: before it. values: of all its pairs, (G,) float64 each.
        """
        return state

    def loss_of(self, stats: PairStats, batch: PairBatch, state: LossState) -> LossOutput:
        """`loss` of a micro-batch, with the LossState if `needs` declares one: `loss(stats, batch, state)`."""
        with_state: Any = self.loss
        return with_state(stats, batch, state) if self.needs.with_state else self.loss(stats, batch)

    @property
    def depends_on_cut(self) -> bool:
        """Whether the loss depends on how a step is cut into micro-batches and ranks.

        Only options that reproduce another implementation do.
        """
        return False

    def first_state(self, stats: PairStats, batch: PairBatch) -> LossState:
        """The LossState of the first step of a run whose global batch is this batch. Values of mismatched completions,
        which the batch does not hold, are 0.
        """
        values = {}
        if self.needs.batch_values and not self.needs.mismatched:
            values = {name: value.detach().double() for name, value in self.batch_values(stats, batch).items()}
        elif self.needs.batch_values:
            zeros = batch.chosen_lengths.new_zeros(batch.pairs).double()
            values = dict.fromkeys(self.needs.batch_values, zeros)
        state = self.next_state(self.needs.state, values) if self.needs.state else {}
        return LossState(values, ranks=(batch.pairs,), state=state)

    def loss_at_reference(self) -> float | None:
        """The loss of every pair while policy and reference are equal, or None if it depends on the pair.

        With several terms it is the sum of their values for a pair, each times its weight. The trainer stops a run
        whose first loss differs from it.
        """
        return None

    @property
    def tied_at_reference(self) -> tuple[str, ...]:
        """Metrics that compare the policy with the reference, so they are undefined while the two are equal.

        Tables print "-" in their place before training.
        """
        if self.needs.reference == "none":
            return ()
        return ("rewards/accuracies", "rewards_tdpo/accuracies", "accuracy/logit")

    def other_optimum(self) -> str:
        """Why unlimited pairs do not lead this loss to pi*, the optimum of reward and KL; "" where they do.

        The testbed, where pi* is known, prints this line below its table.
        """
        return ""

    def equation(self) -> str:
        """The equation of the loss, for the card of an exported model; "" where the docstring has none.

        It is the text between the first sentence and the first section (`Args:`, ...) in the docstring of the function
        with the name of the method's file.
        """
        return _part(self._function, "equation")

    def paper(self) -> str:
        """The paper of the loss: the `Reference:` of the same docstring."""
        return _part(self._function, "Reference")

    @property
    def _function(self) -> Any:
        module = sys.modules[type(self).__module__]
        return getattr(module, module.__name__.rpartition(".")[2], None)

    def describe(self) -> str:
        """Variant and main settings, which a run prints in its first line."""
        return ""

    def _require(self, holds: bool, key: str, expected: str) -> None:
        """Raise a ConfigError that names the key and its value unless `holds` is true."""
        if not holds:
            raise ConfigError(f"method.{key}: found {getattr(self, key)!r}, expected {expected}")

    def _require_positive(self, key: str) -> None:
        value: Any = getattr(self, key)
        self._require(math.isfinite(value) and value > 0, key, "a finite number > 0")

    def _require_not_negative(self, key: str) -> None:
        value: Any = getattr(self, key)
        self._require(math.isfinite(value) and value >= 0, key, "a finite number >= 0")

    def _require_choice(self, key: str, literal: Any) -> None:
        """Raise a ConfigError unless the value is one of a field's choices. Args: literal: its Literal[...] type."""
        choices = get_args(literal)
        near = did_you_mean(str(getattr(self, key)), choices)
        self._require(getattr(self, key) in choices, key, f"one of {', '.join(choices)}{near}")


def _part(function: Any, name: str) -> str:
    """A part of a function's docstring, without indentation: `equation`, or the paragraph that starts with `name:`."""
    text = inspect.getdoc(function) or "" if inspect.isfunction(function) else ""
    _, _, rest = text.partition("\n\n")
    if name == "equation":
        section = re.search(r"^(Args|Returns|Raises|Reference):", rest, re.MULTILINE)
        return rest[: section.start()].strip("\n ") if section else ""
    found_at = re.search(rf"^{name}:(.*(?:\n[ \t]+.*)*)", rest, re.MULTILINE)
    return " ".join(found_at[1].split()) if found_at else ""


def pair_term(losses: torch.Tensor, name: str = "loss", weight: float = 1.0) -> Term:
    """A term averaged over pairs from unreduced losses of shape (B,)."""
    return Term(name, losses, losses.new_ones(losses.shape).detach(), weight)


def nll_term(stats: PairStats, weight: float, reduction: Reduction = "token_mean") -> tuple[Term, ...]:
    """The negative log-likelihood of the chosen completions as a term of a loss; none where its weight is 0.

    Args:
        reduction: `token_mean`: over the completion tokens of the global batch. `sequence_mean`: over pairs of the mean
            over a completion's tokens. `sum`: over pairs of the sum.
    """
    assert stats.chosen_logps is not None
    if weight == 0:
        return ()
    ones = stats.chosen_logps.new_ones(stats.chosen_logps.shape).detach()
    if reduction == "token_mean":
        return (Term("nll", -stats.chosen_logps, stats.chosen_lengths, weight),)
    return (
        Term("nll", -(stats.chosen_mean_logps if reduction == "sequence_mean" else stats.chosen_logps), ones, weight),
    )


def per_pair(**values: torch.Tensor) -> Metrics:
    """Metrics averaged over pairs; `rewards__chosen=x` becomes `rewards/chosen`."""
    return {
        name.replace("__", "/"): (value.detach(), value.detach().new_ones(value.shape))
        for name, value in values.items()
    }


def unpaired_metrics(rewards: torch.Tensor, logps: torch.Tensor, labels: torch.Tensor) -> Metrics:
    """Rewards and log-probabilities under TRL's names: desirable completions as chosen, the others as rejected.

    Args: rewards, logps: shape `(rows,)`. labels: 1 for desirable completions, 0 for others, `(rows,)`.
    """
    chosen = labels.to(rewards.dtype)
    sides = {"chosen": chosen, "rejected": 1 - chosen}
    values = {"rewards": rewards.detach(), "logps": logps.detach()}
    return {f"{name}/{side}": (value * of, of) for name, value in values.items() for side, of in sides.items()}


def reward_metrics(stats: PairStats, beta: float) -> Metrics:
    """Implicit rewards, beta times the log-ratio, under TRL's names; every method logs them, so that curves compare."""
    return reference_free_metrics(beta * stats.chosen_logratios, beta * stats.rejected_logratios)


def reference_free_metrics(chosen: torch.Tensor, rejected: torch.Tensor) -> Metrics:
    """Rewards of a loss without a reference, under TRL's names. Args: chosen, rejected: shape `(pairs,)`."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return per_pair(
        rewards__chosen=chosen,
        rewards__rejected=rejected,
        rewards__margins=chosen - rejected,
        rewards__accuracies=ahead(chosen, rejected),
    )


def ahead(first: torch.Tensor, second: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Accuracy of each pair: 1 where `first` is larger than `second`, 0 where it is smaller, 1/2 where they are equal.

    A policy that equals its reference ranks no pair, so its accuracy is 1/2 and not 0.

    Args: first, second: rewards, scores or logits. Shape `(pairs,)`.
    Returns: in the dtype of `first`, shape `(pairs,)`.
    """
    return ((first > second).to(first.dtype) + (first >= second).to(first.dtype)) / 2


def logit_accuracy(logits: torch.Tensor) -> Metrics:
    """Fraction of pairs whose training logit, which the loss increases, is positive."""
    return per_pair(accuracy__logit=ahead(logits))
