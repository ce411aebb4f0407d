"""Thought Preference Optimization (arXiv 2410.10630): DPO on thoughts and responses; judges receive responses only."""

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

RIDGE = 0.01  # ridge penalty of the Bradley-Terry fit: without it a candidate that wins every battle has no finite one
RHOS = tuple(i / 20 for i in range(11))  # candidates of `rho: auto`: the paper's range, 0 to 0.5


@dataclass(frozen=True)
class ThoughtPO(RoundsMethod, Method):
    """Thought Preference Optimization: the policy writes a thought before its response; only responses are judged."""

    ambiguous: ClassVar[tuple[str, ...]] = ("tpo",)
    testbed_world: ClassVar[str | None] = "scratchpad"

    beta: float = 0.1
    """KL-regularisation strength beta: a larger beta keeps the policy closer to the reference; > 0."""
    # not published; 0.1 is DPO's

    nll_weight: float = 0.0
    """Weight of the NLL of the chosen thought and response, in nats per token; >= 0."""
    # the paper found no difference with such a term (IRPO)

    thought_prompt: str = "specific"
    """The prompt that asks for thoughts in rounds: generic, specific, system, or a file; none: the direct baseline."""
    # arXiv 2410.10630, figure 2; the text is ours, the markers are the paper's

    response_marker: str | None = None
    """The text between thought and response. None: the marker of the thought prompt's file."""

    thought_marker: str | None = None
    """The text before the thought. None: the marker of the thought prompt's file."""

    on_repeated_marker: OnRepeat = "error"
    """Where the response repeats a marker: error: the completion is unparsed; first: it is split at the first one."""
    # not in the paper

    rho: float | Literal["auto"] = "auto"
    """Length-control weight rho, on standardised scores and lengths; >= 0. auto: in each round the smallest of 0, 0.05,
    ..., 0.5 with which chosen responses are on average no longer than rejected ones."""
    # the paper: 0 to 0.5, chosen so that the chosen responses are no longer than the rejected ones

    def __post_init__(self) -> None:
        self._require_positive("beta")
        self._require(math.isfinite(self.nll_weight) and self.nll_weight >= 0, "nll_weight", "a number >= 0")
        self._require_choice("on_repeated_marker", OnRepeat)
        if self.rho != "auto":
            self._require(math.isfinite(self.rho) and self.rho >= 0, "rho", "a number >= 0, or auto")
        if not self.thinks:
            for key in ("response_marker", "thought_marker"):
                self._require(
                    getattr(self, key) is None, key, "none: with thought_prompt none completions are not split"
                )
        for key in ("response_marker", "thought_marker"):
            value = getattr(self, key)
            self._require(value is None or value == value.strip(), key, "a text without white space at its ends")
        assert self.format is not None  # reads the file, so that its errors are raised before a model is loaded

    @property
    def thinks(self) -> bool:
        """Whether the policy is prompted for thoughts."""
        return self.thought_prompt != thoughts.NONE

    @functools.cached_property
    def format(self) -> ThoughtFormat:
        """The thought prompt and the markers that separate thoughts from responses."""
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
        return f"-log s(beta (chosen_logratios - rejected_logratios)){nll}; completions hold thought and response"

    def paper(self) -> str:
        return "Wu et al., Thinking LLMs: General Instruction Following with Thought Generation, arXiv 2410.10630."

    # In rounds --------------------------------------------------------------------------------------------------------

    def render_prompt(self, prompt: str | Messages) -> str | Messages:
        return self.format.render(prompt)

    def judge_view(self, text: str) -> Response | str:
        """The response without its thought, or why there is none."""
        answer = self.format.parse(text)
        return answer if isinstance(answer, str) else Response(answer.response)

    def tuned(self, groups: Sequence[ScoredGroup]) -> ThoughtPO:
        """The method with `rho: auto` replaced by the smallest sufficient value of the paper's range.

        A value is sufficient if chosen responses are on average no longer than rejected ones, in characters, over the
        pairs of these groups in which both completions have a response. If none is, the largest value is taken.
        """
        if self.rho != "auto":
            return self
        measured = [self._measured(group) for group in groups]

        def sufficient(rho: float) -> bool:
            chosen = rejected = 0.0
            for group, (scores, lengths) in zip(groups, measured, strict=True):
                ends = self._ends(group, scores, lengths, rho)
                if not isinstance(ends, str) and ends[1] is not None:
                    chosen, rejected = chosen + lengths[ends[0]], rejected + lengths[ends[1]]
            return chosen <= rejected

        return dataclasses.replace(self, rho=next((rho for rho in RHOS if sufficient(rho)), RHOS[-1]))

    def order(self, group: ScoredGroup) -> Any:
        """Length-controlled scores of the judged responses, NaN where the judge failed, `(judged,)`.

        `s_i = z(r_i) - rho z(l_i)` with r the judge's score, or for a pairwise judge the fitted Bradley-Terry strength,
        and l the response's length in characters (arXiv 2410.10630, length control).
        """
        from prefopt.ranking import length_controlled

        assert self.rho != "auto", "`tuned` replaces auto by a number"
        return length_controlled(*self._measured(group), rho=self.rho)

    def make_pairs(self, group: ScoredGroup) -> Sequence[ChosenPair] | str:
        """The best and the worst completion by length-controlled score; one without a response is worse than any other.

        Of equal ones the first is taken. There is no pair without a judged response, or if the judge scores all
        responses equally and every completion has one.
        """
        assert self.rho != "auto", "`tuned` replaces auto by a number"
        ends = self._ends(group, *self._measured(group), self.rho)
        if isinstance(ends, str):
            return ends
        best, worst = ends
        return [ChosenPair(group.judged[best], group.unparsed[0] if worst is None else group.judged[worst])]

    def _measured(self, group: ScoredGroup) -> tuple[Any, Any]:
        """(scores of the judged responses, NaN where the judge failed; their lengths in characters), `(judged,)` each.

        For a pairwise judge the scores are Bradley-Terry strengths fitted to its verdicts.
        """
        import numpy as np

        from prefopt.ranking import elo, win_probabilities

        lengths = np.array([len(self._response(group, index)) for index in group.judged], dtype=np.float64)
        if group.judgement.scores is not None:
            return np.array(group.judgement.scores, dtype=np.float64), lengths
        # both orders of a pair are two battles; contradictory verdicts are one win for each
        battles = 2 * win_probabilities(group.judgement)
        fought = np.isfinite(battles).sum(1) > 1  # the diagonal is a tie with itself
        return np.where(fought, elo(battles, ridge=RIDGE), np.nan), lengths

    def _ends(self, group: ScoredGroup, scores: Any, lengths: Any, rho: float) -> tuple[int, int | None] | str:
        """(index of the best, of the worst) among the judged, None for one without a response; or why there is none."""
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
        """Metrics of a round's candidates and pairs: lengths in characters, and the fraction without a response."""
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
        """Metrics of completions: fraction with a response, mean length of thoughts and responses in characters."""
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
        """Mean length of chosen and rejected responses over pairs in which both have one; (0, 0) if there are none."""
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
