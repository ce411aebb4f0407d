"""The base class of every method: a frozen dataclass of hyper-parameters with their validation and the loss."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from prefopt.errors import ConfigError, did_you_mean
from prefopt.types import ChosenPair, LossOutput, Needs, PairBatch, PairStats, Response, ScoredGroup, Term, WinProb

if TYPE_CHECKING:
    import torch

Metrics = dict[str, "tuple[torch.Tensor, torch.Tensor]"]


@dataclass(frozen=True)
class Method:
    """A training objective: `needs` declares what the trainer computes, `loss` turns these statistics into loss terms.

    Subclasses are frozen dataclasses whose fields are their hyper-parameters; `__post_init__` validates them. One file
    holds one subclass of Method, and the file's name is the method's name.
    """

    ambiguous: ClassVar[tuple[str, ...]] = ()  # names that could mean this method or another one; they are rejected
    testbed_world: ClassVar[str | None] = None  # the testbed world of its rounds; None: the default world
    default_lr: ClassVar[float | None] = None  # default of optim.lr; None: the default of all methods
    default_lr_source: ClassVar[str] = ""  # where default_lr comes from, such as a paper

    @property
    def needs(self) -> Needs:
        raise NotImplementedError(f"{type(self).__name__} must declare its needs")

    def loss(self, stats: PairStats, batch: PairBatch) -> LossOutput:
        raise NotImplementedError(f"{type(self).__name__} must define loss(stats, batch)")

    def loss_at_reference(self) -> float | None:
        """The loss of every pair while policy and reference are equal, or None if it depends on the pair.

        The trainer stops a run whose first loss differs from it.
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

    # In rounds -------------------------------------------------------------------------------------------------------

    @property
    def ranks_by(self) -> WinProb:
        """How judge scores become an order and win probabilities, see `prefopt.ranking`."""
        return "pairwise_sigmoid"

    def render_prompt(self, prompt: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
        """The prompt that the policy receives, made from the one that a judge sees."""
        return prompt

    @property
    def thinks(self) -> bool:
        """Whether completions contain a thought beside the response, which judges and users must not see."""
        return False

    def judge_view(self, text: str) -> Response | str:
        """The part of a completion that a judge may see, or a short reason why there is none."""
        return Response(text)

    def tuned(self, groups: Sequence[ScoredGroup]) -> Method:
        """This method with hyper-parameters set from all groups of a round, before it makes pairs. Default: itself."""
        return self

    def order(self, group: ScoredGroup) -> Any:
        """Scores that rank the judged completions of a group, best highest, NaN if unknown. Shape `(judged,)`."""
        from prefopt.ranking import order_scores

        return order_scores(group.judgement, self.ranks_by)

    def make_pairs(self, group: ScoredGroup) -> Sequence[ChosenPair] | str:
        """The training pairs of a group, or a short reason why there are none. Default: the best against the worst."""
        from prefopt.ranking import best_and_worst

        ends = best_and_worst(self.order(group))
        return ends if isinstance(ends, str) else [ChosenPair(group.judged[ends[0]], group.judged[ends[1]])]

    def round_figures(
        self, groups: Sequence[ScoredGroup], pairs: Sequence[Sequence[ChosenPair]]
    ) -> Mapping[str, float]:
        """Figures of a round's candidates and pairs for the round report. Args: pairs: one sequence per group."""
        return {}

    def text_figures(self, texts: Sequence[str]) -> Mapping[str, float]:
        """Figures of completions of any policy for the round report."""
        return {}

    def card(self) -> Mapping[str, Any]:
        """How prompts and responses were formatted, which a user of the exported model needs; JSON values by name."""
        return {}

    def equation(self) -> str:
        """The equation of the loss, for the card of an exported model; "" where the docstring has none.

        It is the text between the first sentence and `Args:` in the docstring of the function with the name of the
        method's file.
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
        head, found, _ = rest.partition("Args:\n")
        return head.strip("\n ") if found else ""
    found_at = re.search(rf"^{name}:(.*(?:\n[ \t]+.*)*)", rest, re.MULTILINE)
    return " ".join(found_at[1].split()) if found_at else ""


def pair_term(losses: torch.Tensor, name: str = "loss", weight: float = 1.0) -> Term:
    """A term averaged over pairs from unreduced losses of shape (B,)."""
    return Term(name, losses, losses.new_ones(losses.shape).detach(), weight)


def per_pair(**values: torch.Tensor) -> Metrics:
    """Metrics averaged over pairs; `rewards__chosen=x` becomes `rewards/chosen`."""
    return {
        name.replace("__", "/"): (value.detach(), value.detach().new_ones(value.shape))
        for name, value in values.items()
    }


def reward_metrics(stats: PairStats, beta: float) -> Metrics:
    """Implicit rewards, beta times the log-ratio, under TRL's names; every method logs them, so that curves compare."""
    chosen, rejected = beta * stats.chosen_logratios.detach(), beta * stats.rejected_logratios.detach()
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
