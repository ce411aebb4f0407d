"""From a judge's scores to targets: how far they lie apart, and what a scale makes of it."""

import math

import pytest

from prefopt.data.structure import Structure
from prefopt.errors import ConfigError, RoundError
from prefopt.judges import Scaled, check, make
from prefopt.judges.length import LengthJudge
from prefopt.rounds import stages
from prefopt.rounds_method import in_rounds
from prefopt.settings import parse
from prefopt.types import Prompt
from tests.helpers import byte_bpe_tokenizer
from tests.judges.conftest import question

SCORES = [[0.50, 0.51, 0.52], [0.90, 0.93, 0.91]]


@pytest.fixture(scope="module")
def paired():
    tokenizer = byte_bpe_tokenizer(["red green blue"] * 2, vocab_size=280)
    prompts = [Prompt(f"p{i}", (0, 5), f"k{i}", "here:1") for i in range(len(SCORES))]

    def candidates(i):
        return [{"ids": [6 + i, 7 + k, 2], "text": f"{i} {k}", "finish_reason": "stop"} for k in range(3)]

    def paired(*flags, method="sppo", scores=SCORES, probs=None):
        flags = ["--method", method, "--model.path", "m", "--data.train", "x.jsonl", "--rounds.count", "1", *flags]
        config = parse([*flags, "--judge.kind", "length"])
        generated = [{"key": f"k{i}", "seed": 0, "candidates": candidates(i)} for i in range(len(prompts))]
        said = [
            {"judged": [0, 1, 2], "problems": {}, "scores": None if probs else row, "logits": None, "probs": probs}
            for row in scores
        ]
        view = stages.JudgedView(in_rounds(config.method), Structure(tokenizer))
        return stages.pair_rows(config, prompts, generated, said, view=view, tokenizer_hash="t", about={})

    return paired


def test_scores_that_lie_close_together_are_warned_of_and_used_as_they_are(paired):
    found = paired()
    (note,) = found.notes
    assert note.startswith("warning: win probabilities lie close to one half (90% of them from 0.49")
    assert "--judge.reward_scale std" in note
    sides = [1 / (1 + math.exp(0.52 - other)) for other in (0.50, 0.51, 0.52)]
    assert found.pairs[0]["chosen_win_prob"] == pytest.approx(1 - sum(sides) / 3)
    assert "reward_scale" not in found.figures


@pytest.mark.parametrize("scale", ["std", "50"])
def test_a_scale_spreads_the_targets_and_leaves_pairs_and_scores(paired, scale):
    plain, found = paired(), paired("--judge.reward_scale", scale)
    factor = 50 if scale == "50" else found.figures["reward_scale"]
    if scale == "std":
        squares = 2 * 0.01**2 + sum((s - 0.913333333) ** 2 for s in SCORES[1])
        assert factor == pytest.approx(1 / math.sqrt(squares / 4), rel=1e-6)
    assert found.notes == ()
    first = sum(1 / (1 + math.exp(-factor * (0.52 - other))) for other in SCORES[0]) / 3
    assert found.pairs[0]["chosen_win_prob"] == pytest.approx(first)
    assert first > 0.6
    assert [row["chosen"] for row in found.pairs] == [row["chosen"] for row in plain.pairs]
    assert [row["score"] for row in found.table] == [row["score"] for row in plain.table]


def test_a_method_that_reads_no_probability_is_not_warned_of(paired):
    assert paired(method="dpo").notes == ()


def test_std_of_a_judge_that_gives_probabilities_is_refused(paired):
    table = [[0.5, 0.6, 0.7], [0.4, 0.5, 0.6], [0.3, 0.4, 0.5]]
    assert paired(probs=table).pairs
    with pytest.raises(RoundError, match=r"^judge.reward_scale: found 'std', but a judge that returns probabilities"):
        paired("--judge.reward_scale", "std", probs=table)


@pytest.mark.parametrize("value", ["0", "-1", "inf", "nan", "stdd"])
def test_a_scale_that_is_none_is_refused(value):
    flags = ["--method", "sppo", "--model.path", "m", "--data.train", "x.jsonl", "--rounds.count", "1"]
    with pytest.raises(ConfigError, match=r"judge.reward_scale: found"):
        check(parse([*flags, "--judge.kind", "length", "--judge.reward_scale", value]).judge)


def test_a_judge_with_a_scale_says_it_of_each_judgement():
    flags = ["--method", "sppo", "--model.path", "m", "--data.train", "x.jsonl", "--rounds.count", "1"]
    settings = parse([*flags, "--judge.kind", "length", "--judge.reward_scale", "0.5"]).judge
    judge = make(settings, device=None)
    assert isinstance(judge, Scaled)
    (found,), (plain,) = judge.judge([question("a", "bb")]), LengthJudge().judge([question("a", "bb")])
    assert (found.scores, found.scale) == (plain.scores, 0.5)
    assert judge.describe() == LengthJudge().describe()
