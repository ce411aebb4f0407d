"""Answers on disk are those that were given, or are asked for again."""

import errno
import json
import shutil

import pytest

from prefopt.generation.base import Sampling
from prefopt.inference.answer_cache import AnswerCache, CachedEngine
from prefopt.storage import Unreadable
from prefopt.types import Completion


class Counting:
    """Answers with the number of the call."""

    context = None

    def __init__(self):
        self.asked = []

    def generate(self, prompts, sampling, seeds, done):
        for which, prompt in enumerate(prompts):
            self.asked.append(list(prompt))
            done(which, [Completion((1, 2), f"answer to {prompt}", "stop", None)])


@pytest.fixture
def answered(tmp_path):
    """(asks for two prompts, the folder of their answers)."""
    kept = AnswerCache(tmp_path / "answers")

    def ask():
        engine = Counting()
        found = CachedEngine(engine, kept, {"weights": "abc"}).generate(
            [[1, 2], [3, 4]], Sampling(n=1, temperature=1.0, top_p=1.0, top_k=0, max_tokens=8), [5, 6], None
        )
        assert [group[0].text for group in found] == ["answer to [1, 2]", "answer to [3, 4]"]
        return engine.asked

    assert ask() == [[1, 2], [3, 4]]
    assert ask() == []
    return ask, sorted(tmp_path.rglob("*.json"))


def edited(path, other):
    content = json.loads(path.read_text())
    content["completions"][0]["text"] = "what I would rather have read"
    path.write_text(json.dumps(content))


def of_another(path, other):
    shutil.copy(other, path)


def zeroed(path, other):
    path.write_bytes(bytes(path.stat().st_size))


def cut(path, other):
    path.write_bytes(path.read_bytes()[:-3])


def of_an_older_version(path, other):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: content[key] for key in ("seed", "completions")}))


@pytest.mark.parametrize("spoil", [edited, of_another, zeroed, cut, of_an_older_version])
def test_answer_when_it_is_not_the_one_that_was_given_then_it_is_asked_for_again(spoil, answered, capsys):
    ask, (one, other) = answered
    spoil(one, other)
    assert len(ask()) == 1
    assert capsys.readouterr().err == f"warning: {one}: was edited or damaged; it is asked for again\n"
    assert ask() == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_answer_when_it_cannot_be_read_just_now_then_stops_and_asks_nothing(number, answered, unreadable):
    ask, (one, _) = answered
    unreadable(one.name, number)
    with pytest.raises(Unreadable, match=f"{one.name}: cannot be read just now"):
        ask()
