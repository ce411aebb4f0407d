"""Rounds of a policy that thinks: what a judge is shown, what is trained on, what an exported model says of itself."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from prefopt.rounds.store import read_manifest, read_rows
from tests.helpers import byte_bpe_tokenizer, tiny_llama

MARKER = "@"  # the tiny model is made to write it often enough, and now and then twice
JUDGES = '''
def spy(prompt, response):
    """Writes down all that it is given."""
    with open("seen.txt", "a") as file:
        file.write(repr((prompt, response)) + "\\n")
    return -len(response)
'''
LEAK = '''
from dataclasses import dataclass
from prefopt.methods.thought_po import ThoughtPO
from prefopt.types import Response


@dataclass(frozen=True)
class Leak(ThoughtPO):
    """Hands the judge all that was written."""

    def judge_view(self, text):
        seen = super().judge_view(text)
        return seen if isinstance(seen, str) else Response(text)
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model that has seen the marker, and prompts."""
    place = tmp_path_factory.mktemp("thoughts")
    rows = [{"prompt": f"say {i}", "chosen": f" it is {i}", "rejected": f" no {i * 7 % 11}"} for i in range(100)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "think.txt").write_text("response_marker: @\n---\nThink first: {prompt}\n")
    (place / "own.py").write_text(JUDGES)
    (place / "leak.py").write_text(LEAK)
    tokenizer = byte_bpe_tokenizer([row["prompt"] + row["chosen"] for row in rows], vocab_size=280)
    lm = tiny_llama(len(tokenizer), hidden=16, layers=1)
    ids = torch.tensor([tokenizer(f"Think first: say {i % 10} it is {i % 7}")["input_ids"] for i in range(20)])
    with torch.no_grad():  # its marker comes up in about one token of ten
        hidden = lm.model(input_ids=ids).last_hidden_state.mean((0, 1))
        token = tokenizer(MARKER, add_special_tokens=False)["input_ids"][0]
        lm.lm_head.weight[token] = hidden / hidden.norm() ** 2 * math.log(0.1 * len(tokenizer))
    lm.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    return place


@pytest.fixture(scope="module")
def thinking(place):
    """The flags of one short round."""
    usual = {"method": "thought_po", "method.thought_prompt": place / "think.txt", "rounds.compare": None}
    usual |= {"model.path": place / "model", "data.train": place / "pairs.jsonl", "rounds.count": 1}
    usual |= {"rounds.prompts": 40, "rounds.shard": 8, "rounds.eval_prompts": 8, "rounds.select_prompts": 6}
    usual |= {"judge.kind": "function", "judge.path": "own:spy", "generate.n": 6, "generate.max_tokens": 12}
    usual |= {"data.max_length": 96, "train.global_batch": 4, "train.save_every": 2, "eval.every": 1}
    usual |= {"optim.lr": 1e-2}

    def thinking(output, **other):
        """`train__max_steps=1` is `--train.max_steps 1`; None leaves a flag out."""
        flags = usual | {"output": output} | {name.replace("__", "."): value for name, value in other.items()}
        return [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]

    return thinking


@pytest.fixture(scope="module")
def run(server, place, thinking):
    """Runs in a folder of its own, which holds the judge's notes."""

    def run(folder, **flags):
        folder.mkdir(exist_ok=True)
        for name in ("own.py", "leak.py"):
            (folder / name).write_text((place / name).read_text())
        ended = server.train(thinking(folder / "run", **flags), cwd=folder)
        assert ended.status == 0, ended.err
        return folder / "run"

    return run


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("straight"))


def thoughts_seen(run):
    """What the judge was shown, and whatever of it is no response of any completion of the run."""
    seen = [eval(line) for line in (run.parent / "seen.txt").read_text().splitlines()]
    completions = [
        candidate["text"]
        for path in [*run.glob("round_*/candidates/*.jsonl"), *run.glob("round_*/held_out/*.jsonl")]
        for row in read_rows(path)
        for candidate in row["candidates"]
        if not {0, 2} & {*candidate["ids"]}  # BOS or padding, which nothing that is trained on may hold
    ]
    responses = {text.partition(MARKER)[2].strip() for text in completions if text.count(MARKER) == 1}
    prompts = {json.loads(line)["prompt"] for line in Path(run / "../pairs.jsonl").read_text().splitlines()}
    return seen, [(p, r) for p, r in seen if MARKER in r or p not in prompts], responses


def test_judge_is_shown_responses_and_prompts_alone(straight, place):
    (straight.parent / "pairs.jsonl").write_text((place / "pairs.jsonl").read_text())
    seen, leaked, responses = thoughts_seen(straight)
    assert len(seen) > 20
    assert not leaked, "a judge has seen a marker, and so a thought, or the thought prompt"
    shown = {response for _, response in seen}
    assert responses - {""} <= shown, "each response that is one was judged"


def test_leak_is_seen_by_the_test_above(run, place, tmp_path):
    output = run(tmp_path, method="leak.Leak", rounds__select_prompts=0, rounds__eval_prompts=0)
    (tmp_path / "pairs.jsonl").write_text((place / "pairs.jsonl").read_text())
    _, leaked, _ = thoughts_seen(output)
    assert leaked


def test_pairs_hold_thought_response_and_thought_prompt(straight):
    pairs = read_rows(straight / "round_01/pairs.jsonl")
    assert pairs
    for pair in pairs:
        assert pair["prompt"].startswith("Think first: say ")
        assert pair["chosen"].count(MARKER) == 1
    unread = [
        pair["rejected"].count(MARKER) != 1 or not pair["rejected"].partition(MARKER)[2].strip() for pair in pairs
    ]
    assert any(unread), "a completion that cannot be read is a rejected one"
    made = read_manifest(straight / "round_01/pairs.json")
    assert made["figures"]["rejected_unparsed"] == pytest.approx(sum(unread) / len(unread))
    assert made["counts"]["not_judged"].keys() >= {"no response marker"}
    assert made["figures"]["parsed"] < 1


def test_figures_of_a_round_tell_thoughts_from_responses(straight):
    lines = [json.loads(line) for line in (straight / "rounds.jsonl").read_text().splitlines()]
    rows = [row for path in sorted((straight / "round_01/held_out").glob("*.jsonl")) for row in read_rows(path)]
    texts = [row["candidates"][0]["text"] for row in rows]
    parsed = [text.partition(MARKER) for text in texts if text.count(MARKER) == 1 and text.partition(MARKER)[2].strip()]
    assert lines[1]["response_characters"] == pytest.approx(sum(len(p[2].strip()) for p in parsed) / len(parsed))
    assert lines[1]["thought_characters"] == pytest.approx(sum(len(p[0].strip()) for p in parsed) / len(parsed))
    again = sum("again" in row for row in rows)
    assert lines[1]["parsed"] == pytest.approx(1 - again / len(rows))
    assert {"pairs/rho", "pairs/parsed", "pairs/rejected_unparsed"} <= lines[1].keys()


def test_held_out_prompts_are_asked_again_where_an_answer_holds_no_response(straight, run, tmp_path):
    rows = [row for path in sorted((straight / "round_00/held_out").glob("*.jsonl")) for row in read_rows(path)]
    assert any(row.get("again") for row in rows)
    once = run(tmp_path, rounds__resample=0, rounds__select_prompts=0)
    first = [row for path in sorted((once / "round_00/held_out").glob("*.jsonl")) for row in read_rows(path)]
    for row, before in zip(rows, first, strict=True):
        assert "again" not in before
        if row.get("again"):
            assert before["candidates"][0]["text"].count(MARKER) != 1 or before["candidates"][0]["text"].endswith(
                MARKER
            )
        else:
            assert row == before


def test_policy_that_the_judge_likes_best_is_kept(straight):
    train = straight / "round_01/train"
    lines = [json.loads(line) for line in (train / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["held_out/score"] for line in lines if line["split"] == "eval" and line["step"] > 0}
    assert len(scores) >= 3
    assert len(set(scores.values())) > 1
    assert not (train / "best").exists()
    best = max(scores, key=lambda step: (scores[step], -step))
    assert best != max(scores), "this test would not tell the best from the last"


@pytest.mark.slow
def test_kept_policy_is_that_of_its_step(straight, run, tmp_path):
    lines = (straight / "round_01/train/metrics.jsonl").read_text().splitlines()
    scores = {x["step"]: x["held_out/score"] for x in map(json.loads, lines) if x["split"] == "eval" and x["step"]}
    best = max(scores, key=lambda step: (scores[step], -step))
    left = run(tmp_path, rounds__select_prompts=0, rounds__eval_prompts=14, train__schedule_epochs=1)
    # the same prompts in the round: 14 held out, as 8 and 6 are
    assert (left / "round_01/pairs.jsonl").read_bytes() == (straight / "round_01/pairs.jsonl").read_bytes()
    shorter = tmp_path / "shorter"
    shorter = run(
        shorter,
        rounds__select_prompts=0,
        rounds__eval_prompts=14,
        train__schedule_epochs=1,
        train__max_steps=best,
    )
    one = load_file(straight / "round_01/train/model/model.safetensors")
    other = load_file(shorter / "round_01/train/model/model.safetensors")
    last = load_file(left / "round_01/train/model/model.safetensors")
    assert all((one[name] == other[name]).all() for name in one)
    assert not all((one[name] == last[name]).all() for name in one)


@pytest.mark.parametrize(
    ("at", "count"),
    [
        pytest.param("prefopt.training.best_model:BestModel.save_if_best", 3, marks=pytest.mark.slow),
        pytest.param("prefopt.training.checkpoint:_write_folder", 2, marks=pytest.mark.slow),
        pytest.param("prefopt.training.checkpoint:save_optimizer", 1, marks=pytest.mark.slow),
        pytest.param("prefopt.training.checkpoint:copy", 1, marks=pytest.mark.slow),
        ("prefopt.rounds.stages:generate_rows", 3),
    ],
)
def test_rounds_of_thoughts_when_killed_and_run_again_then_all_is_bit_identical(
    at, count, server, place, thinking, straight, tmp_path
):
    (tmp_path / "own.py").write_text((place / "own.py").read_text())
    argv = thinking(tmp_path / "run")
    fault = {"at": at, "when": "after", "count": count, "do": "SIGKILL"}
    assert server.train(argv, fault, cwd=tmp_path).status == -signal.SIGKILL
    ended = server.train(argv, cwd=tmp_path)
    assert ended.status == 0, ended.err
    for path in straight.rglob("*"):
        if path.suffix in (".safetensors", ".md") or path.name in ("pairs.jsonl", "rounds.jsonl"):
            assert (tmp_path / "run" / path.relative_to(straight)).read_bytes() == path.read_bytes(), path


def test_two_ranks_sample_the_same_and_choose_too(server, place, thinking, straight, tmp_path):
    (tmp_path / "own.py").write_text((place / "own.py").read_text())
    ended = server.train(thinking(tmp_path / "run"), ranks=2, cwd=tmp_path)
    assert ended.status == 0, ended.err
    for name in ("round_00/held_out", "round_01/candidates", "round_01/scores"):
        for path in (straight / name).iterdir():
            assert (tmp_path / "run" / name / path.name).read_bytes() == path.read_bytes()
    assert "exported: the model of step" in ended.out


def test_exported_model_carries_its_markers_and_what_ends_an_answer(straight, place):
    for folder in (straight / "model", straight / "round_01/train/model"):
        found = json.loads((folder / "generation_config.json").read_text())
        assert found["thought"]["response_marker"] == MARKER
        assert found["thought"]["template"] == "Think first: {prompt}"
        assert GenerationConfig.from_pretrained(folder).thought == found["thought"]
        assert found["eos_token_id"] == [1]
        page = (folder / "README.md").read_text()
        assert "completion.partition('@')" in page
        assert "Think first: {prompt}" in page
    lm = AutoModelForCausalLM.from_pretrained(straight / "model")
    lm.save_pretrained(straight / "again")
    assert json.loads((straight / "again/generation_config.json").read_text())["thought"]["response_marker"] == MARKER


def test_code_on_the_models_page_cuts_as_the_method_does(straight):
    page = (straight / "model/README.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    for completion, wanted in (("a @ b", "b"), ("a b", None), ("a @ b @ c", None), ("a @ ", "")):
        scope = {"completion": completion}
        exec(code, scope)
        assert (scope["answer"] or None) == (wanted or None)


def test_stop_texts_of_the_rounds_go_with_the_model(run, tmp_path):
    output = run(tmp_path, generate__stop="say", rounds__select_prompts=0, rounds__eval_prompts=0)
    assert json.loads((output / "model/generation_config.json").read_text())["stop_strings"] == ["say"]


@pytest.mark.slow
def test_direct_baseline_is_the_same_command_without_a_thought_and_is_compared_with(run, tmp_path, straight):
    direct = run(tmp_path / "direct", method__thought_prompt="none")
    pairs = read_rows(direct / "round_01/pairs.jsonl")
    assert all(pair["prompt"].startswith("say ") for pair in pairs)
    assert "thought" not in json.loads((direct / "model/generation_config.json").read_text())
    compared = run(straight.parent, rounds__compare=direct)
    lines = [json.loads(line) for line in (compared / "rounds.jsonl").read_text().splitlines()]
    assert all(0 <= line["win_probability/vs_other"] <= 1 for line in lines)
    assert "win rate vs other run" in (compared / "rounds.md").read_text()
    fewer = run(tmp_path / "fewer", method__thought_prompt="none", rounds__eval_prompts=4, rounds__select_prompts=0)
    compared = run(straight.parent, rounds__compare=fewer)
    lines = [json.loads(line) for line in (compared / "rounds.jsonl").read_text().splitlines()]
    counts = ("wins", "ties", "losses", "left_out")
    assert all(sum(line[f"win_rate/vs_other_{count}"] for count in counts) == 4 for line in lines)


def test_run_with_other_held_out_prompts_is_not_compared_with(server, place, thinking, run, tmp_path):
    rows = [{"prompt": f"tell {i}", "chosen": "a", "rejected": "b"} for i in range(60)]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"method__thought_prompt": "none", "data__train": tmp_path / "others.jsonl", "rounds__select_prompts": 0}
    other = run(tmp_path / "other", **flags)
    here = tmp_path / "here"
    here.mkdir()
    (here / "own.py").write_text((place / "own.py").read_text())
    ended = server.train(thinking(here / "run", rounds__compare=other), cwd=here)
    assert ended.status == 2
    assert "rounds.compare: " in ended.err
    assert "answers none of this run's 8 held-out prompts, expected a run on the same data" in ended.err
    ended = server.train(thinking(here / "more", rounds__compare=here / "nothing"), cwd=here)
    assert ended.status == 2
    assert "run_card.json': No such file or directory, expected the folder of a run of rounds" in ended.err


def test_prompt_that_holds_the_marker_is_a_bad_row(server, place, thinking, tmp_path):
    (tmp_path / "own.py").write_text((place / "own.py").read_text())
    rows = (place / "pairs.jsonl").read_text()
    (tmp_path / "pairs.jsonl").write_text(rows + '{"prompt": "what is @?", "chosen": "a", "rejected": "b"}\n')
    ended = server.train(thinking(tmp_path / "run", data__train=tmp_path / "pairs.jsonl"), cwd=tmp_path)
    assert ended.status == 2
    assert "pairs.jsonl:101: 'prompt': contains the marker '@', expected" in ended.err
    more = {"data__train": tmp_path / "pairs.jsonl", "data__on_bad_row": "skip", "dry_run": "true"}
    ended = server.train(thinking(tmp_path / "run", **more), cwd=tmp_path)
    assert ended.status == 0
    assert "dropped: 1 prompt refused" in ended.out


def test_round_in_which_nothing_can_be_read_ends_in_one_line(server, place, thinking, tmp_path):
    (tmp_path / "own.py").write_text((place / "own.py").read_text())
    argv = thinking(tmp_path / "run", method__response_marker="@@@@", rounds__eval_prompts=0, rounds__select_prompts=0)
    ended = server.train(argv, cwd=tmp_path)
    assert ended.status == 2
    assert "none of 40 prompts gave a pair (" in ended.err
    assert "40 of 40 prompts skipped: no candidate judged" in ended.err
    assert "completions lack the response marker" in ended.err


def test_more_prompts_to_choose_by_than_there_are_is_refused(server, place, thinking, tmp_path):
    (tmp_path / "own.py").write_text((place / "own.py").read_text())
    ended = server.train(thinking(tmp_path / "run", rounds__select_prompts=100), cwd=tmp_path)
    assert ended.status == 2
    assert "rounds.select_prompts: found 100, but beside 8 of rounds.eval_prompts there are 92 prompts" in ended.err
