"""The trace of a prompt in test-time preference optimization: steps, samples, scores, critiques, and their cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prefopt.types import Prompt


@dataclass(frozen=True)
class Cost:
    """The cost of a step or a prompt. A prompt that n samples share is counted once.

    Args:
        calls: of the inference engine. samples: their completions; a call for n returns n.
        prompt_tokens, generated_tokens: tokens that the policy processed, and that it sampled.
        scores: responses that a judge scored by itself. comparisons: pairs that a judge compared.
    """

    calls: int = 0
    samples: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    scores: int = 0
    comparisons: int = 0

    def __add__(self, other: Cost) -> Cost:
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Cost(*(a + b for a, b in zip(mine, others, strict=True)))

    def flops(self, parameters: int | None) -> float | None:
        """About 2 FLOP per parameter and token, without the judge's; None where the parameters are not known."""
        return None if parameters is None else 2.0 * parameters * (self.prompt_tokens + self.generated_tokens)


@dataclass(frozen=True)
class Sample:
    """One completion that is meant to be a response.

    Args:
        step, number: the step that sampled it, and its index among the step's n.
        seed: of the sampling.
        text: the response; None where there is none, for the `reason` given.
        thought: the text before it, which no judge sees.
    """

    step: int
    number: int
    seed: int
    text: str | None
    reason: str | None = None
    thought: str = ""


@dataclass(frozen=True)
class Step:
    """The record of one step.

    Args:
        number: 0 for the first samples.
        samples: its samples; none where it was skipped.
        chosen, rejected: best and worst of all scored responses when it began.
        loss, gradient: the policy's critique of them, and its advice, as texts.
        skipped: why it was not done, or only in part.
        problems: of the judge, by name; `unscored` counts responses that have no score.
    """

    number: int
    samples: tuple[Sample, ...] = ()
    chosen: str | None = None
    rejected: str | None = None
    loss: str | None = None
    gradient: str | None = None
    skipped: str | None = None
    problems: Mapping[str, int] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True)
class Trace:
    """All steps of a prompt.

    Args: scores: of each response that has one. Of a judge that compares: its mean win probability over all of them.
    """

    prompt: Prompt
    steps: tuple[Step, ...]
    scores: Mapping[str, float]

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Those of all steps."""
        return tuple(sample for step in self.steps for sample in step.samples)

    @property
    def best(self) -> Sample | None:
        """The response with the highest score, the first of equals; None where nothing has a score."""
        return self._extreme(max)

    @property
    def worst(self) -> Sample | None:
        """That with the lowest, the first of equals."""
        return self._extreme(min)

    @property
    def cost(self) -> Cost:
        return sum((step.cost for step in self.steps), Cost())

    def score(self, sample: Sample) -> float | None:
        return None if sample.text is None else self.scores.get(sample.text)

    def _extreme(self, which: Callable[..., Sample]) -> Sample | None:
        scored = [sample for sample in self.samples if sample.text in self.scores]
        return which(scored, key=lambda sample: self.scores[sample.text]) if scored else None

    def to_dict(self, *, thoughts: bool = False) -> dict[str, Any]:
        """As JSON holds it. Args: thoughts: whether those are shown too."""
        best = self.best

        def shown(sample: Sample) -> dict[str, Any]:
            one: dict[str, Any] = {"number": sample.number, "seed": sample.seed, "text": sample.text}
            one |= {"reason": sample.reason} if sample.text is None else {"score": self.score(sample)}
            return one | ({"thought": sample.thought} if thoughts and sample.thought else {})

        return {
            "key": self.prompt.key,
            "where": self.prompt.where,
            "prompt": self.prompt.prompt,
            "response": None if best is None else best.text,
            "score": None if best is None else self.score(best),
            "steps": [
                {f.name: getattr(step, f.name) for f in dataclasses.fields(step) if f.name not in ("samples", "cost")}
                | {"samples": [shown(sample) for sample in step.samples], "cost": dataclasses.asdict(step.cost)}
                for step in self.steps
            ],
        }
