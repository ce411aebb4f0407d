"""Rounds as a whole: what they leave, and in which forms they run."""

import json
import sys

import datasets
import pytest
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from prefopt.rounds.store import read_manifest, read_rows
from prefopt.training.metrics import read_lines


def test_every_candidate_of_every_round_is_kept_in_a_file_that_datasets_opens(uninterrupted, tmp_path):
    files = str(uninterrupted / "round_*/candidates.jsonl")
    table = datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path))["train"]
    assert len(table) == 2 * 16 * 3
    known = {"score", "win_prob", "tokens", "finish_reason", "engine", "judge", "temperature", "top_p", "max_tokens"}
    assert known | {"role", "seed", "round", "policy", "text", "prompt"} <= {*table.column_names}
    for row in table:
        assert row["score"] is None or row["score"] == -len(row["text"])
        assert row["finish_reason"] == "stop" or row["tokens"] == 8
    pairs = [row for number in (1, 2) for row in read_rows(uninterrupted / f"round_{number:02d}/pairs.jsonl")]
    roles = table["role"][:]
    assert roles.count("chosen") == roles.count("rejected") == len(pairs)


def test_prompts_of_rounds_are_never_the_same_and_never_held_out(uninterrupted):
    used = [row["key"] for number in (1, 2) for row in read_rows(uninterrupted / f"round_{number:02d}/prompts.jsonl")]
    held = [row["key"] for shard in (uninterrupted / "round_00/held_out").iterdir() for row in read_rows(shard)]
    assert len(used) == len({*used}) == 32
    assert len(held) == 8
    assert not {*used} & {*held}


def test_pairs_are_the_sampled_tokens_with_probabilities_of_the_candidates(uninterrupted):
    folder = uninterrupted / "round_01"
    generated = {row["key"]: row for shard in (folder / "candidates").iterdir() for row in read_rows(shard)}
    for pair in read_rows(folder / "pairs.jsonl"):
        texts = {tuple(c["ids"]): c["text"] for c in generated[pair["key"]]["candidates"]}
        assert texts[tuple(pair["chosen_ids"])] == pair["chosen"]
        assert texts[tuple(pair["rejected_ids"])] == pair["rejected"]
        assert len(pair["chosen"]) < len(pair["rejected"])
        assert pair["chosen_win_prob"] > 0.5 > pair["rejected_win_prob"]


def test_figures_of_rounds_are_a_table_a_plot_and_lines(uninterrupted):
    lines = read_lines_of(uninterrupted)
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert all(line["score"] < 0 for line in lines)
    assert all(0 <= line["win_probability/vs_start"] <= 1 for line in lines[1:])
    assert lines[1]["kl/to_first"] == lines[1]["kl/to_round_start"] > 0
    assert lines[2]["kl/to_first"] > lines[2]["kl/to_round_start"]
    assert (uninterrupted / "rounds.png").stat().st_size > 10_000
    assert "| 2 | 0." in (uninterrupted / "rounds.md").read_text()


def read_lines_of(output):
    return [json.loads(line) for line in (output / "rounds.jsonl").read_text().splitlines()]


def test_manifest_says_what_a_stage_was_made_from(uninterrupted):
    generated, judged = (read_manifest(uninterrupted / f"round_02/{name}.json") for name in ("candidates", "scores"))
    assert generated["inputs"]["sampling"]["n"] == 3
    assert generated["about"]["engine"] == "transformers"
    assert judged["inputs"]["judge"]["kind"] == "length"
    assert sum(shard["rows"] for shard in generated["shards"].values()) == 16


def test_last_policy_opens_with_transformers(uninterrupted):
    assert AutoModelForCausalLM.from_pretrained(uninterrupted / "model").config.vocab_size > 0


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft calls transformers by an older name
def test_adapter_goes_on_from_round_to_round_with_the_round_start_as_reference(server, rounds, tmp_path):
    argv = rounds(tmp_path / "run", lora__r=2, method="dpo", without=("method.beta",))
    ended = server.train(argv)
    assert ended.status == 0, ended.err
    cards = [json.loads((tmp_path / f"run/round_0{k}/train/run_card.json").read_text()) for k in (1, 2)]
    assert cards[0]["reference"]["is"].startswith("the base weights under the disabled adapter")
    assert cards[1]["reference"]["is"].startswith("a frozen snapshot of the adapter that the policy starts from")
    for card in cards:
        assert "loss 0.6931 as expected" in ended.out, card
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run/model")
    lines = read_lines_of(tmp_path / "run")
    assert lines[2]["kl/to_first"] != lines[2]["kl/to_round_start"]


def test_trackers_get_the_figures_of_rounds_and_the_steps_of_each(server, rounds, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ended = server.train(rounds(tmp_path / "run", track__to="tensorboard", rounds__count=1))
    assert ended.status == 0, ended.err
    seen = {}
    for events in (tmp_path / "run").rglob("events.out.tfevents*"):
        board = EventAccumulator(str(events))
        board.Reload()
        seen |= {(tag, event.step): event.value for tag in board.Tags()["scalars"] for event in board.Scalars(tag)}
    for line in read_lines_of(tmp_path / "run"):
        for name, value in line.items():
            if name != "round":
                assert seen[f"rounds/{name}", line["round"]] == pytest.approx(value, rel=1e-6, abs=1e-30), name
    steps = [line for line in read_lines(tmp_path / "run/round_01/train/metrics.jsonl") if line["split"] == "train"]
    assert seen["loss", steps[-1]["step"]] == pytest.approx(steps[-1]["loss"], rel=1e-6)


@pytest.mark.slow  # a block of docs/rounds.md runs it too
def test_conductor_starts_each_stage_in_a_process_of_its_own(rounds, place, tmp_path, monkeypatch):
    """For real, with processes: slow to start, so the smallest run there is."""
    from prefopt.cli import rounds as command

    argv = rounds(tmp_path / "run", rounds__count=1, rounds__eval_prompts=0, rounds__prompts=4, train__max_steps=1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert command([*argv, "--rounds.launcher", f"env MARK=1 {sys.executable}"]) == 0
    assert (tmp_path / "run/model/manifest.json").exists()
    before = (tmp_path / "run/round_01/candidates.json").stat().st_mtime_ns
    assert (
        command([*argv, "--rounds.launcher", sys.executable]) == 0
    )  # another launcher is the same run, and all is done
    assert (tmp_path / "run/round_01/candidates.json").stat().st_mtime_ns == before
