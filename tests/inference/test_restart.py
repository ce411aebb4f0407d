"""A run that is killed, or whose server goes away, continues; what was answered is not asked again."""

import json
import random
import signal
from pathlib import Path

import pytest

from tests.inference.server import ScriptedServer
from tests.inference.test_test_time_po import rising

N, DEPTH, PROMPTS = 2, 2, 6


JUDGE = "def worth(prompt, response):\n    return float(response.split()[-1])\n"


@pytest.fixture(scope="module")
def flags(place):
    """The flags of a run of all prompts against a server, judged by a function that lies where the command is typed."""

    def flags(server, output=Path("run"), **other):
        named = {"model": place / "model", "prompts": place / "prompts.jsonl", "output": output}
        named |= {"strategy": "test_time_po", "n": N, "depth": DEPTH, "judge.kind": "function"}
        named |= {"judge.path": "my_judge:worth", "generate.engine": "openai", "generate.url": server.url}
        named |= {"generate.retries": 0, "generate.concurrency": 2, "generate.max_tokens": 300}
        named |= {name.replace("__", "."): value for name, value in other.items()}
        return [word for name, value in named.items() for word in (f"--{name}", str(value))]

    return flags


@pytest.fixture(scope="module")
def scripted(place, tokenizer):
    """Opens servers with the policy's name."""

    def scripted(**more):
        return ScriptedServer(tokenizer, rising, name=str(place / "model"), **more)

    return scripted


def kept_seeds(output):
    """Of the answers that are on disk and whole."""
    return {json.loads(path.read_text())["seed"] for path in (output / "answers").glob("*/*.json")}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def judge(tmp_path):
    (tmp_path / "my_judge.py").write_text(JUDGE)


@pytest.fixture(scope="module")
def straight(server, flags, scripted, tmp_path_factory):
    """What comes of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "my_judge.py").write_text(JUDGE)
    with scripted() as here:
        ended = server.train(flags(here), command="infer", cwd=folder)
    assert ended.status == 0, ended.err
    assert len(here.seeds) == len(set(here.seeds)) == PROMPTS * (1 + 3 * DEPTH)
    return read(folder / "run" / "traces.jsonl")


def test_over_http_there_are_exactly_as_many_samples_and_scores_as_there_should_be(straight):
    assert len(straight) == PROMPTS
    for trace in straight:
        costs = [step["cost"] for step in trace["steps"]]
        assert sum(cost["samples"] for cost in costs) == N + DEPTH * (2 + N)
        assert sum(cost["calls"] for cost in costs) == 1 + 3 * DEPTH
        assert sum(cost["scores"] for cost in costs) == N * (1 + DEPTH)
        assert all(sample["score"] is not None for step in trace["steps"] for sample in step["samples"])
        assert trace["score"] == 23


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on_and_asks_nothing_again_that_was_answered(
    server, flags, scripted, straight, tmp_path
):
    chance, output, grew = random.Random(0), tmp_path / "run", 0
    with scripted(delay=0.06) as here:
        (tmp_path / "whole").mkdir()
        (tmp_path / "whole/my_judge.py").write_text(JUDGE)
        whole = server.train(flags(here), command="infer", cwd=tmp_path / "whole")  # as slow as this machine is now
        assert whole.status == 0, whole.err
        for kills in range(30):  # on a machine that is busy with other work many come before the first answer
            if kills >= 10 and grew >= 3:
                break
            before = kept_seeds(output)
            here.requests.clear()
            moment = chance.uniform(0.25, 0.6 if kills < 10 else 0.9) * whole.seconds
            ended = server.train(flags(here), kill_after=moment, command="infer", cwd=tmp_path)
            assert ended.status in (-signal.SIGKILL, 0), ended.err
            assert not before & {*here.seeds}, "what was answered has been asked again"
            grew += kept_seeds(output) > before
        before = kept_seeds(output)
        here.requests.clear()
        ended = server.train(flags(here), command="infer", cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert not before & {*here.seeds}
    assert grew >= 3, "the kills must come while answers do for this to say anything"
    assert read(output / "traces.jsonl") == straight
    assert not [*output.rglob(".*.tmp")]


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_where_it_writes_an_answer_it_goes_on(server, flags, scripted, straight, tmp_path, when):
    output = tmp_path / "run"
    with scripted() as here:
        for count in (2, 9, 30):
            before = kept_seeds(output)
            here.requests.clear()
            fault = {"at": "pathlib:Path.replace", "when": when, "count": count, "do": "SIGKILL"}
            ended = server.train(flags(here), fault, command="infer", cwd=tmp_path)
            assert ended.status == -signal.SIGKILL
            assert not before & {*here.seeds}
        ended = server.train(flags(here), command="infer", cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert read(output / "traces.jsonl") == straight
    assert not [*output.rglob(".*.tmp")]


def test_a_finished_run_asks_nobody_and_shows_its_table_again(server, flags, scripted, tmp_path):
    with scripted() as here:
        first = server.train(flags(here), command="infer", cwd=tmp_path)
        here.requests.clear()
        again = server.train(flags(here), command="infer", cwd=tmp_path)
        assert (first.status, again.status, here.requests) == (0, 0, [])
        assert again.out == first.out


def test_a_server_that_goes_away_is_one_line_and_another_one_goes_on_where_it_was(
    server, flags, scripted, straight, tmp_path
):
    output = tmp_path / "run"
    with scripted() as here:
        here.fail(*[""] * 16, *["503"] * 100)
        ended = server.train(flags(here), command="infer", cwd=tmp_path)
    assert ended.status == 2
    assert "Traceback" not in ended.err
    line = ended.err.replace("\r", "\n").splitlines()[-1]
    assert line.startswith("error: generate.url: http://127.0.0.1:")
    assert line.endswith("finished work is not lost: start it and run the same command again")
    before = kept_seeds(output)
    assert len(before) >= 14
    gone = server.train(flags(here), command="infer", cwd=tmp_path)
    assert gone.status == 2
    assert "does not answer after 1 attempts" in gone.err
    with scripted() as other:
        ended = server.train(flags(other), command="infer", cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert not before & {*other.seeds}
    assert len(other.seeds) == PROMPTS * (1 + 3 * DEPTH) - len(before)
    assert read(output / "traces.jsonl") == straight


def test_an_answer_on_disk_that_is_damaged_is_asked_for_again(server, flags, scripted, straight, tmp_path):
    output = tmp_path / "run"
    with scripted() as here:
        assert server.train(flags(here), command="infer", cwd=tmp_path).status == 0
        (output / "summary.json").unlink()
        files = sorted((output / "answers").glob("*/*.json"))
        for number, text in enumerate(["", "{", '{"completions": []}', "null", '{"completions": [{"text": 1}]}']):
            files[number].write_text(text)
        sorted((output / "scores").glob("*/*.json"))[0].write_text('{"scores": "x"}')
        here.requests.clear()
        ended = server.train(flags(here), command="infer", cwd=tmp_path)
        assert ended.status == 0, ended.err
        assert len(here.seeds) == 5
    assert read(output / "traces.jsonl") == straight


def test_stopped_by_a_signal_it_says_so_and_leaves_with_75(server, flags, scripted, tmp_path):
    with scripted() as here:
        fault = {"at": "prefopt.inference.answer_cache:AnswerCache.write", "count": 5, "do": "SIGTERM"}
        ended = server.train(flags(here, generate__concurrency=1), fault, command="infer", cwd=tmp_path)
    assert ended.status == 75, ended.err
    assert "SIGTERM: all that is finished is saved, leaving with exit status 75" in ended.out
