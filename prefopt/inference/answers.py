"""One answer to each prompt: sampled again, within a bound, where it holds no response."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.generation.base import Engine, Sampling
from prefopt.inference.test_time_po import seed_of
from prefopt.thoughts import Answer, ThoughtFormat
from prefopt.types import Completion, Prompt


@dataclass(frozen=True)
class Answered:
    """What came of a prompt.

    Args: tries: completions that were drawn. answer: of the last one, None where none held a response; `reason` is then
        why the last one did not. finish_reason: of the last one.
    """

    prompt: Prompt
    tries: int
    answer: Answer | None
    reason: str | None
    finish_reason: str

    def to_dict(self, *, thoughts: bool = False) -> dict[str, Any]:
        """As JSON holds it. Args: thoughts: whether those are shown too."""
        row: dict[str, Any] = {"key": self.prompt.key, "where": self.prompt.where, "prompt": self.prompt.prompt}
        if self.answer is None:
            return row | {"response": None, "reason": self.gave_up, "tries": self.tries}
        row |= {"response": self.answer.response, "tries": self.tries, "finish_reason": self.finish_reason}
        return row | ({"thought": self.answer.thought} if thoughts else {})

    @property
    def gave_up(self) -> str:
        return f"{self.reason} in each of {self.tries} completions" if self.tries > 1 else str(self.reason)


def answer_all(
    prompts: Sequence[Prompt],
    engine: Engine,
    *,
    thought: ThoughtFormat,
    sampling: Sampling,
    retries: int,
    seed: int,
    progress: Callable[[str, int], None] = lambda phase, samples: None,
) -> list[Answered]:
    """One answer to each prompt.

    A completion without a response is sampled again with another seed, up to `retries` times; the seed of a try
    depends on run, prompt and try alone.

    Args: progress: called with a name and the number of prompts that were just answered for good.
    """
    sampling = dataclasses.replace(sampling, n=1, logprobs=False)
    answered: dict[int, Answered] = {}
    room = engine.context or max((len(prompt.ids) for prompt in prompts), default=0) + 1
    for i, prompt in enumerate(prompts):
        if len(prompt.ids) >= room:  # a server may have fewer positions than the model
            why = f"{len(prompt.ids)} tokens leave no room in the model's {room} positions"
            answered[i] = Answered(prompt, 0, None, why, "")
    progress("answers", len(answered))
    waiting = [i for i in range(len(prompts)) if i not in answered]
    for number in range(retries + 1 if waiting else 0):
        last = number == retries

        def done(which: int, completions: list[Completion], last: bool = last) -> None:
            parsed = isinstance(thought.parse(completions[0].text), Answer)
            progress("answers", 1 if parsed or last else 0)

        seeds = [seed_of(seed, prompts[i].key, "answer", number, 1) for i in waiting]
        groups = engine.generate([list(prompts[i].ids) for i in waiting], sampling, seeds, done)
        for i, (completion,) in zip(waiting, groups, strict=True):
            found = thought.parse(completion.text)
            answer, reason = (found, None) if isinstance(found, Answer) else (None, found)
            answered[i] = Answered(prompts[i], number + 1, answer, reason, completion.finish_reason)
        waiting = [i for i in waiting if answered[i].answer is None]
        if not waiting:
            break
    return [answered[i] for i in range(len(prompts))]
