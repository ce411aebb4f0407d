"""What a method may decide about rounds of generate, judge, pair and train. A plain loss needs none of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from prefopt.types import ChosenPair, Response, ScoredGroup, WinProb

if TYPE_CHECKING:
    from prefopt.method import Method


class RoundsMethod:
    """The rounds half of a method: `class MyMethod(RoundsMethod, Method)` overrides what it does in another way.

    Every method can train in rounds. One that does not inherit from this class has the behaviour of these defaults: the
    judge sees whole completions, and a pair is the best judged completion against the worst.
    """

    testbed_world: ClassVar[str | None] = None  # the world of its rounds on the testbed; None: the usual one

    @property
    def ranks_by(self) -> WinProb:
        """How a judge's numbers become an order and win probabilities, see `prefopt.ranking`."""
        return "pairwise_sigmoid"

    def render_prompt(self, prompt: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
        """The prompt as the policy reads it, from the one that a judge sees."""
        return prompt

    @property
    def thinks(self) -> bool:
        """Whether completions hold something beside the response, which no judge and no reader may see."""
        return False

    def judge_view(self, text: str) -> Response | str:
        """What a judge may see of a completion, or a short reason why there is nothing."""
        return Response(text)

    def tuned(self, groups: Sequence[ScoredGroup]) -> RoundsMethod:
        """This method with the parameters that it chooses from all groups of a round, before it makes pairs: itself."""
        return self

    def order(self, group: ScoredGroup) -> Any:
        """The numbers that rank the judged completions of a group, best highest, NaN if unknown. Shape `(judged,)`."""
        from prefopt.ranking import order_scores

        return order_scores(group.judgement, self.ranks_by)

    def make_pairs(self, group: ScoredGroup) -> Sequence[ChosenPair] | str:
        """The pairs to train on, or a short reason why there is none. The best judged completion against the worst."""
        from prefopt.ranking import best_and_worst

        ends = best_and_worst(self.order(group))
        return ends if isinstance(ends, str) else [ChosenPair(group.judged[ends[0]], group.judged[ends[1]])]

    def round_figures(
        self, groups: Sequence[ScoredGroup], pairs: Sequence[Sequence[ChosenPair]]
    ) -> Mapping[str, float]:
        """Numbers of a round's candidates and pairs for the tables of rounds; one sequence of pairs per group."""
        return {}

    def text_figures(self, texts: Sequence[str]) -> Mapping[str, float]:
        """Numbers of completions, of whatever policy, for the tables of rounds and samples."""
        return {}

    def card(self) -> Mapping[str, Any]:
        """How an exported model's user must prompt it, as JSON values by name, for `generation_config.json`."""
        return {}


class ScoredRoundsMethod(RoundsMethod):
    """The rounds half of a loss that reads the scores of both completions: pairs carry those of the judge."""

    def make_pairs(self, group: ScoredGroup) -> Sequence[ChosenPair] | str:
        """The best judged completion against the worst, with their scores as columns."""
        from prefopt.ranking import best_and_worst

        scores = group.judgement.scores
        if scores is None:
            return "the judge gives no scores"
        ends = best_and_worst(self.order(group))
        if isinstance(ends, str):
            return ends
        chosen, rejected = ends
        columns = {"chosen_score": float(scores[chosen]), "rejected_score": float(scores[rejected])}
        return [ChosenPair(group.judged[chosen], group.judged[rejected], columns)]


MEMBERS = frozenset(name for name in vars(RoundsMethod) if not name.startswith("_"))
_DEFAULTS = RoundsMethod()


def in_rounds(method: Method) -> RoundsMethod:
    """How a method works in rounds: itself where it decides that, else the defaults."""
    return method if isinstance(method, RoundsMethod) else _DEFAULTS


def overlooked(method_class: type[Method]) -> list[str]:
    """Members of `RoundsMethod` that a class defines without inheriting from it, so that they would have no effect."""
    return [] if issubclass(method_class, RoundsMethod) else sorted(MEMBERS & {*dir(method_class)})
