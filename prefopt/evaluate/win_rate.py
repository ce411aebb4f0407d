"""Win rates and mean win probabilities of one policy over another; ties are one half, what is unknown is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from prefopt.evaluate.intervals import Interval, bootstrap
from prefopt.ranking import win_probabilities
from prefopt.types import Completion, Judgement, Prompt, Question, Response

if TYPE_CHECKING:
    from prefopt.judges.base import Judge
    from prefopt.rounds_method import RoundsMethod

Groups = Sequence[Sequence[Completion]]  # completions of each prompt


@dataclass(frozen=True)
class WinRate:
    """How often policy a is preferred to policy b.

    Args:
        rate: the mean win probability: mean over prompts of P(a beats b), in [0, 1], with its interval over prompts.
        wins, ties, losses: prompts whose mean is above, exactly at, and below one half.
        left_out: prompts without a known comparison.
        unknown: comparisons that are NaN, also of prompts that have others.
        problems: failed judgements, by reason.
        won: the win rate: fraction of prompts won, ties counted a half, with its interval over prompts.
    """

    rate: Interval
    wins: int
    ties: int
    losses: int
    left_out: int = 0
    unknown: int = 0
    problems: Mapping[str, int] = field(default_factory=dict)
    won: Interval | None = None


def win_rate(
    probabilities: Sequence[Sequence[float]], problems: Mapping[str, int] | None = None, *, seed: int = 0
) -> WinRate:
    """The win rate of a over b.

    rate = mean over prompts of (mean over the comparisons of a prompt of P(a beats b))

    The interval is a bootstrap over prompts, and paired: both policies answer the same prompts, and a resample keeps
    or leaves a prompt with all its comparisons.

    Args: probabilities: P(a beats b) of each comparison, one list per prompt; 1/2 is a tie, NaN is unknown.
        problems: of the judge, carried along. seed: of the bootstrap.
    Raises: ValueError for a probability outside [0, 1].
    Reference: times 100 it is what AlpacaEval calls a win rate (Dubois et al., arXiv 2404.04475), by whichever judge.
    """
    means, unknown = [], 0
    for group in probabilities:
        values = np.asarray(group, dtype=np.float64)
        known = values[~np.isnan(values)]
        outside = known[(known < 0) | (known > 1)]
        if outside.size:
            raise ValueError(f"a win probability of {outside[0]}, expected 0 to 1")
        unknown += values.size - known.size
        means.append(known.mean() if known.size else np.nan)
    table = np.array(means, dtype=np.float64)
    known = table[~np.isnan(table)]
    return WinRate(
        rate=bootstrap(known, seed=seed),
        wins=int((known > 0.5).sum()),
        ties=int((known == 0.5).sum()),
        losses=int((known < 0.5).sum()),
        left_out=table.size - known.size,
        unknown=unknown,
        problems=dict(problems or {}),
        won=bootstrap((known > 0.5) + 0.5 * (known == 0.5), seed=seed),
    )


@dataclass(frozen=True)
class Scores:
    """The scores of a policy's completions, from a judge that scores each response by itself.

    Args:
        values: of each completion, one list per prompt; NaN where the judge failed or the method left nothing to judge.
        problems: what went wrong, by name, and why completions held nothing to judge.
        scale: of the judgements, see `Judgement`.
    """

    values: tuple[tuple[float, ...], ...]
    problems: Mapping[str, int]
    scale: float = 1.0

    def of(self, where: Sequence[int]) -> Scores:
        """Those of some prompts."""
        return Scores(tuple(self.values[i] for i in where), self.problems, self.scale)


def judge_scores(judge: Judge, prompts: Sequence[Prompt], groups: Groups, method: RoundsMethod) -> Scores | None:
    """The score of each completion by itself, or None from a judge that only compares.

    Each completion is a question of its own, which costs a judge that only compares nothing.

    Args: groups: completions of each prompt. method: decides what of a completion a judge may see.
    """
    views = [[method.judge_view(completion.text) for completion in group] for group in groups]
    questions = [
        Question(prompt.prompt, (view,), prompt.key, prompt.answer)
        for prompt, group in zip(prompts, views, strict=True)
        for view in group
        if isinstance(view, Response)
    ]
    judgements = judge.judge(questions)
    if any(judgement.scores is None for judgement in judgements):
        return None
    problems = Counter(view for group in views for view in group if isinstance(view, str))
    for judgement in judgements:
        problems.update(judgement.problems)
    scores = iter([judgement.scores[0] for judgement in judgements if judgement.scores is not None])
    values = tuple(tuple(float("nan") if isinstance(view, str) else next(scores) for view in group) for group in views)
    scale = judgements[0].scale if judgements else 1.0
    return Scores(values, {name: count for name, count in problems.items() if count}, scale)


def judged_win_rate(
    judge: Judge,
    prompts: Sequence[Prompt],
    a: Groups,
    b: Groups,
    method: RoundsMethod,
    scores: tuple[Scores, Scores] | None = None,
    other: RoundsMethod | None = None,
) -> WinRate:
    """The win rate of policy a over policy b: the i-th completion of a against the i-th of b, for each prompt.

    scores                 P = sigmoid(score of a's - score of b's)
    logits, probabilities  both orders count alike, see `prefopt.ranking.win_probabilities`

    A completion in which the method finds nothing to judge loses, two of them tie, and so do two that a judge would see
    as the same text: no judge is asked then.

    Args: a, b: as many completions per prompt as the other. method: decides what of a completion a judge may see.
        scores: the results of `judge_scores` for a and b, where they exist, so that nothing is judged twice.
        other: decides it for b's, where those are of another method.
    Raises: ValueError when the numbers of completions differ.
    """
    settled: dict[tuple[int, int], float] = {}
    questions: dict[tuple[int, int], Question] = {}
    for row, (prompt, left, right) in enumerate(zip(prompts, a, b, strict=True)):
        for column, (one, two) in enumerate(zip(left, right, strict=True)):
            seen, against = method.judge_view(one.text), (other or method).judge_view(two.text)
            if isinstance(seen, str) or isinstance(against, str):
                neither = isinstance(seen, str) and isinstance(against, str)
                settled[row, column] = 0.5 if neither else 0.0 if isinstance(seen, str) else 1.0
            elif seen == against:
                settled[row, column] = 0.5
            else:
                questions[row, column] = Question(prompt.prompt, (seen, against), prompt.key, prompt.answer)
    if scores is None:
        judgements = judge.judge(list(questions.values()))
    else:
        judgements = [
            Judgement(scores=(scores[0].values[i][j], scores[1].values[i][j]), scale=scores[0].scale)
            for i, j in questions
        ]
    problems: Counter[str] = Counter()
    for place, judgement in zip(questions, judgements, strict=True):
        settled[place] = float(win_probabilities(judgement)[0, 1])
        problems.update(judgement.problems)
    return win_rate([[settled[row, column] for column in range(len(group))] for row, group in enumerate(a)], problems)
