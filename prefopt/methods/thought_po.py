"""Thought Preference Optimization (arXiv 2410.10630): DPO on thoughts and responses; a judge sees the latter alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from prefopt import thoughts
from prefopt.method import Method, logit_accuracy, pair_term, reward_metrics
from prefopt.methods.dpo import dpo
from prefopt.rounds_method import RoundsMethod
from prefopt.thoughts import Answer, Messages, OnRepeat, ThoughtFormat
from prefopt.types import ChosenPair, LossOutput, Needs, PairBatch, PairStats, Response, ScoredGroup, Term

RIDGE = 0.01  # of the fit to a comparing judge's verdicts: without one, who wins every battle has no finite strength
RHOS = tuple(i / 20 for i in range(11))  # what `rho: auto` chooses from: the paper's range, 0 to 0.5


@dataclass(frozen=True)
class ThoughtPO(RoundsMethod, Method):
    """Thought Preference Optimization: the policy thinks before it answers, and only its answers are judged."""

    ambiguous: ClassVar[tuple[str, ...]] = ("tpo",)
    testbed_world: ClassVar[str | None] = "scratchpad"

    beta: float = 0.1
    """Strength of the pull to the reference; > 0."""
    # not published; 0.1 is DPO's

    nll_weight: float = 0.0
    """Weight of the likelihood of the chosen thought and response, in nats per token; >= 0."""
    # the paper tried DPO with such a term (IRPO) and saw no difference

    thought_prompt: str = "specific"
    """How thoughts are asked for in rounds: generic, specific, system, or a file; none: the direct baseline."""
    # arXiv 2410.10630, figure 2; the text is ours, the markers are the paper's

    response_marker: str | None = None
    """What the policy writes between thought and response. None: what the thought prompt's file names."""

    thought_marker: str | None = None
    """What it writes before the thought. None: what the thought prompt's file names."""

    on_repeated_marker: OnRepeat = "error"
    """A marker in the response: the completion holds no response, or the response begins after the first marker."""
    # not in the paper

    rho: float | Literal["auto"] = "auto"
    """Weight of length against score, both as standard scores; >= 0. auto: the least of 0, 0.05, ..., 0.5 with which
    chosen responses are on average no longer than rejected ones, in each round anew."""
    # the paper: 0 to 0.5, chosen so that the chosen responses are no longer than the rejected ones

    def __post_init__(self) -> None:
        self._require_positive("beta")
        self._require(math.isfinite(self.nll_weight) and self.nll_weight >= 0, "nll_weight", "a number >= 0")
        self._require_choice("on_repeated_marker", OnRepeat)
        if self.rho != "auto":
            self._require(math.isfinite(self.rho) and self.rho >= 0, "rho", "a number >= 0, or auto")
        if not self.thinks:
            for key in ("response_marker", "thought_marker"):
                self._require(getattr(self, key) is None, key, "none: with thought_prompt none nothing is cut in two")
        for key in ("response_marker", "thought_marker"):
            value = getattr(self, key)
            self._require(value is None or value == value.strip(), key, "a text without white space at its ends")
        assert self.format is not None  # reads the file, whose faults are the user's to know before any model is loaded

    @property
    def thinks(self) -> bool:
        """Whether a thought is asked for at all."""
        return self.thought_prompt != thoughts.NONE

    @functools.cached_property
    def format(self) -> ThoughtFormat:
        """How thoughts are asked for and told from responses."""
        return thoughts.read_format(
            self.thought_prompt,
            key="method.thought_prompt",
            response_marker=self.response_marker,
            thought_marker=self.thought_marker,
            on_repeated_marker=self.on_repeated_marker,
        )

    @property
    def needs(self) -> Needs:
        return Needs(reference="sequence")

    def loss(self, stats: PairStats, batch: PairBatch) -> LossOutput:
        assert stats.chosen_logps is not None
        chosen, rejected = stats.chosen_logratios, stats.rejected_logratios
        terms = [pair_term(dpo(chosen, rejected, beta=self.beta), name="preference" if self.nll_weight else "loss")]
        if self.nll_weight:
            terms.append(Term("nll", -stats.chosen_logps, count=stats.chosen_lengths, weight=self.nll_weight))
        metrics = reward_metrics(stats, self.beta) | logit_accuracy(chosen - rejected)
        return LossOutput(terms=tuple(terms), metrics=metrics)

    def loss_at_reference(self) -> float | None:
        return None if self.nll_weight else math.log(2)

    def equation(self) -> str:
        nll = f" + {self.nll_weight:g} (-log pi(y_w|x)), the latter a mean over tokens" if self.nll_weight else ""
        return f"-log s(beta (chosen_logratios - rejected_logratios)){nll}; completions are thought and response"

    def paper(self) -> str:
        return "Wu et al., Thinking LLMs: General Instruction Following with Thought Generation, arXiv 2410.10630."

    # How it works in rounds -------------------------------------------------------------------------------------------

    def render_prompt(self, prompt: str | Messages) -> str | Messages:
        return self.format.render(prompt)

    def judge_view(self, text: str) -> Response | str:
        """The response alone, or why there is none: neither thought nor thought prompt reaches a judge."""
        answer = self.format.parse(text)
        return answer if isinstance(answer, str) else Response(answer.response)

    def tuned(self, groups: Sequence[ScoredGroup]) -> ThoughtPO:
        """With `rho: auto` made a number: the least one of the paper's range that does what it is there for.

        Chosen responses must on average be no longer than rejected ones, in characters, over the pairs of these groups
        whose two sides both hold a response. Where none of them does it, the largest.
        """
        if self.rho != "auto":
            return self
        measured = [self._measured(group) for group in groups]

        def holds(rho: float) -> bool:
            chosen = rejected = 0.0
            for group, (scores, lengths) in zip(groups, measured, strict=True):
                ends = self._ends(group, scores, lengths, rho)
                if not isinstance(ends, str) and ends[1] is not None:
                    chosen, rejected = chosen + lengths[ends[0]], rejected + lengths[ends[1]]
            return chosen <= rejected

        return dataclasses.replace(self, rho=next((rho for rho in RHOS if holds(rho)), RHOS[-1]))

    def order(self, group: ScoredGroup) -> Any:
        """Length-controlled scores of the judged responses, NaN where the judge failed, `(judged,)`.

        `s_i = z(r_i) - rho z(l_i)`, r the judge's score, or the strength fitted to its verdicts where it compares, l
        the response's length in characters (arXiv 2410.10630, length control).
        """
        from prefopt.ranking import length_controlled

        assert self.rho != "auto", "`tuned` has made it a number"
        return length_controlled(*self._measured(group), rho=self.rho)

    def make_pairs(self, group: ScoredGroup) -> Sequence[ChosenPair] | str:
        """Best against worst by length-controlled score; a completion without a response is worse than any.

        The first of equals. A prompt without a judged response gives no pair, nor one whose responses are all equal by
        the judge, unless a completion without a response stands beside them.
        """
        assert self.rho != "auto", "`tuned` has made it a number"
        ends = self._ends(group, *self._measured(group), self.rho)
        if isinstance(ends, str):
            return ends
        best, worst = ends
        return [ChosenPair(group.judged[best], group.unparsed[0] if worst is None else group.judged[worst])]

    def _measured(self, group: ScoredGroup) -> tuple[Any, Any]:
        """What the judge thinks of each judged response, length apart, NaN where it failed; and their lengths.

        Both `(judged,)`. The verdicts of a judge that compares are fitted here, once.
        """
        import numpy as np

        from prefopt.ranking import elo, win_probabilities

        lengths = np.array([len(self._response(group, index)) for index in group.judged], dtype=np.float64)
        if group.judgement.scores is not None:
            return np.array(group.judgement.scores, dtype=np.float64), lengths
        # both orders of a pair are two battles; a verdict that changes with the order is one win for each
        battles = 2 * win_probabilities(group.judgement)
        fought = np.isfinite(battles).sum(1) > 1  # against itself each has a tie
        return np.where(fought, elo(battles, ridge=RIDGE), np.nan), lengths

    def _ends(self, group: ScoredGroup, scores: Any, lengths: Any, rho: float) -> tuple[int, int | None] | str:
        """Where best and worst stand among the judged, None for a completion without a response; or why not."""
        import numpy as np

        from prefopt.ranking import length_controlled

        known = np.flatnonzero(np.isfinite(scores))
        if not known.size:
            return "no candidate judged"
        order = length_controlled(scores, lengths, rho=rho)[known]
        best = int(known[order.argmax()])
        if group.unparsed:
            return best, None
        if known.size < 2:
            return "fewer than two judged"
        if scores[known].max() == scores[known].min():
            return "all scores equal"
        return best, int(known[order.argmin()])

    def round_figures(self, groups: Sequence[ScoredGroup], pairs: Sequence[Sequence[ChosenPair]]) -> dict[str, float]:
        """Of a round's candidates and pairs: lengths in characters, and how many completions hold no response."""
        figures = self.text_figures([c.text for group in groups for c in group.completions])
        figures["rho"] = float(self.rho)
        both = [(group, pair) for group, some in zip(groups, pairs, strict=True) for pair in some]
        if both:
            unparsed = sum(pair.rejected in group.unparsed for group, pair in both)
            figures["rejected_unparsed"] = unparsed / len(both)
        chosen, rejected = self._lengths(groups, pairs)
        if chosen:
            figures |= {"chosen_characters": chosen, "rejected_characters": rejected}
        return figures

    def text_figures(self, texts: Sequence[str]) -> dict[str, float]:
        """Of completions: share that holds a response, mean length of thoughts and responses in characters."""
        answers = [self.format.parse(text) for text in texts]
        parsed = [answer for answer in answers if isinstance(answer, Answer)]
        figures = {"parsed": len(parsed) / len(answers)} if answers else {}
        if parsed:
            if self.thinks:
                figures["thought_characters"] = sum(len(answer.thought) for answer in parsed) / len(parsed)
            figures["response_characters"] = sum(len(answer.response) for answer in parsed) / len(parsed)
        return figures

    def card(self) -> Mapping[str, Any]:
        return {"thought": self.format.to_dict()} if self.thinks else {}

    def describe(self) -> str:
        nll = f", nll_weight {self.nll_weight:g}" if self.nll_weight else ""
        rho = self.rho if self.rho == "auto" else f"{self.rho:g}"
        return f"thought prompt {self.thought_prompt}, beta {self.beta:g}{nll}, rho {rho}"

    def _response(self, group: ScoredGroup, index: int) -> str:
        seen = self.judge_view(group.completions[index].text)
        return seen.text if isinstance(seen, Response) else ""

    def _lengths(self, groups: Sequence[ScoredGroup], pairs: Sequence[Sequence[ChosenPair]]) -> tuple[float, float]:
        """Mean length of chosen and rejected responses where both sides hold one; 0 and 0 where there is no pair."""
        sides = [
            (len(self._response(group, pair.chosen)), len(self._response(group, pair.rejected)))
            for group, some in zip(groups, pairs, strict=True)
            for pair in some
            if pair.rejected not in group.unparsed
        ]
        if not sides:
            return 0.0, 0.0
        chosen, rejected = zip(*sides, strict=True)
        return sum(chosen) / len(sides), sum(rejected) / len(sides)
