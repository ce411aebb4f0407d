"""Judges by their settings: what is opened, what is refused before anything is loaded; and the shorter one wins."""

import dataclasses

import pytest
import torch

from prefopt import judges, registry
from prefopt.errors import ConfigError
from prefopt.ranking import best_and_worst, order_scores
from prefopt.settings import JudgeConfig
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
    with pytest.raises(ConfigError, match=r"^judge.kind: found .*, expected (one of function, length|another one)"):
        judges.make(JudgeConfig(kind=kind), device=CPU)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "length",
            {"path": "m"},
            r"^judge.path: found 'm', which judge 'length' does not read; it belongs to function, ",
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


CLASSIFIERS, SERVER, POLICY = ("reward_model", "pairwise"), ("server",), ("policy",)
READERS = {
    "batch": (2, CLASSIFIERS),
    "max_length": (99, CLASSIFIERS),
    "trust_remote_code": (True, CLASSIFIERS),
    "mode": ("score", SERVER + POLICY),
    "template": ("question.txt", SERVER + POLICY),
    "temperature": (0.5, SERVER + POLICY),
    "max_tokens": (9, SERVER + POLICY),
    "model": ("m", SERVER),
    "api_key_env": ("KEY", SERVER),
    "concurrency": (2, SERVER),
    "retries": (1, SERVER),
    "timeout": (9.0, (*SERVER, "function")),
}


@pytest.mark.parametrize("name", READERS)
def test_setting_is_taken_by_the_kinds_that_read_it_and_refused_by_all_others(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "question.txt").write_text("{prompt} {response_a} {response_b}")
    value, readers = READERS[name]
    kinds = {
        "length": JudgeConfig(kind="length"),
        "function": JudgeConfig(kind="function", path="tests.judges.rewards:exact"),
        "reward_model": JudgeConfig(kind="reward_model", path="m"),
        "pairwise": JudgeConfig(kind="pairwise", path="m"),
        "server": JudgeConfig(kind="llm", url="http://x/v1"),
        "policy": JudgeConfig(kind="llm", path="policy"),
        "world": JudgeConfig(kind="world"),
        "none": JudgeConfig(kind="none"),
    }
    for kind, settings in kinds.items():
        settings = dataclasses.replace(settings, **{name: value})
        if kind in readers:
            judges.check(settings)
        else:
            with pytest.raises(ConfigError, match=rf"^judge.{name}: found .*, which judge '.*' does not read; it belo"):
                judges.check(settings)


def test_settings_of_a_judge_each_belong_to_someone():
    read = {name for kind in registry.JUDGES.names() for name in judges.kind_of(kind).reads}
    assert {field.name for field in dataclasses.fields(JudgeConfig)} == read | {"kind", "args"}


def test_identity_when_the_judge_is_the_policy_then_a_folder_of_that_name_is_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = JudgeConfig(kind="llm", path="policy")
    before = judges.identity(settings)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text("{}")
    assert judges.identity(settings) == before
    classifier = dataclasses.replace(settings, kind="reward_model")
    before = judges.identity(classifier)
    (tmp_path / "policy" / "config.json").write_text("{ }")
    assert judges.identity(classifier) != before
