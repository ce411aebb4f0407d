"""Judges by their settings: what is opened, what is refused before anything is loaded; and the shorter one wins."""

import pytest
import torch

from prefopt import judges
from prefopt.config import JudgeConfig
from prefopt.errors import ConfigError
from prefopt.ranking import best_and_worst, order_scores
from tests.judges.conftest import question

CPU = torch.device("cpu")


def test_length_when_asked_then_the_shorter_response_is_better():
    judge = judges.make(JudgeConfig(kind="length"), device=CPU)
    (found,) = judge.judge([question("four", "a", "three")])
    assert found.scores == (-4.0, -1.0, -5.0)
    assert best_and_worst(order_scores(found)) == (1, 2)
    assert judge.describe() == {"kind": "length", "better": "shorter, in characters"}
    assert judge.judge([]) == []


def test_world_when_the_testbed_has_a_judge_then_it_is_that_one():
    mine = object()
    assert judges.make(JudgeConfig(kind="world"), device=CPU, world=mine) is mine


@pytest.mark.parametrize("kind", [None, "none", "world"])
def test_kind_when_nobody_judges_then_it_is_refused(kind):
    with pytest.raises(ConfigError, match=r"^judge.kind: found .*, which judges nothing here$"):
        judges.make(JudgeConfig(kind=kind), device=CPU)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "length",
            {"path": "m"},
            r"^judge.path: found 'm', which judge 'length' does not read; it belongs to reward_mod",
        ),
        ("function", {"path": "a:b", "max_length": 9}, r"^judge.max_length: found 9, which judge 'function' does not"),
        (
            "pairwise",
            {"path": "m", "mode": "score"},
            r"^judge.mode: found 'score', which judge 'pairwise' does not read",
        ),
    ],
)
def test_settings_when_the_kind_does_not_read_them_then_they_are_refused(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        judges.check(JudgeConfig(kind=kind, **settings))
