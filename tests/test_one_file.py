"""A judge and an inference engine are one file each: a file that is put into its folder is found, made and used."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prefopt import generation, judges, registry
from prefopt.errors import ConfigError
from prefopt.generation.base import EngineKind
from prefopt.judges.base import JudgeKind
from prefopt.settings import GenerateConfig, JudgeConfig

ROOT = Path(__file__).resolve().parent.parent
JUDGE = '''"""The response with fewer exclamation marks is better."""

from dataclasses import dataclass

from prefopt.judges.base import JudgeKind
from prefopt.types import Judgement


@dataclass(frozen=True)
class CalmJudge(JudgeKind):
    mark: str = "!"

    def judge(self, questions):
        return [Judgement(scores=tuple(-float(r.text.count(self.mark)) for r in q.responses)) for q in questions]
'''
ENGINE = '''"""Completions without a model: the same text for every prompt."""

from prefopt.generation.base import EngineKind
from prefopt.types import Completion


class ConstantEngine(EngineKind):
    reads = ("args",)
    context = None

    def __init__(self, text):
        self.text = text

    @classmethod
    def open(cls, settings, policy):
        return cls(settings.args["text"])

    def generate(self, prompts, sampling, seeds, done=None):
        return [[Completion((1,), self.text, "stop", None)] * sampling.n for _ in prompts]

    def describe(self):
        return {"engine": "constant"}

    def close(self):
        pass
'''
USE = """
import torch
from prefopt import generation, judges
from prefopt.generation.base import Sampling
from prefopt.settings import GenerateConfig, JudgeConfig, ModelConfig
from prefopt.types import Question, Response

judge = judges.make(JudgeConfig(kind="calm", args={"mark": "?"}), device=torch.device("cpu"))
print(judge.judge([Question("p", (Response("a?"), Response("b!!")), "k", None)])[0].scores, judge.describe())
settings = GenerateConfig(engine="constant", args={"text": "yes"})
generation.check(settings)
engine = generation.make(settings, path="m", load=None, model=ModelConfig(), tokenizer=None)
print(engine.generate([[1]], Sampling(n=2), [0])[0][1].text)
"""


def test_a_file_in_either_folder_is_listed_in_help_found_made_and_used(tmp_path):
    shutil.copytree(ROOT / "prefopt", tmp_path / "prefopt", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "prefopt/judges/calm.py").write_text(JUDGE)
    (tmp_path / "prefopt/generation/constant_engine.py").write_text(ENGINE)

    def python(*argv):
        env = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *argv], cwd=tmp_path, env=env, capture_output=True, text=True)
        return done.stdout + done.stderr

    text = " ".join(python("-m", "prefopt", "train", "--method", "sppo", "--rounds.count", "1", "--help").split())
    assert "|calm|" in text.replace("--judge.kind ", "|")
    assert "calm: The response with fewer exclamation marks is better." in text
    assert "constant: Completions without a model: the same text for every prompt." in text
    found = python("-c", USE).splitlines()
    assert found == ["(-1.0, -0.0) {'kind': 'calm', 'mark': '?'}", "yes"]
    refused = python("-m", "prefopt", "train", "--method", "sppo", "--rounds.count", "1", "--judge.kind", "clam")
    assert "did you mean 'calm'?" in refused


def test_every_kind_is_one_class_with_a_first_sentence_and_reads_settings_that_exist():
    for kinds, kind_of, base, settings in (
        (registry.JUDGES, judges.kind_of, JudgeKind, JudgeConfig()),
        (registry.ENGINES, generation.kind_of, EngineKind, GenerateConfig()),
    ):
        assert kinds.names()
        for name in kinds.names():
            assert kinds.about(name), name
            kind = kind_of(name)
            assert issubclass(kind, base)
            assert all(hasattr(settings, setting) for setting in kind.reads), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            lambda: JudgeConfig(kind="lenght"),
            r"judge.kind: found 'lenght', expected one of .* module path; did you mean 'length'\?",
        ),
        (lambda: JudgeConfig(kind="classifier"), r"classifier.py has no class that inherits from JudgeKind"),
        (lambda: GenerateConfig(engine="vlm"), r"generate.engine: found 'vlm', .*; did you mean 'vllm'\?"),
    ],
)
def test_a_name_that_is_no_file_is_refused_with_the_nearest_one(settings, message):
    with pytest.raises(ConfigError, match=message):
        settings()


def test_the_source_of_a_users_own_judge_is_part_of_its_identity(tmp_path, monkeypatch):
    (tmp_path / "loud_lab.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    settings = JudgeConfig(kind="loud_lab.CalmJudge")
    before = judges.identity(settings)
    assert judges.identity(settings) == before
    (tmp_path / "loud_lab.py").write_text(JUDGE.replace("-float", "float"))
    assert judges.identity(settings) != before


def test_a_judge_of_another_folder_is_named_by_a_dotted_path_and_takes_its_own_settings_alone(tmp_path, monkeypatch):
    (tmp_path / "quiet_lab.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    judges.check(JudgeConfig(kind="quiet_lab.CalmJudge", args={"mark": "."}))
    with pytest.raises(ConfigError, match=r"judge.args.mrk: .* has no such setting; did you mean 'mark'\?"):
        judges.check(JudgeConfig(kind="quiet_lab.CalmJudge", args={"mrk": "."}))
    with pytest.raises(ConfigError, match=r"judge.args.mark: judge 'length' has no such setting; it has none"):
        judges.check(JudgeConfig(kind="length", args={"mark": "."}))
