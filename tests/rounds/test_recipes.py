"""Each recipe is configuration alone: it runs a round, on a tiny model and with a judge that is at hand."""

import json
from pathlib import Path

import pytest
import yaml

from prefopt.rounds.store import read_manifest, read_rows
from tests.helpers import byte_bpe_tokenizer, tiny_llama

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
OTHERS_JUDGE = sorted([*(CONFIGS / "recipes").glob("*.yaml"), *(CONFIGS / "papers").glob("sppo*.yaml")])
OTHERS_JUDGE = [path for path in OTHERS_JUDGE if yaml.safe_load(path.read_text())["judge"].get("path") != "policy"]
SELF = CONFIGS / "recipes" / "self_rewarding.yaml"
SHORT = {"rounds.count": 1, "rounds.prompts": 6, "rounds.shard": 6, "rounds.eval_prompts": 0, "generate.max_tokens": 8}
SHORT |= {"train.global_batch": 4, "train.micro_batch": 4, "data.max_length": 256, "optim.lr": 1e-3}


def flags(config, output, model, data, **other):
    given = {"config": config, "output": output, "model.path": model, "data.train": data} | SHORT
    given |= {name.replace("__", "."): value for name, value in other.items()}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize(
    "config",
    [pytest.param(path, marks=pytest.mark.slow if i % 2 else ()) for i, path in enumerate(OTHERS_JUDGE)],
    ids=lambda path: path.stem,
)
def test_recipe_when_run_for_a_round_then_it_trains_on_pairs_of_its_kind(config, server, place, tmp_path):
    recipe = yaml.safe_load(config.read_text())
    # the hub's judge is not at hand; a shorter answer is better here
    judge = {} if recipe["judge"]["kind"] == "none" else {"judge__kind": "length", "judge__path": "none"}
    ended = server.train(flags(config, tmp_path / "run", place / "model", place / "pairs.jsonl", **judge))
    assert ended.status == 0, ended.err
    folder = tmp_path / "run" / "round_01"
    pairs, candidates = read_rows(folder / "pairs.jsonl"), read_rows(folder / "candidates.jsonl")
    assert pairs
    assert len(candidates) == 6 * recipe["generate"]["n"]
    card = json.loads((folder / "train" / "run_card.json").read_text())
    assert {key: card["config"]["method"][key] for key in recipe["method"]} == recipe["method"]
    assert card["config"]["optim"]["name"] == recipe["optim"].get("name", "adamw")
    answers = {
        row["prompt"]: row["chosen"] for row in map(json.loads, (place / "pairs.jsonl").read_text().splitlines())
    }
    from_data = [row["chosen"].strip() == answers[row["prompt"]].strip() for row in pairs]
    assert all(from_data) if recipe["rounds"]["pairs"].startswith("data") else not any(from_data)
    if "win_prob" in recipe["method"]:
        assert all(row["chosen_win_prob"] > 0.5 > row["rejected_win_prob"] for row in pairs)


@pytest.fixture(scope="module")
def judge_itself(server, tmp_path_factory):
    """A tiny model that was taught to answer anything with a score from 0 to 5, its prompts, and one that was not."""
    folder = tmp_path_factory.mktemp("judge")
    asked = (Path(__file__).resolve().parents[2] / "prefopt/judges/templates/score.txt").read_text()
    rows = [{"prompt": f"say {i}", "completion": f" [[{i % 6}]]"} for i in range(60)]
    rows += [{"prompt": asked.replace("{response}", f"[[{i % 5}]]"), "completion": f"[[{i % 6}]]"} for i in range(60)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows[:12]))
    tokenizer = byte_bpe_tokenizer([asked] * 4 + [row["prompt"] + row["completion"] for row in rows], vocab_size=600)
    tiny_llama(len(tokenizer), hidden=16, layers=1).save_pretrained(folder / "untaught")
    tokenizer.save_pretrained(folder / "untaught")
    teach = {"method": "sft", "model.path": folder / "untaught", "data.train": folder / "answers.jsonl"}
    teach |= {"output": folder / "taught", "optim.lr": 3e-2, "train.global_batch": 30, "train.epochs": 15}
    teach |= {"data.eval_fraction": 0, "eval.every": 1000, "train.save_every": 1000, "train.micro_batch": 30}
    ended = server.train([word for name, value in teach.items() for word in (f"--{name}", str(value))])
    assert ended.status == 0, ended.err
    return folder


def test_self_rewarding_when_the_policy_can_judge_then_it_trains_on_its_own_verdicts(server, judge_itself, tmp_path):
    model, data = judge_itself / "taught" / "model", judge_itself / "prompts.jsonl"
    ended = server.train(flags(SELF, tmp_path / "run", model, data, judge__max_tokens=8))
    assert ended.status == 0, ended.err
    folder = tmp_path / "run" / "round_01"
    said = [row["scores"] for shard in sorted((folder / "scores").glob("*.jsonl")) for row in read_rows(shard)]
    scores = [score for row in said for score in row if score is not None]
    assert len(scores) >= 12, "it was taught to answer with a score"
    assert {*scores} <= {0, 1, 2, 3, 4, 5}
    counts = read_manifest(folder / "scores.json")["counts"]
    assert len(scores) + counts["problems"].get("unparsed", 0) == counts["judged"]
    rows = {(row["key"], row["candidate"]): row for row in read_rows(folder / "candidates.jsonl")}
    pairs = [row for row in rows.values() if row["role"] == "chosen"]
    assert len(pairs) == len(read_rows(folder / "pairs.jsonl")) > 0
    for chosen in pairs:
        others = [row["score"] for row in rows.values() if row["key"] == chosen["key"] and row["score"] is not None]
        assert chosen["score"] == max(others) > min(others)


def test_self_rewarding_when_the_policy_cannot_judge_then_it_ends_in_one_line(server, judge_itself, tmp_path):
    model, data = judge_itself / "untaught", judge_itself / "prompts.jsonl"
    ended = server.train(flags(SELF, tmp_path / "run", model, data, judge__max_tokens=8))
    assert ended.status == 2
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert "none of 6 prompts gave a pair" in line
    assert "judge: 24 unparsed" in line
    assert "Traceback" not in ended.err
