"""Test-time Preference Optimization (arXiv 2501.12895): a policy that improves its answers by its own critique of them.

Nothing is trained. Samples are scored, the policy writes a critique of the best against the worst, and new samples by
that critique. Best-of-N is the same without a step, revision the same without a worse response. Knows inference engines
and judges by their interfaces, and no files.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt.data.comparison import plain_text
from prefopt.data.encoder import Encoder
from prefopt.data.rows import RowProblem
from prefopt.data.templates import Rendering
from prefopt.generation.base import Engine, Sampling
from prefopt.inference.prompt_templates import Templates, read_templates, short_value
from prefopt.inference.trace import Cost, Sample, Step, Trace
from prefopt.judges.base import Judge
from prefopt.ranking import mean_win_probabilities
from prefopt.storage import text_number
from prefopt.thoughts import NO_MARKER, Answer, ThoughtFormat
from prefopt.types import Completion, Judgement, Prompt, Question, Response

if TYPE_CHECKING:
    from prefopt.data.rows import Messages

ambiguous = ("tpo",)
# name: what it does, samples of a step, steps after the first samples
STRATEGIES = {
    "plain": ("one sample", 1, 0),
    "best_of_n": ("n samples, of which the judge takes one", 5, 0),
    "revision": ("n samples; then in each step a critique of the best so far, and n new samples by it", 5, 2),
    "test_time_po": ("the same with a critique of the best beside the worst (arXiv 2501.12895)", 5, 2),
}
_ALONE = ("revision",)  # critiques that see no worse response
_SEEDS = 2**31

NO_RESPONSE = "no scored response to improve"
Progress = Callable[[str, int], None]  # called with the name of a phase, and how many samples were added


@dataclass(frozen=True)
class TestTimeSettings:
    """How answers are improved.

    Args:
        n: samples of each step.
        depth: steps after the first samples; 0 is best-of-N.
        sampling: of all completions; its `n` is not read.
        critique_tokens: most tokens of a textual loss and of a textual gradient. None: `sampling.max_tokens`.
        quoted_tokens: most tokens of a response that is quoted in a prompt; the authors' 2,048, of the policy's own
            tokenizer.
        alone: whether the textual loss is of the best response alone, without the worst beside it.
        seed: of the run.
        thought: how thoughts are separated from responses.
        rendering: the arguments of the policy's chat template.
    """

    __test__ = False  # not a test class, whatever pytest thinks of its name

    n: int = 5
    depth: int = 2
    sampling: Sampling = field(default_factory=lambda: Sampling(n=1, temperature=0.7, top_p=0.95, max_tokens=2048))
    critique_tokens: int | None = None
    quoted_tokens: int = 2048
    alone: bool = False
    seed: int = 0
    thought: ThoughtFormat = field(default_factory=lambda: ThoughtFormat(None))
    templates: Templates = field(default_factory=read_templates)
    rendering: Rendering = field(default_factory=Rendering)

    @classmethod
    def of(cls, strategy: str, **more: Any) -> TestTimeSettings:
        """Those of a strategy."""
        return cls(alone=strategy in _ALONE, **more)


def optimize(
    prompt: Prompt, engine: Engine, judge: Judge, tokenizer: Any, settings: TestTimeSettings | None = None
) -> Trace:
    """Answer a prompt by test-time preference optimization.

    N samples are scored. In each of D steps v and w are best and worst of all that have a score:

        loss      = policy(why v is better than w)                  1 call
        gradient  = policy(what to change in v, given the loss)     1 call
        responses = policy(v, rewritten by the gradient)            N samples, scored

    That is N + D (2 + N) samples and, of a judge that scores, at most N (1 + D) scores; the answer is `Trace.best`. A
    completion without a response is dropped and counted; a step that cannot be done is skipped, with the reason.

    Args:
        prompt: with the tokens that the policy reads, its thought prompt around it where it has one.
        engine: the policy. judge: it sees prompt and responses alone. tokenizer: the policy's.
        settings: the authors' by default, but that N is 5, and D is 2 as in their benchmarks.
    Returns: all samples, critiques and scores.
    Raises: RoundError when the inference engine or the judge fails.
    Reference: Li et al., Test-Time Preference Optimization, arXiv 2501.12895, algorithm 1. Differs from the authors'
        code: seeds, escaped tags and what is counted, see docs/methods/test_time_po.md.
    """
    (trace,) = optimize_all([prompt], engine, judge, tokenizer, settings)
    return trace


def optimize_all(
    prompts: Sequence[Prompt],
    engine: Engine,
    judge: Judge,
    tokenizer: Any,
    settings: TestTimeSettings | None = None,
    *,
    progress: Progress = lambda phase, samples: None,
) -> list[Trace]:
    """The same for many prompts: all calls of one kind go to the inference engine together, so that it can batch them.

    The result for a prompt does not depend on the others. Args: as `optimize`; progress: called as samples come.
    """
    run = _Optimization(prompts, engine, judge, tokenizer, settings or TestTimeSettings(), progress)
    run.begin()
    for number in range(1, run.settings.depth + 1):
        run.step(number)
    return [state.trace() for state in run.states]


def seed_of(seed: int, key: str, kind: str, step: int, n: int) -> int:
    """The first seed of a call; sample i draws with the i-th after it. Calls of one n share all of them or none."""
    return text_number(f"{seed}:{key}:{kind}:{step}") % (_SEEDS // n) * n


class _State:
    """A prompt in progress."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.steps: list[Step] = []
        self.scores: dict[str, float] = {}  # in the order in which they were first seen; NaN where the judge failed
        self.now = Step(0)

    def change(self, **values: Any) -> None:
        self.now = dataclasses.replace(self.now, **values)

    def spend(self, **cost: int) -> None:
        self.change(cost=self.now.cost + Cost(**cost))

    def count(self, problems: Mapping[str, int]) -> None:
        self.change(problems=dict(Counter(self.now.problems) + Counter(problems)))

    def end(self) -> None:
        self.steps.append(self.now)

    @property
    def is_active(self) -> bool:
        return self.now.skipped is None

    def extremes(self) -> tuple[str, str] | None:
        """Best and worst of all that have a score, the first of equals."""
        texts = [text for text, score in self.scores.items() if math.isfinite(score)]
        if not texts:
            return None
        known = np.array([self.scores[text] for text in texts])
        return texts[int(known.argmax())], texts[int(known.argmin())]

    def trace(self) -> Trace:
        scored = {text: score for text, score in self.scores.items() if math.isfinite(score)}
        return Trace(self.prompt, tuple(self.steps), scored)


class _Optimization:
    def __init__(
        self,
        prompts: Sequence[Prompt],
        engine: Engine,
        judge: Judge,
        tokenizer: Any,
        settings: TestTimeSettings,
        progress: Progress,
    ) -> None:
        self.states = [_State(prompt) for prompt in prompts]
        self.engine, self.judge, self.tokenizer, self.settings = engine, judge, tokenizer, settings
        self.progress = progress
        self.encoder = Encoder(tokenizer, _SEEDS, rendering=settings.rendering)
        self.compares: bool | None = None  # whether the judge does; known once it has judged

    def begin(self) -> None:
        """The first samples."""
        for state in self.states:
            if not self._has_room(state.prompt.ids):
                state.change(skipped=self._no_room("prompt", state.prompt.ids))
        self._sample({state: state.prompt.ids for state in self.states if state.is_active}, 0, self._first)

    def step(self, number: int) -> None:
        """Loss, gradient and update of every prompt that has something to improve."""
        texts: dict[_State, dict[str, str]] = {}
        for state in self.states:
            state.now = Step(number)
            extremes = state.extremes()
            if extremes is None:
                state.change(skipped=NO_RESPONSE)
                continue
            chosen, rejected = extremes
            state.change(chosen=chosen, rejected=None if self.settings.alone else rejected)
            texts[state] = {
                "query": self.settings.templates.escaped(plain_text(state.prompt.prompt)),
                "chosen": self._quoted(chosen),
                "rejected": self._quoted(rejected),
                "short": self.settings.templates.escaped(short_value(self._truncated(chosen))),
            }
        self._critique("loss", texts, number)
        self._critique("gradient", texts, number)
        asked: dict[_State, Sequence[int]] = {}
        for state in [state for state in self.states if state.is_active]:
            self._put(asked, state, "update", self.settings.templates.update.filled(**texts[state]))
        self._sample(asked, number, self._updated)

    # Calls ------------------------------------------------------------------------------------------------------------

    def _critique(self, kind: str, texts: dict[_State, dict[str, str]], number: int) -> None:
        """A textual loss or gradient of each prompt, which is put among its texts."""
        templates = self.settings.templates
        asked: dict[_State, Sequence[int]] = {}
        for state in [state for state in self.states if state.is_active]:
            own = texts[state]
            if kind == "loss":
                # a response beside itself is not compared: there is only one
                alone = self.settings.alone or state.now.chosen == state.now.rejected
                question = (templates.loss_alone if alone else templates.loss).filled(**own)
                own["evaluation"] = question[0]
                own["constraints"] = templates.constraints_alone if alone else templates.constraints
            else:
                question = templates.gradient.filled(**own)
            self._put(asked, state, kind, question)
        limit = self.settings.critique_tokens or self.settings.sampling.max_tokens
        for state, (completion,) in self._ask(asked, kind, number, 1, limit).items():
            state.change(**{kind: completion.text})
            texts[state]["critique" if kind == "loss" else "feedback"] = templates.escaped(completion.text.strip())

    def _sample(self, asked: Mapping[_State, Sequence[int]], number: int, read: Callable[[str], Answer | str]) -> None:
        """Samples of all questions, parsed and scored; ends the step of every prompt."""
        n, kind = self.settings.n, "update" if number else "answer"
        for state, completions in self._ask(asked, kind, number, n, self.settings.sampling.max_tokens).items():
            first, samples = seed_of(self.settings.seed, state.prompt.key, kind, number, n), []
            for i, completion in enumerate(completions):
                found = read(completion.text)
                parts = (None, found) if isinstance(found, str) else (found.response, None, found.thought)
                samples.append(Sample(number, i, first + i, *parts))
            state.change(samples=tuple(samples))
        self._judge_all(number)
        for state in self.states:
            state.end()

    def _ask(
        self, asked: Mapping[_State, Sequence[int]], kind: str, number: int, n: int, limit: int
    ) -> dict[_State, list[Completion]]:
        """The completions of each, and what they cost."""
        sampling = dataclasses.replace(self.settings.sampling, n=n, max_tokens=limit, logprobs=False)
        phase = f"step {number} {kind}"
        skipped = len(self.states) - len(asked)
        self.progress(phase, skipped * n)
        if not asked:
            return {}
        answers = self.engine.generate(
            [list(ids) for ids in asked.values()],
            sampling,
            [seed_of(self.settings.seed, state.prompt.key, kind, number, n) for state in asked],
            lambda which, completions: self.progress(phase, len(completions)),
        )
        for (state, ids), completions in zip(asked.items(), answers, strict=True):
            generated = sum(len(completion.token_ids) for completion in completions)
            state.spend(calls=1, samples=len(completions), prompt_tokens=len(ids), generated_tokens=generated)
        return dict(zip(asked, answers, strict=True))

    def _judge_all(self, number: int) -> None:
        """Scores of the responses that have none; of a judge that compares, of all responses anew."""
        asked: dict[_State, list[str]] = {}
        for state in self.states:
            new = dict.fromkeys(s.text for s in state.now.samples if s.text is not None and s.text not in state.scores)
            if new:
                asked[state] = [*(state.scores if self.compares else ()), *new]
                state.scores |= dict.fromkeys(new, math.nan)
        if not asked:
            return
        self.progress(f"step {number} judge", 0)
        questions = [
            Question(
                prompt=state.prompt.prompt,
                responses=tuple(Response(text) for text in texts),
                key=state.prompt.key,
                answer=state.prompt.answer,
            )
            for state, texts in asked.items()
        ]
        for (state, texts), judgement in zip(asked.items(), self.judge.judge(questions), strict=True):
            self.compares = judgement.scores is None
            scores = scores_of(judgement)
            state.scores |= dict(zip(texts, scores, strict=True))
            if judgement.scores is None:
                state.spend(comparisons=len(texts) * (len(texts) - 1) // 2)
            else:
                state.spend(scores=len(texts))
            unscored = sum(not math.isfinite(score) for score in scores)
            state.count({**judgement.problems, **({"unscored": unscored} if unscored else {})})

    # Reading and writing ----------------------------------------------------------------------------------------------

    def _first(self, text: str) -> Answer | str:
        return self.settings.thought.parse(text)

    def _updated(self, text: str) -> Answer | str:
        """The response in an update. A policy that thinks may do so between the tags; the thought is removed."""
        found = self.settings.templates.improved(text)
        if isinstance(found, str):
            return found
        form = self.settings.thought
        if form.response_marker and form.response_marker in found.text:
            return form.parse(found.text)
        if form.thought_marker and form.thought_marker in found.text:
            return NO_MARKER
        return Answer("", found.text)

    def _put(self, asked: dict[_State, Sequence[int]], state: _State, kind: str, question: tuple[str, str]) -> None:
        """Add the question to those that are asked, or record why it cannot be."""
        try:
            ids = self._ids(question)
        except RowProblem as problem:
            state.change(skipped=f"{kind}: {problem.found}")
            return
        if self._has_room(ids):
            asked[state] = ids
        else:
            state.change(skipped=self._no_room(kind, ids))

    def _ids(self, question: tuple[str, str]) -> list[int]:
        """The tokens of a question: two turns of a chat, one where the template takes no system turn, or plain text."""
        system, user = question
        whole = f"{system}\n\n{user}"
        if not getattr(self.tokenizer, "chat_template", None):
            return self.encoder.prompt(f"{whole}\n\n")
        turns: Messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        try:
            return self.encoder.prompt(turns)
        except RowProblem:
            return self.encoder.prompt([{"role": "user", "content": whole}])

    def _truncated(self, text: str) -> str:
        """The text, right-truncated to the tokens that may be quoted."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) <= self.settings.quoted_tokens:
            return text
        return self.tokenizer.decode(ids[: self.settings.quoted_tokens], clean_up_tokenization_spaces=False)

    def _quoted(self, text: str) -> str:
        return self.settings.templates.escaped(self._truncated(text))

    def _has_room(self, ids: Sequence[int]) -> bool:
        return self.engine.context is None or len(ids) < self.engine.context

    def _no_room(self, kind: str, ids: Sequence[int]) -> str:
        return f"{kind}: {len(ids)} tokens leave no room in the model's {self.engine.context} positions"


def scores_of(judgement: Judgement) -> list[float]:
    """A number per response, higher for better, NaN where nothing is known: its score, or its mean win probability."""
    if judgement.scores is not None:
        return [score if math.isfinite(score) else math.nan for score in judgement.scores]
    return [float(score) for score in mean_win_probabilities(judgement)]
