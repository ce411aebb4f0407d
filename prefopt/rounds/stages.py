"""What each stage of a round makes from the files of the one before.

A row of `generate` is a prompt with its candidates, a row of `judge` their judgement; `pair` reads both.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefopt.data.structure import Structure
from prefopt.errors import RoundError
from prefopt.generation.base import Engine, Sampling
from prefopt.judges.base import Judge
from prefopt.rounds.store import Row
from prefopt.rounds_method import RoundsMethod, in_rounds
from prefopt.settings import RunConfig
from prefopt.types import ChosenPair, Completion, Judgement, Prompt, Question, Response, ScoredGroup


def shards_of(prompts: Sequence[Prompt], size: int) -> list[list[Prompt]]:
    """The prompts in fixed portions."""
    return [list(prompts[begin : begin + size]) for begin in range(0, len(prompts), size)]


# generate -------------------------------------------------------------------------------------------------------------


def generate_rows(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Row]:
    """A row per prompt: its candidates with text, tokens, why they ended, and log-probabilities where asked for."""
    answers = engine.generate([prompt.ids for prompt in prompts], sampling, seeds)
    rows = []
    for prompt, seed, completions in zip(prompts, seeds, answers, strict=True):
        if len(completions) != sampling.n:
            raise RoundError(
                f"{prompt.where}: the engine gave {len(completions)} completions, expected {sampling.n} (generate.n)"
            )
        candidates = [
            {"text": c.text, "ids": list(c.token_ids), "finish_reason": c.finish_reason}
            | ({"logps": list(c.logps)} if c.logps is not None else {})
            for c in completions
        ]
        rows.append({"key": prompt.key, "where": prompt.where, "seed": seed, "candidates": candidates})
    return rows


def completions_of(row: Row) -> tuple[Completion, ...]:
    return tuple(
        Completion(tuple(c["ids"]), c["text"], c["finish_reason"], tuple(c["logps"]) if "logps" in c else None)
        for c in row["candidates"]
    )


# judge ----------------------------------------------------------------------------------------------------------------


MISPLACED = "BOS, EOS, padding or an end-of-turn token inside"


@dataclass(frozen=True)
class Seen:
    """What of a prompt's completions a judge sees.

    Args: judged: indices of those it sees. responses: what it sees of them. unparsed: indices of those that hold no
        response, and can still be trained on. why: it does not see the others: how often.
    """

    judged: tuple[int, ...]
    responses: tuple[Response, ...]
    unparsed: tuple[int, ...]
    why: Counter[str]


@dataclass(frozen=True)
class JudgedView:
    """What of completions can be judged, and trained on.

    Args: method: decides what a judge may see. structure: what every sequence of tokens must be; a candidate that is
        not cannot be trained on, and is neither judged nor paired.
    """

    method: RoundsMethod
    structure: Structure

    def of(self, completions: Sequence[Completion]) -> Seen:
        seen: list[tuple[int, Response]] = []
        unparsed: list[int] = []
        why: Counter[str] = Counter()
        for index, completion in enumerate(completions):
            response = self.method.judge_view(completion.text)
            if not completion.token_ids:
                why["no token"] += 1
            elif self.structure.problem((), completion.token_ids):
                why[MISPLACED] += 1
            elif isinstance(response, str):
                why[response] += 1
                unparsed.append(index)
            else:
                seen.append((index, response))
        return Seen(tuple(i for i, _ in seen), tuple(r for _, r in seen), tuple(unparsed), why)


def judge_rows(judge: Judge, view: JudgedView, prompts: Sequence[Prompt], rows: Sequence[Row]) -> list[Row]:
    """A row per prompt: which candidates were judged, and their judgement."""
    judged, questions = [], []
    for prompt, row in zip(prompts, rows, strict=True):
        seen = view.of(completions_of(row))
        judged.append((prompt, seen))
        questions.append(Question(prompt.prompt, seen.responses, prompt.key, prompt.answer))
    asked = [question for question in questions if question.responses]
    judgements = iter(judgements_of(judge, asked))
    out = []
    for (prompt, seen), question in zip(judged, questions, strict=True):
        judgement = next(judgements) if question.responses else Judgement(scores=())
        row = {"key": prompt.key, "judged": list(seen.judged), "unseen": dict(seen.why)}
        row |= {"problems": dict(judgement.problems)}
        out.append(row | {name: getattr(judgement, name) for name in ("scores", "logits", "probs")})
    return out


def judgements_of(judge: Judge, questions: Sequence[Question]) -> list[Judgement]:
    """The judge's judgements. Raises: RoundError when there are too few or too many of them."""
    answers = judge.judge(questions) if questions else []
    kind = type(judge).__name__
    if len(answers) != len(questions):
        raise RoundError(f"judge {kind}: {len(answers)} judgements of {len(questions)} prompts")
    for question, answer in zip(questions, answers, strict=True):
        k = len(question.responses)
        tables = (answer.logits, answer.probs)
        wrong = [len(answer.scores)] if answer.scores is not None and len(answer.scores) != k else []
        wrong += [len(t) for t in tables if t is not None and (len(t) != k or any(len(row) != k for row in t))]
        if wrong or all(part is None for part in (answer.scores, *tables)):
            raise RoundError(f"judge {kind}: {wrong[0] if wrong else 'no'} scores for {k} responses of one prompt")
    return answers


def judgement_of(row: Row) -> Judgement:
    """The judgement that a row holds; null is what the judge could not answer."""

    def known(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(known(item) for item in value)
        return math.nan if value is None else float(value)

    parts = {name: known(row[name]) for name in ("scores", "logits", "probs") if row[name] is not None}
    return Judgement(**parts, problems=row["problems"])


def row_scores(row: Row) -> Sequence[float]:
    """The scores of a judge's row, for a progress bar; nothing where it compares."""
    return [score for score in row.get("scores") or () if score is not None]


# pair -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paired:
    """What a round's candidates have become.

    Args: pairs: rows to train on. table: a row per candidate. counts: written and dropped, by reason. figures: the
        method's own numbers of them. notes: further lines to print.
    """

    pairs: list[Row]
    table: list[Row]
    counts: dict[str, Any]
    figures: dict[str, float]
    notes: tuple[str, ...] = ()


def pair_rows(
    config: RunConfig,
    prompts: Sequence[Prompt],
    generated: Sequence[Row],
    judged: Sequence[Row] | None,
    *,
    view: JudgedView,
    tokenizer_hash: str,
    about: Mapping[str, Any],
) -> Paired:
    """Pairs from candidates and judgements.

    Args: judged: None where no judge was asked. about: columns that are the same for every candidate of the table.
    """
    from prefopt.ranking import reward_scale

    pairs: list[Row] = []
    table: list[Row] = []
    dropped: Counter[str] = Counter()
    unseen: Counter[str] = Counter()
    problems: Counter[str] = Counter()
    groups: list[ScoredGroup] = []
    answers: Sequence[Row | None] = [None] * len(generated) if judged is None else judged
    for prompt, row, answer in zip(prompts, generated, answers, strict=True):
        completions = completions_of(row)
        seen = view.of(completions)
        judgement = Judgement(scores=(math.nan,) * len(seen.judged)) if answer is None else judgement_of(answer)
        indices = seen.judged if answer is None else tuple(answer["judged"])
        unseen.update(seen.why)
        problems.update(judgement.problems)
        groups.append(ScoredGroup(prompt, completions, judgement, indices, seen.unparsed))
    try:
        scale = reward_scale(config.judge.reward_scale, [group.judgement for group in groups])
    except ValueError as error:
        raise RoundError(
            f"judge.reward_scale: found {config.judge.reward_scale!r}, but {error}; leave it out"
        ) from None
    groups = [replace(group, judgement=replace(group.judgement, scale=scale)) for group in groups]
    method = in_rounds(config.method).tuned(groups)
    trained: list[list[ChosenPair]] = []
    for group, row in zip(groups, generated, strict=True):
        found = _pairs_of(config.rounds.pairs, method, group)
        sides = [] if isinstance(found, str) else [(pair, _side_by_side(config, group, pair)) for pair in found]
        dropped.update([found] if isinstance(found, str) else [side for _, side in sides if isinstance(side, str)])
        usable = [(pair, side) for pair, side in sides if not isinstance(side, str)]
        pairs += [{"key": group.prompt.key, "tokenizer": tokenizer_hash} | side for _, side in usable]
        trained.append([pair for pair, _ in usable])
        table += _table_rows(method, group, row["seed"], _roles(trained[-1]), about)
    counts = {
        "prompts": len(generated),
        "candidates": len(table),
        "pairs": len(pairs),
        "dropped": dict(dropped.most_common()),
        "not_judged": dict(unseen.most_common()),
        "judge_problems": dict(problems.most_common()),
    }
    figures = dict(method.round_figures(groups, trained))
    figures |= {} if config.judge.reward_scale == 1 else {"reward_scale": scale}
    note = _low_spread(groups, method) if config.method.needs.columns else None
    return Paired(pairs, table, counts, figures, () if note is None else (note,))


_LOW_SPREAD = 0.02  # standard deviation of win probabilities below which targets made of them are noise


def _low_spread(groups: Sequence[ScoredGroup], method: RoundsMethod) -> str | None:
    """A warning where a judge's scores lie so close together that all its win probabilities are about one half."""
    import numpy as np

    from prefopt.ranking import win_probabilities

    found = [np.array([])]
    for group in groups:
        if len(group.judged) > 1 and group.judgement.probs is None:
            table = win_probabilities(group.judgement, method.ranks_by)
            found.append(table[~np.eye(len(table), dtype=bool)])
    probs = np.concatenate(found)
    probs = probs[np.isfinite(probs)]
    spread = float(probs.std()) if probs.size else 0.0
    if not 0 < spread < _LOW_SPREAD:
        return None
    low, high = np.percentile(probs, [5, 95])
    return (
        f"warning: win probabilities lie close to one half (90% of them from {low:.3f} to {high:.3f}, standard "
        f"deviation {spread:.3f}), so there is little to learn from; --judge.reward_scale std (or a number) spreads "
        "the judge's scores"
    )


DATA = -1  # the index of the data's own completion, which is no candidate


def _pairs_of(how: str, method: RoundsMethod, group: ScoredGroup) -> Sequence[ChosenPair] | str:
    if how == "best_worst":
        try:
            return method.make_pairs(group)
        except ValueError as error:
            raise RoundError(f"method {type(method).__name__}: {error}") from error
    if how == "data_sampled":
        return [ChosenPair(DATA, group.judged[0])] if group.judged else "no candidate can be used"
    order = method.order(group)
    known = [i for i in range(len(order)) if order[i] == order[i]]
    return [ChosenPair(DATA, group.judged[min(known, key=lambda i: order[i])])] if known else "none judged"


def _side_by_side(config: RunConfig, group: ScoredGroup, pair: ChosenPair) -> Row | str:
    """The row to train on, or why there is none."""
    chosen_ids, chosen = _completion(group, pair.chosen)
    rejected_ids, rejected = _completion(group, pair.rejected)
    if chosen_ids == rejected_ids or chosen == rejected:
        return "chosen equals rejected"
    if not chosen.strip():
        return "chosen is empty"
    most = config.rounds.max_similarity
    if most is not None and similarity(chosen_ids, rejected_ids) > most:
        return "near-duplicates"
    return {
        "prompt": in_rounds(config.method).render_prompt(group.prompt.prompt),
        "chosen": chosen,
        "rejected": rejected,
        "prompt_ids": list(group.prompt.ids),
        "chosen_ids": list(chosen_ids),
        "rejected_ids": list(rejected_ids),
        **pair.columns,
    }


def _completion(group: ScoredGroup, index: int) -> tuple[tuple[int, ...], str]:
    if index == DATA:
        assert group.prompt.answer_ids is not None
        assert group.prompt.answer is not None
        return group.prompt.answer_ids, group.prompt.answer
    return group.completions[index].token_ids, group.completions[index].text


def similarity(a: Sequence[int], b: Sequence[int]) -> float:
    """Share of tokens that two completions have in common in the same order: 1 for equal ones, 0 for none.

    Twice the matching tokens over all tokens of both (Ratcliff and Obershelp, as in Python's difflib).
    """
    return difflib.SequenceMatcher(None, list(a), list(b), autojunk=False).ratio()


def _roles(pairs: Sequence[ChosenPair]) -> dict[int, str]:
    return {pair.chosen: "chosen" for pair in pairs} | {pair.rejected: "rejected" for pair in pairs}


def _table_rows(
    method: RoundsMethod, group: ScoredGroup, seed: int, roles: Mapping[int, str], about: Mapping[str, Any]
) -> list[Row]:
    """All candidates of a prompt, one row each, with everything that is known of them."""
    import numpy as np

    from prefopt.ranking import order_scores, win_probabilities

    judgement, place = group.judgement, {index: i for i, index in enumerate(group.judged)}
    unknown = np.full(len(group.judged), np.nan)
    if group.judged:
        scores, probs = order_scores(judgement, method.ranks_by), win_probabilities(judgement, method.ranks_by)
        wins = np.array([np.nanmean(row) if np.isfinite(row).any() else np.nan for row in probs])
        order = method.order(group)
    else:
        scores = wins = order = unknown
    rows = []
    for index, completion in enumerate(group.completions):
        at = place.get(index)
        rows.append(
            {
                "key": group.prompt.key,
                "prompt": group.prompt.prompt,
                "candidate": index,
                "text": completion.text,
                "tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
                "logp": None if completion.logps is None else math.fsum(completion.logps),
                "score": None if at is None else float(scores[at]),
                "win_prob": None if at is None else float(wins[at]),
                "ranked_by": None if at is None else float(order[at]),
                "role": roles.get(index, ""),
                "seed": seed + index,
                **about,
            }
        )
    return rows
