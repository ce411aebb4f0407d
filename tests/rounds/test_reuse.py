"""A round's candidates are trained on again under other settings, and nothing is sampled for it."""

import pytest
from safetensors.torch import load_file

from prefopt.errors import RoundError
from prefopt.rounds.store import Stage

# 8 held-out prompts are asked after the round, in two shards; a third call would be for candidates, or for round 0.
THIRD = {"at": "prefopt.rounds.stages:generate_rows", "when": "before", "count": 3, "do": "SIGKILL"}


def test_candidates_of_another_run_are_trained_on_again_and_nothing_is_sampled(server, rounds, uninterrupted, tmp_path):
    argv = rounds(tmp_path / "run", rounds__count=1, optim__lr=3e-2, rounds__candidates=uninterrupted)
    ended = server.train(argv, THIRD)
    assert ended.status == 0, ended.err
    assert f"round_01: candidates of 16 prompts are copied from {uninterrupted}/round_01" in ended.out
    for name in ("candidates", "scores"):
        for shard in sorted((uninterrupted / "round_01" / name).iterdir()):
            assert (tmp_path / "run/round_01" / name / shard.name).read_bytes() == shard.read_bytes()
    model = "round_01/train/model/model.safetensors"
    before, after = (load_file(run / model) for run in (uninterrupted, tmp_path / "run"))
    assert any((before[name] != after[name]).any() for name in before), "another rate, another model"


def test_candidates_that_were_sampled_otherwise_are_refused_by_name(server, rounds, uninterrupted, tmp_path):
    ended = server.train(
        rounds(tmp_path / "run", rounds__candidates=uninterrupted, generate__temperature=0.5, rounds__eval_prompts=8),
        THIRD | {"count": 5},
    )
    assert ended.status == 2, ended.err
    assert f"rounds.candidates: {uninterrupted}/round_01/candidates was made from another sampling" in ended.err
    ended = server.train(rounds(tmp_path / "other", rounds__candidates=tmp_path / "none"))
    assert ended.status == 2
    assert "rounds.candidates: " in ended.err


def test_stage_when_taken_over_then_keeps_its_rows_under_shards_of_another_size(tmp_path):
    rows = [{"key": str(i), "value": i} for i in range(5)]
    first = Stage(tmp_path / "a/round_01", "candidates", {"policy": "p"}, [["0", "1", "2"], ["3", "4"]])
    first.begin()
    first.write(0, rows[:3])
    first.write(1, rows[3:])
    first.finish({"prompts": 5})
    second = Stage(tmp_path / "b/round_01", "candidates", {"policy": "p"}, [["0", "1"], ["2", "3"], ["4"]])
    assert not second.begin()
    assert second.take_over(tmp_path / "a/round_01") == 5
    assert second.rows() == rows
    assert second.begin(), "it is finished now"
    other = Stage(tmp_path / "c/round_01", "candidates", {"policy": "q"}, first.keys)
    other.begin()
    with pytest.raises(RoundError, match="was made from another policy"):
        other.take_over(tmp_path / "a/round_01")
    with pytest.raises(RoundError, match="holds no finished candidates"):
        other.take_over(tmp_path / "none")
