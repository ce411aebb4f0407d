"""A user's own judge and inference engine work as docs/adding_a_judge.md says: its code blocks are the files."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from prefopt import generation, judges
from prefopt.errors import ConfigError
from prefopt.generation.base import Sampling
from prefopt.rounds_method import in_rounds
from prefopt.settings import GenerateConfig, ModelConfig, parse
from tests.helpers import byte_bpe_tokenizer
from tests.judges.conftest import question

PAGE = (Path(__file__).resolve().parents[2] / "docs/adding_a_judge.md").read_text()
JUDGE, ENGINE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMAND = re.search(r"```bash\n(.*?)```", PAGE, re.DOTALL)[1].replace("\\\n", " ").strip()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder that the page describes."""
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab/word_limit.py").write_text(JUDGE)
    (tmp_path / "my_lab/echo_engine.py").write_text(ENGINE)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_lab"]:
        del sys.modules[name]


def test_the_judge_of_the_page_is_what_its_command_names_and_scores_by_words(place):
    program, command, *flags = shlex.split(COMMAND)
    assert (program, command) == ("prefopt", "train")
    config = parse(flags)
    judges.check(config.judge)
    judge = judges.make(config.judge, device=torch.device("cpu"))
    (found,) = judge.judge([question("word " * 30, "word " * 15, "word " * 60)])
    assert found.scores == (0.0, -0.5, -1.0)
    assert judge.describe() == {"kind": "word_limit", "words": 30}
    assert in_rounds(config.method).ranks_by == "pairwise_sigmoid"


@pytest.mark.parametrize(
    ("flag", "value", "message"), [("words", "0", "found 0, expected"), ("words", "x", "found 'x'")]
)
def test_the_judge_of_the_page_refuses_a_target_below_one_and_what_is_no_number(place, flag, value, message):
    settings = parse(shlex.split(COMMAND.replace(f"--judge.args.{flag} 30", f"--judge.args.{flag} {value}"))[2:]).judge
    with pytest.raises(ConfigError, match=f"^judge.args.{flag}: {message}"):
        judges.check(settings)


def test_the_inference_engine_of_the_page_answers_with_its_text(place):
    tokenizer = byte_bpe_tokenizer(["yes and no"] * 2)
    settings = GenerateConfig(engine="my_lab.echo_engine", args={"text": "no"})
    generation.check(settings)
    assert not generation.in_ranks(settings)
    engine = generation.make(settings, path="m", load=lambda: None, model=ModelConfig(), tokenizer=tokenizer)
    seen = []
    answers = engine.generate([[1], [2]], Sampling(n=2), [0, 2], lambda place, group: seen.append(place))
    assert [[c.text for c in group] for group in answers] == [["no", "no"], ["no", "no"]]
    assert answers[0][0].token_ids[-1] == tokenizer.eos_token_id
    assert seen == [0, 1]
