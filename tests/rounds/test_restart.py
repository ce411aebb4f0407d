"""Kill rounds at any moment, type the same command again: the same candidates, scores, pairs and weights."""

import json
import random
import signal

import pytest

from prefopt.training.metrics import WALL_CLOCK_KEYS, read_lines
from prefopt.training.signals import EXIT_UNFINISHED

ROUNDS = "prefopt.rounds."
ENGINE = "prefopt.training."
# Where a process may die: (stage, function, before or after, the last of its calls that surely comes, on which ranks).
PLACES = [
    ("generate", ROUNDS + "stages:generate_rows", "before", 2, (0, 1)),
    ("generate", "prefopt.generation.transformers_engine:TransformersEngine._draw", "before", 12, (0, 1)),
    ("generate", ROUNDS + "store:Stage.write", "after", 2, (0, 1)),
    ("judge", ROUNDS + "stages:judge_rows", "before", 2, (0, 1)),
    ("judge", ROUNDS + "stages:judge_rows", "after", 2, (0, 1)),
    ("pair", ROUNDS + "stages:pair_rows", "after", 1, (0,)),
    ("pair", ROUNDS + "round_training:RoundTraining.write_pairs", "after", 1, (0,)),
    ("pair", ROUNDS + "store:write_rows", "before", 1, (0,)),
    ("train", ENGINE + "trainer:Trainer._step", "before", 4, (0, 1)),
    ("train", "prefopt.storage:seal", "before", 3, (0,)),
    ("train", "prefopt.storage:seal", "after", 3, (0,)),
    ("evaluate", ROUNDS + "held_out_evaluation:HeldOutEvaluation.compute", "before", 1, (0,)),
    ("evaluate", ROUNDS + "held_out_evaluation:HeldOutEvaluation.write_report", "before", 1, (0,)),
    ("any", ROUNDS + "store:write_manifest", "before", 2, (0,)),
    ("any", ROUNDS + "store:write_manifest", "after", 2, (0,)),
    ("any", "os:fsync", "before", 3, (0,)),
    ("export", ROUNDS + "policies:RoundPolicies.export", "before", 1, (0,)),
]
ORDER = ("generate", "judge", "pair", "train")


def kept(output):
    """Every file that says what the run has made, by its name in the run."""
    patterns = ("round_*/candidates/*", "round_*/scores/*", "round_*/held_out/*", "round_*/*.jsonl", "round_*/*.json")
    paths = [path for pattern in patterns for path in output.glob(pattern)]
    paths += [output / "rounds.jsonl", output / "rounds.md", *output.rglob("model*.safetensors")]
    return {str(path.relative_to(output)): path for path in paths if "checkpoints" not in path.parts}


def assert_same_rounds(output, straight):
    mine, theirs = kept(output), kept(straight)
    assert mine.keys() == theirs.keys()
    for name, path in theirs.items():
        if path.suffix == ".json":  # a manifest also tells of its circumstances, where the policy lay
            here, there = (json.loads(p.read_text()) | {"about": None, "sha256": None} for p in (mine[name], path))
            assert here == there, name
        else:
            assert mine[name].read_bytes() == path.read_bytes(), name
    for number in (1, 2):
        lines = [read_lines(run / f"round_{number:02d}/train/metrics.jsonl") for run in (output, straight)]
        bare = [[{k: v for k, v in line.items() if k not in WALL_CLOCK_KEYS} for line in run] for run in lines]
        assert bare[0] == bare[1]
    assert not [path for path in output.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".writing")]


def kill_and_finish(server, argv, seed, ranks=1):
    """Kill once in each stage, at seeded places, and let it end; every kill must have happened."""
    rng = random.Random(seed)
    for stage in ORDER:
        at, when, most, on = rng.choice([place[1:] for place in PLACES if place[0] == stage])
        rank = rng.choice([rank for rank in on if rank < ranks])
        fault = {"at": at, "when": when, "count": rng.randint(1, most), "do": "SIGKILL", "rank": rank}
        ended = server.train(argv, fault, ranks=ranks)
        assert ended.status == -signal.SIGKILL, (fault, ended.err)
    ended = server.train(argv, ranks=ranks)
    assert ended.status == 0, ended.err


def test_rounds_when_undisturbed_then_each_policy_is_another_and_all_is_kept(uninterrupted):
    names = kept(uninterrupted)
    assert {f"round_{k:02d}/train/model/model.safetensors" for k in (1, 2)} <= names.keys()
    weights = [names[f"round_{k:02d}/train/model/model.safetensors"].read_bytes() for k in (1, 2)]
    assert weights[0] != weights[1]
    assert names["model/model.safetensors"].read_bytes() == weights[1]
    assert not list(uninterrupted.rglob("checkpoints"))


def test_rounds_when_killed_in_each_stage_and_run_again_then_all_is_bit_identical(
    server, rounds, uninterrupted, tmp_path
):
    kill_and_finish(server, rounds(tmp_path / "run"), "here")
    assert_same_rounds(tmp_path / "run", uninterrupted)


def test_rounds_on_two_ranks_when_one_is_killed_then_they_end_as_two_ranks_do(server, rounds, uninterrupted, tmp_path):
    straight, argv = tmp_path / "straight", rounds(tmp_path / "run")
    assert server.train(rounds(straight), ranks=2).status == 0
    fault = {"at": ROUNDS + "stages:generate_rows", "when": "before", "count": 2, "do": "SIGKILL", "rank": 1}
    assert server.train(argv, fault, ranks=2).status == -signal.SIGKILL
    assert server.train(argv, ranks=2).status == 0
    assert_same_rounds(tmp_path / "run", straight)
    # what a round samples and says of it does not depend on how many share the work; its sums of gradients round apart
    for name in ("round_00/held_out", "round_01/candidates", "round_01/scores"):
        for path in (uninterrupted / name).iterdir():
            assert (straight / name / path.name).read_bytes() == path.read_bytes()
    assert (straight / "round_01/pairs.jsonl").read_bytes() == (uninterrupted / "round_01/pairs.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_rounds_when_killed_at_random_places_then_all_is_bit_identical(seed, server, rounds, uninterrupted, tmp_path):
    kill_and_finish(server, rounds(tmp_path / "run"), seed)
    assert_same_rounds(tmp_path / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_rounds_on_two_ranks_when_killed_at_random_places_then_all_is_bit_identical(seed, server, rounds, tmp_path):
    assert server.train(rounds(tmp_path / "straight"), ranks=2).status == 0
    kill_and_finish(server, rounds(tmp_path / "run"), f"two {seed}", ranks=2)
    assert_same_rounds(tmp_path / "run", tmp_path / "straight")


@pytest.mark.slow
def test_rounds_when_killed_at_random_moments_then_all_is_bit_identical(server, rounds, uninterrupted, tmp_path):
    rng, argv, killed = random.Random(0), rounds(tmp_path / "run"), 0
    for _ in range(10):
        ended = server.train(argv, kill_after=rng.uniform(0.05, 1.5))
        assert ended.status in (0, -signal.SIGKILL), ended.err
        killed += ended.status != 0
    assert killed >= 3
    assert server.train(argv).status == 0
    assert_same_rounds(tmp_path / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(("at", "when"), [place[1:3] for place in PLACES])
def test_rounds_when_killed_at_each_place_once_then_all_is_bit_identical(
    at, when, server, rounds, uninterrupted, tmp_path
):
    argv = rounds(tmp_path / "run")
    assert server.train(argv, {"at": at, "when": when, "count": 1, "do": "SIGKILL"}).status == -signal.SIGKILL
    assert server.train(argv).status == 0
    assert_same_rounds(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("at", ["generate_rows", pytest.param("judge_rows", marks=pytest.mark.slow)])
def test_rounds_when_asked_to_stop_in_a_stage_then_leave_at_once_and_continue(
    at, server, rounds, uninterrupted, tmp_path
):
    argv = rounds(tmp_path / "run")
    ended = server.train(argv, {"at": ROUNDS + f"stages:{at}", "count": 3, "do": "SIGTERM"})
    assert ended.status == EXIT_UNFINISHED
    assert "SIGTERM: all that is finished is saved, leaving with exit status 75" in ended.out
    ended = server.train(argv)
    assert ended.status == 0, ended.err
    assert_same_rounds(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_rounds_when_asked_to_stop_in_training_then_save_and_continue(server, rounds, uninterrupted, tmp_path):
    argv = rounds(tmp_path / "run")
    ended = server.train(argv, {"at": ENGINE + "trainer:Trainer._step", "count": 7, "do": "SIGUSR1"})
    assert ended.status == EXIT_UNFINISHED
    assert "left at step 2 of 4" in ended.out  # the third step of the second round was given up
    assert server.train(argv).status == 0
    assert_same_rounds(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_stages_of_their_own_processes_and_four_parts_make_the_same(server, rounds, uninterrupted, tmp_path):
    argv = rounds(tmp_path / "run")

    def stage(name, number, *part):
        return server.train(["--stage", name, "--round", str(number), *part, *argv], command="rounds").status

    assert stage("evaluate", 0) == 0
    assert stage("generate", 1, "--part", "2/4") == 0
    assert stage("judge", 1) == 2, "a stage waits for all parts of the one before"
    # whichever comes last completes the stage
    assert [stage("generate", 1, "--part", f"{i}/4") for i in (2, 0, 3, 1)] == [0, 0, 0, 0]
    for number in (1, 2):
        for name in ("generate", "judge", "pair", "train", "evaluate"):
            assert stage(name, number) == 0, (name, number)
    assert_same_rounds(tmp_path / "run", uninterrupted)
