"""What goes wrong in rounds is one line, loses nothing that is finished, and goes on once it is mended."""

import json

import pytest

from prefopt.rounds.store import read_manifest, read_rows
from tests.helpers import CHATML

JUDGES = """
import math
from pathlib import Path

calls = 0


def equal(prompt, response):
    return 1.0


def short(prompt, response):
    return -len(response)


def nan_for_some(prompt, response):
    return math.nan if len(response) % 2 else float(len(response))


def too_few(prompts, responses):
    return [1.0] * (len(responses) - 1)


def dies(prompt, response):
    global calls
    calls += 1
    if calls > 20 and not Path("mended").exists():
        raise OSError("the judge's machine is gone")
    return -len(response)
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder to type commands in, with judges of the user's own."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "own_judges.py").write_text(JUDGES)
    return folder


@pytest.fixture
def run(server, rounds, tmp_path, here):
    def run(**flags):
        return server.train(rounds(tmp_path / "run", **flags), cwd=here)

    return run


def judged_by(name):
    return {"judge__kind": "function", "judge__path": f"own_judges:{name}", "rounds__eval_prompts": 0}


def line_of(ended):
    assert ended.status == 2, (ended.status, ended.err)
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ended.err
    assert "Traceback" not in ended.err
    return errors[0]


def test_more_prompts_than_there_are_is_refused_before_any_model(run):
    line = line_of(run(rounds__prompts=40))
    assert "2 rounds of 40 need 80 prompts, found 36 and 8 held out (rounds.eval_prompts); each" in line


def test_conversations_that_the_judge_has_no_template_for_are_refused_before_any_model(run, place, tmp_path):
    turns = {"prompt": [{"role": "user", "content": "say"}], "chosen": [{"role": "assistant", "content": "it"}]}
    rows = [turns | {"prompt": [{"role": "user", "content": f"say {i}"}]} for i in range(4)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "template").write_text(CHATML)
    data = {"data__train": tmp_path / "chat.jsonl", "data__chat_template": tmp_path / "template"}
    line = line_of(run(**data, judge__kind="reward_model", judge__path=place / "model"))
    assert "judge.path: the prompts are conversations and the tokenizer of" in line


def test_prompt_longer_than_its_room_is_a_bad_row(run, place, tmp_path):
    rows = (place / "pairs.jsonl").read_text()
    (tmp_path / "long.jsonl").write_text(rows + json.dumps({"prompt": "say " * 200}) + "\n")
    flags = {"data__train": tmp_path / "long.jsonl", "rounds__count": 1, "rounds__eval_prompts": 0}
    line = line_of(run(**flags))
    assert "long.jsonl:45: 'prompt': " in line
    assert "tokens, expected at most 56: generate.max_tokens must fit in data.max_length beside it" in line
    ended = run(**flags, data__on_bad_row="skip")
    assert ended.status == 0, ended.err
    assert "dropped: 1 prompt too long" in ended.out


def test_context_longer_than_the_model_has_is_refused(run):
    assert "the model has 512 positions; use --data.max_length 512" in line_of(run(data__max_length=600))


def test_candidates_that_are_all_equal_to_the_judge_leave_no_pairs_and_say_so(run, tmp_path):
    line = line_of(run(**judged_by("equal")))
    assert "round_01: none of 16 prompts gave a pair (" in line
    assert "16 of 16 prompts skipped: all scores equal" in line
    assert len(list((tmp_path / "run/round_01/candidates").iterdir())) == 4


def test_candidates_that_are_the_same_text_are_no_pair(run, tmp_path):
    line = line_of(run(**judged_by("short"), generate__temperature=0))
    assert "none of 16 prompts gave a pair (" in line
    assert "all scores equal" in line


def test_nan_of_a_judge_is_counted_and_never_chosen(run, tmp_path):
    ended = run(**judged_by("nan_for_some"), rounds__count=1)
    assert ended.status == 0, ended.err
    counts = read_manifest(tmp_path / "run/round_01/pairs.json")["counts"]
    table = read_rows(tmp_path / "run/round_01/candidates.jsonl")
    unknown = [row for row in table if row["score"] is None]
    assert counts["judge_problems"]["nan"] + sum(counts["not_judged"].values()) == len(unknown)
    assert counts["judge_problems"]["nan"] > 0
    assert {row["role"] for row in unknown} == {""}
    assert f"judge: {counts['judge_problems']['nan']} nan" in ended.out


def test_judge_of_the_wrong_count_is_refused(run):
    assert "own_judges:too_few gave" in line_of(run(**judged_by("too_few")))


def test_judge_that_dies_in_a_batch_loses_nothing_and_the_run_goes_on(run, here, tmp_path):
    line = line_of(run(**judged_by("dies"), rounds__count=1))
    assert "own_judges:dies raised OSError: the judge's machine is gone" in line
    scores = tmp_path / "run/round_01/scores"
    before = {path.name: path.stat().st_mtime_ns for path in scores.iterdir()}
    assert sorted(before) == ["00000.jsonl"]
    (here / "mended").touch()
    ended = run(**judged_by("dies"), rounds__count=1)
    assert ended.status == 0, ended.err
    assert before["00000.jsonl"] == (scores / "00000.jsonl").stat().st_mtime_ns


def test_server_that_is_not_there_is_named_and_loses_nothing(run, tmp_path):
    flags = {"generate__engine": "openai", "generate__url": "http://127.0.0.1:9/v1", "generate__retries": 0}
    line = line_of(run(**flags, rounds__eval_prompts=0))
    assert "http://127.0.0.1:9/v1" in line
    assert "run the same command again" in line


@pytest.mark.parametrize("cut", ["truncated", "missing"])
def test_damaged_shard_is_made_again_as_it_was(cut, server, rounds, tmp_path):
    argv = rounds(tmp_path / "run", rounds__eval_prompts=0, rounds__count=1)
    fault = {"at": "prefopt.rounds.stages:pair_rows", "count": 1, "do": "SIGKILL"}
    assert server.train(argv, fault).status != 0
    shard = tmp_path / "run/round_01/candidates/00002.jsonl"
    before = shard.read_bytes()
    if cut == "truncated":
        shard.write_bytes(before[: len(before) // 2])
    else:
        shard.unlink()
    ended = server.train(argv)
    assert ended.status == 0, ended.err
    assert "00002.jsonl: " in ended.out
    assert "it is made again" in ended.out
    assert shard.read_bytes() == before


def test_manifest_that_was_edited_is_refused(server, rounds, tmp_path):
    argv = rounds(tmp_path / "run", rounds__eval_prompts=0, rounds__count=1)
    fault = {"at": "prefopt.rounds.stages:pair_rows", "count": 1, "do": "SIGKILL"}
    assert server.train(argv, fault).status != 0
    path = tmp_path / "run/round_01/scores.json"
    path.write_text(path.read_text().replace('"judged": ', '"judged": 1'))
    assert "scores.json: does not match its own hash: it was edited or damaged" in line_of(server.train(argv))
    path.unlink()
    assert server.train(argv).status == 0


def test_folder_of_other_rounds_is_refused(server, rounds, tmp_path):
    argv = rounds(tmp_path / "run", rounds__eval_prompts=0, rounds__count=1)
    assert server.train(argv).status == 0
    other = rounds(tmp_path / "run", rounds__eval_prompts=0, rounds__count=1, generate__n=4)
    assert "holds a run with other settings (generate.n: 3 -> 4)" in line_of(server.train(other))
    again = server.train(argv)
    assert again.status == 0


def test_other_prompts_under_the_same_name_are_refused(server, rounds, place, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text((place / "pairs.jsonl").read_text())
    argv = rounds(tmp_path / "run", data__train=data, rounds__eval_prompts=0, rounds__count=1)
    fault = {"at": "prefopt.rounds.stages:judge_rows", "count": 1, "do": "SIGKILL"}
    assert server.train(argv, fault).status != 0
    data.write_text(data.read_text().replace("say 1", "tell 1"))
    assert "the training data is not what this run began with" in line_of(server.train(argv))


def test_disk_full_in_a_stage_keeps_what_is_finished(server, rounds, tmp_path):
    argv = rounds(tmp_path / "run", rounds__eval_prompts=0, rounds__count=1)
    fault = {"at": "prefopt.rounds.store:write_whole", "count": 2, "do": "ENOSPC"}
    line = line_of(server.train(argv, fault))
    assert "cannot be written: No space left on device; finished shards are not lost" in line
    assert server.train(argv).status == 0


def test_stage_before_its_inputs_is_refused(server, rounds, tmp_path):
    argv = rounds(tmp_path / "run")
    for name, number, line in (
        ("judge", 1, "round 1: its generate stage is not finished"),
        ("train", 1, "round 1: its pairs are not made yet"),
        ("generate", 2, "round 2: round 1 has not trained its policy yet"),
        ("generate", 3, "--round: found 3, but there are 2 (--rounds.count)"),
    ):
        ended = server.train(["--stage", name, "--round", str(number), *argv], command="rounds")
        assert line in line_of(ended)


def test_stage_of_its_own_reads_no_damaged_input(server, rounds, tmp_path):
    argv, folder = rounds(tmp_path / "run", rounds__eval_prompts=0), tmp_path / "run/round_01"

    def stage(name):
        return server.train(["--stage", name, "--round", "1", *argv], command="rounds")

    assert stage("generate").status == 0
    shard = folder / "candidates/00001.jsonl"
    before = shard.read_text()
    for broken in (before[:-20], before.replace('"text": "', '"text": "x')):
        shard.write_text(broken)
        assert "its generate stage is not finished, or its files are not as it left them" in line_of(stage("judge"))
    assert stage("generate").status == 0
    assert shard.read_text() == before
    assert stage("judge").status == stage("pair").status == 0
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(pairs.read_text().splitlines(keepends=True)[:4]))
    assert "its pairs are not made yet, or are not as they were made" in line_of(stage("train"))


def test_edited_answers_of_the_data_are_other_data(server, rounds, place, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text((place / "pairs.jsonl").read_text())
    settings = {"rounds__pairs": "data_sampled", "generate__n": 1, "rounds__count": 1, "rounds__eval_prompts": 0}
    argv = rounds(tmp_path / "run", data__train=data, method="dpo", without=("judge.kind",), **settings)
    fault = {"at": "prefopt.rounds.stages:pair_rows", "count": 1, "do": "SIGKILL"}
    assert server.train(argv, fault).status != 0
    data.write_text(data.read_text().replace(" it is ", " that is "))
    assert "the training data is not what this run began with" in line_of(server.train(argv))


def test_conductor_is_refused_before_it_starts_anything(server, rounds, tmp_path):
    def conducted(**flags):
        return line_of(server.train(rounds(tmp_path / "run", rounds__eval_prompts=0, **flags), command="rounds"))

    assert "rounds.launcher: there is no program 'acelerate' here" in conducted(rounds__launcher="acelerate launch")
    assert 'rounds.launcher: found "a \'b": No closing quotation' in conducted(rounds__launcher="a 'b")
    assert server.train(rounds(tmp_path / "run", rounds__eval_prompts=0, rounds__count=1)).status == 0
    assert "holds a run with other settings (generate.n: 3 -> 4)" in conducted(rounds__count=1, generate__n=4)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--stage", "jude", "--round", "1"], "did you mean 'judge'?"),
        (["--stage", "judge"], "--round: found None, expected the number of a round"),
        (["--stage", "judge", "--round", "1", "--part", "4/4"], "--part: found '4/4', expected I/N, such as 0/4"),
        (
            ["--stage", "train", "--round", "1", "--part", "0/4"],
            "the train stage cannot be shared by separate processes",
        ),
    ],
)
def test_bad_name_of_a_stage_is_one_line(words, line, server, rounds, tmp_path):
    assert line in line_of(server.train([*words, *rounds(tmp_path / "run")], command="rounds"))


def test_judge_that_dies_on_the_second_rank_is_named_on_the_first(server, rounds, here, tmp_path):
    (here / "mended").unlink(missing_ok=True)
    argv = rounds(tmp_path / "run", **judged_by("dies"), rounds__count=1, rounds__shard=2)
    ended = server.train(argv, cwd=here, ranks=2)
    assert "own_judges:dies raised OSError: the judge's machine is gone" in line_of(ended)


def test_prompts_when_several_sources_are_named_then_each_is_asked_once(server, place, rounds, tmp_path):
    lines = (place / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:20]))
    (tmp_path / "b.jsonl").write_text("".join(lines[15:30]))  # 30 prompts in all
    named = {"data__train": "a.jsonl,b.jsonl", "dry_run": "true", "rounds__eval_prompts": 0}
    ended = server.train(rounds(tmp_path / "run", rounds__prompts=15, **named), cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert "a.jsonl: 20 examples, 20 prompts" in ended.out
    assert "b.jsonl: 15 examples, 15 prompts" in ended.out
    ended = server.train(rounds(tmp_path / "run", rounds__prompts=16, **named), cwd=tmp_path)
    assert ended.status == 2
    assert "2 rounds of 16 need 32 prompts, found 30" in ended.err
