"""Chooses among the policies of one training: the one whose answers to held-out prompts the judge scores best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from prefopt.evaluate.win_rate import Groups, judge_scores, judged_win_rate
from prefopt.generation.base import Engine, Sampling
from prefopt.judges.base import Judge
from prefopt.rounds_method import RoundsMethod
from prefopt.types import Prompt

CHOSEN_BY = "held_out/score"


@dataclass
class Chooser:
    """An evaluator of a policy in training: how good its answers to held-out prompts are, sampled in this process.

    The seeds are the same each time. A judge that scores gives the mean score, where a completion without a response,
    or one on which the judge failed, counts like the worst answer there is; a judge that only compares gives the win
    rate against the policy that the round began with.

    Args:
        prompts, seeds: one seed per prompt.
        sampling: with n 1.
        method: decides what of a completion a judge may see.
        engine_of: a policy -> the inference engine that has it; it is not closed, since the policy is the trainer's.
        judge_of: the same policy -> the judge.
        start: opens the policy that the round began with.
        generating, judging: the precision of either.
    """

    prompts: Sequence[Prompt]
    seeds: Sequence[int]
    sampling: Sampling
    method: RoundsMethod
    engine_of: Callable[[Any], Engine]
    judge_of: Callable[[Any], Judge]
    start: Callable[[], Any]
    generating: Callable[[], AbstractContextManager[Any]]
    judging: Callable[[], AbstractContextManager[Any]]
    _first: Groups | None = field(default=None, init=False)

    def __call__(self, lm: Any) -> Mapping[str, float]:
        judge = self.judge_of(lm)
        try:
            now = self._answers(lm)
            with self.judging():
                figure = self._score(judge, now)
        finally:
            judge.close()
        texts = self.method.text_figures([completion.text for group in now for completion in group])
        return {CHOSEN_BY: figure, **{f"held_out/{name}": value for name, value in texts.items()}}

    def _answers(self, lm: Any) -> Groups:
        with self.generating():
            return self.engine_of(lm).generate([prompt.ids for prompt in self.prompts], self.sampling, self.seeds)

    def _score(self, judge: Judge, now: Groups) -> float:
        scores = judge_scores(judge, self.prompts, now, self.method)
        if scores is None:
            if self._first is None:
                self._first = self._answers(self.start())
            return judged_win_rate(judge, self.prompts, now, self._first, self.method).rate.mean
        values = [value for group in scores.values for value in group]
        lowest = min((value for value in values if not math.isnan(value)), default=math.nan)
        return sum(lowest if math.isnan(value) else value for value in values) / len(values)
