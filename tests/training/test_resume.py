"""Kill a run at any moment, type the same command again: the same weights, each metrics line once."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors.torch import load_file

from prefopt import registry
from prefopt.settings import ModelConfig
from prefopt.training import models
from prefopt.training.metrics import WALL_CLOCK_KEYS, read_lines
from prefopt.training.signals import EXIT_UNFINISHED
from tests.invariant.methods import representatives

ENGINE = "prefopt.training."
# Where a process may die: (function, before or after, the last of its calls that may be the one).
IN_A_CHECKPOINT = [
    (ENGINE + "checkpoint:save_optimizer", "before", 2),  # the model is written, the optimizer is not
    ("prefopt.storage:seal", "before", 2),  # all written, no manifest
    ("prefopt.storage.folders:sha256", "before", 9),
    ("prefopt.storage:seal", "after", 2),  # whole, but not yet renamed
]
ANYWHERE = [
    *IN_A_CHECKPOINT,
    ("prefopt.run.card:write_or_check_card", "before", 1),  # the run card, which marks a begun run
    (ENGINE + "checkpoint:clean", "after", 1),
    (ENGINE + "metrics:MetricsFile.rewind", "after", 1),
    (ENGINE + "trainer:Trainer._step", "before", 5),
    (ENGINE + "trainer:pair_stats", "after", 12),
    (ENGINE + "evaluation:write_whole", "before", 1),
    (ENGINE + "metrics:MetricsFile.write", "after", 6),  # logged, but not in a checkpoint
    (ENGINE + "checkpoint:_write_folder", "after", 2),  # renamed, older checkpoints not yet dropped
    ("os:unlink", "before", 9),
]


STEPS = 12
LONG = {"train__max_steps": 24}
SHORT = {"train__max_steps": 4, "train__save_every": 2, "eval__every": 2}


def fault(place, do="SIGKILL", count=None, rng=None):
    at, when, most = place
    return {"at": at, "when": when, "count": count or rng.randint(1, most), "do": do}


@pytest.fixture(scope="module")
def command(command):
    """The command of 12 steps, a checkpoint every 3, an evaluation every 4."""
    return functools.partial(command, **{"train__max_steps": STEPS})


@pytest.fixture(scope="module")
def uninterrupted(server, command, tmp_path_factory):
    """The output folder of a method's run that nobody disturbed."""
    done = {}

    def run(method, **settings):
        key = (method, *settings.items())
        if key not in done:
            output = tmp_path_factory.mktemp("straight") / method
            ended = server.train(command(method, output, **settings))
            assert ended.status == 0, ended.err
            done[key] = output
        return done[key]

    return run


def without_clock(output):
    lines = read_lines(output / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in WALL_CLOCK_KEYS} for line in lines]


def assert_same_run(output, straight):
    last = sorted((straight / "checkpoints").iterdir())[-1]
    files = [*(straight / "model").glob("*.safetensors"), *last.glob("*.safetensors")]
    moving = (last / "moving_reference.safetensors").exists()
    assert len(files) == 3 + moving  # the model, the model again, the optimizer
    for path in files:
        assert (output / path.relative_to(straight)).read_bytes() == path.read_bytes()
    lines = without_clock(output)
    seen = [(line["step"], line["split"]) for line in lines]
    assert len(seen) == len(set(seen))
    assert lines == without_clock(straight)
    assert (output / "eval_pairs.jsonl").read_bytes() == (straight / "eval_pairs.jsonl").read_bytes()
    assert not [p for p in output.rglob("*") if p.name.endswith(".tmp") or p.name.startswith(".writing")]


def finish(server, argv, attempts=3):
    for _ in range(attempts):
        ended = server.train(argv)
        if ended.status == 0:
            return ended
        assert ended.status == EXIT_UNFINISHED, ended.err
    raise AssertionError(f"not finished after {attempts} attempts")


def test_uninterrupted_run_logs_each_step_once_and_learns(uninterrupted):
    output = uninterrupted("dpo", **LONG)
    lines = read_lines(output / "metrics.jsonl")
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 25))
    assert [line["step"] for line in lines if line["split"] == "eval"] == [0, 4, 8, 12, 16, 20, 24]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert [p.name for p in sorted((output / "checkpoints").iterdir())] == ["step_00000021", "step_00000024"]


@pytest.mark.parametrize("load", [models.load_model, models.load_scorer])
def test_weights_from_a_file_stand_where_new_ones_would(load, task):
    """Some CPUs round a product by where its matrix stands, and then no continued run is the one left alone."""
    loaded = load(str(task.model), ModelConfig())
    assert {tensor.data_ptr() % 64 for tensor in (*loaded.parameters(), *loaded.buffers())} == {0}


def kill_again_and_again(server, argv, kills, seed):
    """Kill the command at seeded places, two of them inside a checkpoint write at least, then let it end."""
    rng = random.Random(seed)
    places = [*rng.choices(IN_A_CHECKPOINT, k=2), *rng.choices(ANYWHERE, k=kills - 2)]
    rng.shuffle(places)
    killed = []
    for place in places:
        wanted = fault(place, rng=rng)
        ended = server.train(argv, wanted)
        if ended.status != -signal.SIGKILL:
            # the run is too near its end to reach that call
            assert ended.status == 0, (wanted, ended.err)
            return killed
        killed.append(wanted)
    ended = server.train(argv)
    assert ended.status == 0, (killed, ended.err)
    return killed


def test_run_when_killed_six_times_and_restarted_then_ends_bit_identical(server, command, uninterrupted, tmp_path):
    killed = kill_again_and_again(server, command("dpo", tmp_path / "run", **LONG), 6, "dpo 0")
    assert len(killed) == 6
    assert_same_run(tmp_path / "run", uninterrupted("dpo", **LONG))


KINDS = representatives({name: registry.get(name)() for name in registry.names()})
IN_GATE = [name for name in registry.names() if name in KINDS or registry.get(name)().needs.state]


@pytest.mark.parametrize(
    "method", [name if name in IN_GATE else pytest.param(name, marks=pytest.mark.slow) for name in registry.names()]
)
def test_run_of_each_method_when_killed_and_restarted_then_ends_bit_identical(
    method, server, command, uninterrupted, tmp_path
):
    """Killed once, in its last step; the long runs that are killed ten times are in make test-all."""
    argv = command(method, tmp_path / "run", **SHORT)
    ended = server.train(argv, {"at": ENGINE + "trainer:pair_stats", "count": 11, "do": "SIGKILL"})
    assert ended.status == -signal.SIGKILL
    assert "step_00000002" in finish(server, argv).out
    assert_same_run(tmp_path / "run", uninterrupted(method, **SHORT))


def test_run_when_grouped_by_length_and_killed_then_ends_bit_identical(server, command, uninterrupted, tmp_path):
    settings = {"train__group_by_length": True}
    killed = command("dpo", tmp_path / "killed", **settings)
    wanted = fault((ENGINE + "trainer:Trainer._step", "before", 1), count=9)
    assert server.train(killed, wanted).status == -signal.SIGKILL
    assert server.train(killed).status == 0
    assert_same_run(tmp_path / "killed", uninterrupted("dpo", **settings))


@pytest.mark.parametrize("grouped", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_run_when_steps_have_a_token_budget_and_sources_weights_and_killed_then_ends_bit_identical(
    grouped, server, command, task, tmp_path
):
    lines = task.pairs.read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:15]))
    (tmp_path / "many.jsonl").write_text("".join(lines[15:]))
    settings = {"data__train": f"{tmp_path}/few.jsonl,{tmp_path}/many.jsonl", "data__weights": "2,1"}
    settings |= {"train__tokens_per_batch": 300, "train__group_by_length": grouped, "train__epochs": 2.5}
    straight, killed = (
        command("dpo", tmp_path / name, without=("train.max_steps",), **settings) for name in ("straight", "killed")
    )
    ended = server.train(straight)
    assert ended.status == 0, ended.err
    steps = [line for line in read_lines(tmp_path / "straight" / "metrics.jsonl") if line["split"] == "train"]
    assert max(line["tokens_processed"] for line in steps) <= 300
    assert len({line["pairs"] for line in steps}) > 1
    assert steps[-1]["epoch"] >= 2.5 > steps[-2]["epoch"]
    falls = [before["learning_rate"] - after["learning_rate"] for before, after in pairwise(steps[len(steps) // 2 :])]
    assert steps[-1]["learning_rate"] == pytest.approx(falls[0]), "the linear schedule ends one step after the last"
    for count in (4, 9):
        wanted = fault((ENGINE + "trainer:Trainer._step", "before", 1), count=count)
        assert server.train(killed, wanted).status == -signal.SIGKILL
    assert server.train(killed).status == 0
    assert_same_run(tmp_path / "killed", tmp_path / "straight")


# Runs with a state of their own: what an adapter's dropout drops, the scale of fp16, which overflows at first here, an
# optimizer's tables, a reference that moves, with all weights and with an adapter, or is kept; and runs that compute in
# another way.
OFFLOADED = {"model__gradient_checkpointing": True, "model__offload_activations": True}
SETTINGS = {
    "moving reference": {"reference__sync_every": 2, "reference__sync_weight": 0.6},
    "moving snapshot": {"reference__sync_every": 2, "lora__r": 4, "lora__modules_to_save": "lm_head"},
    "kept hidden states": {"reference__cache": "hidden"},
    "adapter": {"lora__r": 4, "lora__dropout": 0.3, "lora__modules_to_save": "lm_head"},
    "fp16": {"train__mixed_precision": "fp16", "method__beta": 30},
    "adapter of a classifier": {"lora__r": 4, "lora__dropout": 0.3, "train__mixed_precision": "bf16"},
    "quantised": {"lora__r": 4, "lora__dropout": 0.3, "model__quantize": "nf4", **OFFLOADED},
    "quantised classifier": {"lora__r": 4, "model__quantize": "nf4", "optim__name": "adamw_8bit"},
    "recomputed and offloaded": OFFLOADED,
    "optimizer in 8 bits": {"optim__name": "adamw_8bit"},
    "optimizer of few numbers": {"optim__name": "adafactor"},
    "compiled": {"train__compile": True},
}
METHOD_OF = {"adapter of a classifier": "reward_model", "quantised classifier": "reward_model"}  # dpo else
METHOD_OF |= {"kept hidden states": "tdpo"}


# the state of these is that of others: in make test-all
ALIKE = ("compiled", "quantised classifier", "recomputed and offloaded", "optimizer of few numbers", "moving snapshot")
ALIKE += ("adapter of a classifier", "optimizer in 8 bits")


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.slow) if what in ALIKE else what for what in SETTINGS]
)
def test_run_when_it_has_more_state_and_is_killed_and_restarted_then_ends_bit_identical(
    what, server, command, uninterrupted, tmp_path
):
    method = METHOD_OF.get(what, "dpo")
    settings = {"train__max_steps": 6, "train__save_every": 2, "eval__every": 3, **SETTINGS[what]}
    straight = uninterrupted(method, **settings)
    if what == "fp16":
        steps = [line for line in read_lines(straight / "metrics.jsonl") if line["split"] == "train"]
        assert {line["skipped_step"] for line in steps} == {0, 1}
    argv = command(method, tmp_path / "run", **settings)
    for place, count in ((ENGINE + "trainer:Trainer._step", 4), ("prefopt.storage:seal", 2)):
        assert server.train(argv, {"at": place, "count": count, "do": "SIGKILL"}).status == -signal.SIGKILL
    finish(server, argv)
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "when"), [(at, when) for at, when, _ in ANYWHERE] + [(ENGINE + "first_batch:check_first_batch", "before")]
)
def test_run_when_killed_at_each_place_once_then_ends_bit_identical(at, when, server, command, uninterrupted, tmp_path):
    argv = command("dpo", tmp_path / "run")
    assert server.train(argv, fault((at, when, 1), rng=random)).status == -signal.SIGKILL
    finish(server, argv)
    assert_same_run(tmp_path / "run", uninterrupted("dpo"))


def test_run_when_rows_are_packed_and_prompts_shared_then_it_ends_bit_identical_and_may_change_its_layout(
    server, command, uninterrupted, tmp_path
):
    layout = {"train__layout": "packed_prefix_shared"}
    straight, killed = (command("tdpo", tmp_path / name, **layout) for name in ("straight", "killed"))
    assert server.train(straight).status == 0
    place = (ENGINE + "trainer:Trainer._step", "before", 8)
    assert server.train(killed, fault(place, count=8)).status == -signal.SIGKILL
    finish(server, killed)
    assert_same_run(tmp_path / "killed", tmp_path / "straight")
    changed = command("tdpo", tmp_path / "changed", **layout)
    assert server.train(changed, fault(place, count=8)).status == -signal.SIGKILL
    finish(server, command("tdpo", tmp_path / "changed", train__layout="padded"))
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("straight", "changed")]
    for name, weight in weights[0].items():
        assert (weight - weights[1][name]).norm() <= 1e-4 * weight.norm(), name
    fed = [
        sum(line["tokens_processed"] for line in read_lines(path / "metrics.jsonl") if line["split"] == "train")
        for path in (tmp_path / "straight", uninterrupted("tdpo"))
    ]
    assert fed[0] < 0.8 * fed[1], "prompts were fed once"


def test_run_when_killed_in_the_middle_of_a_metrics_line_then_ends_bit_identical(
    server, command, uninterrupted, tmp_path
):
    argv = command("dpo", tmp_path / "run")
    ended = server.train(argv, {"at": ENGINE + "metrics:MetricsFile.write", "count": 8, "do": "HALF_LINE"})
    assert ended.status == -signal.SIGKILL
    finish(server, argv)
    assert_same_run(tmp_path / "run", uninterrupted("dpo"))


def test_run_when_killed_inside_the_export_then_exports_again(server, command, uninterrupted, tmp_path):
    argv = command("dpo", tmp_path / "run")
    seals = STEPS // 3 + 1
    ended = server.train(argv, {"at": "prefopt.storage:seal", "count": seals, "do": "SIGKILL"})
    assert ended.status == -signal.SIGKILL
    assert not (tmp_path / "run" / "model").exists()
    assert "resuming from" in finish(server, argv).out
    assert_same_run(tmp_path / "run", uninterrupted("dpo"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("method", registry.names())
def test_run_when_killed_at_random_places_then_ends_bit_identical(
    method, seed, server, command, uninterrupted, tmp_path
):
    kill_again_and_again(server, command(method, tmp_path / "run", **LONG), 10, f"{method} {seed}")
    assert_same_run(tmp_path / "run", uninterrupted(method, **LONG))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_run_when_killed_at_random_moments_then_ends_bit_identical(seed, server, command, uninterrupted, tmp_path):
    rng, argv = random.Random(seed), command("dpo", tmp_path / "run", **LONG)
    for _ in range(10):
        ended = server.train(argv, kill_after=rng.uniform(0.05, 0.8))
        assert ended.status in (0, -signal.SIGKILL), ended.err
    finish(server, argv)
    assert_same_run(tmp_path / "run", uninterrupted("dpo", **LONG))


# Signals that ask to save --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place", "step"),
    [
        ("SIGTERM", (ENGINE + "trainer:pair_stats", "before", 16), 5),
        ("SIGINT", (ENGINE + "trainer:Trainer._step", "before", 8), 7),
        ("SIGUSR1", (ENGINE + "evaluation:EvaluationLoop._score_pairs", "before", 3), 8),
        ("SIGTERM", ("prefopt.storage:seal", "before", 2), 6),
    ],
    ids=["SIGTERM in a step", "SIGINT between steps", "SIGUSR1 in an evaluation", "SIGTERM in a checkpoint"],
)
def test_run_when_asked_to_stop_then_saves_and_continues_to_the_same_weights(
    name, place, step, server, command, uninterrupted, tmp_path
):
    output = tmp_path / "run"
    argv = command("dpo", output)
    ended = server.train(argv, fault(place, name, count=place[2]))
    assert ended.status == EXIT_UNFINISHED
    assert ended.seconds < 20
    assert f"\n{name}: saving, then leaving with exit status 75; again to leave at once\n" in ended.out
    assert ended.out.endswith(f"\nleft at step {step} of {STEPS}; the same command continues\n")
    assert (output / "checkpoints" / f"step_{step:08d}" / "manifest.json").exists()
    assert not (output / "model").exists()
    assert f"resuming from {output}/checkpoints/step_{step:08d}\n" in finish(server, argv).out
    assert_same_run(output, uninterrupted("dpo"))


@pytest.mark.parametrize("place", ["prefopt.run.context:check_paths", "prefopt.data.encode:encode_file"])
def test_run_when_asked_to_stop_before_the_first_step_then_leaves_at_once(
    place, server, command, uninterrupted, tmp_path
):
    argv = command("dpo", tmp_path / "run")
    ended = server.train(argv, {"at": place, "do": "SIGTERM"})
    assert ended.status == EXIT_UNFINISHED
    assert ended.out.endswith("\nSIGTERM: nothing to save yet, leaving with exit status 75\n")
    assert ended.err == ""
    assert not (tmp_path / "run" / "checkpoints").exists()
    finish(server, argv)
    assert_same_run(tmp_path / "run", uninterrupted("dpo"))


def test_run_when_interrupted_where_a_checkpoint_was_just_written_then_does_not_write_it_again(
    server, command, tmp_path
):
    argv = command("dpo", tmp_path / "run", train__keep_last=1)
    written = tmp_path / "run" / "checkpoints" / "step_00000003" / "manifest.json"
    ended = server.train(argv, fault((ENGINE + "trainer:Trainer._step", "before", 4), "SIGTERM", count=4))
    assert ended.status == EXIT_UNFINISHED
    assert ended.out.endswith(f"\nleft at step 3 of {STEPS}; the same command continues\n")
    before = written.stat().st_ino
    # the same again with a kill where the second write would be: nothing is lost although one checkpoint is kept
    ended = server.train(argv, fault((ENGINE + "trainer:Trainer._step", "before", 1), "SIGTERM", count=1))
    assert ended.status == EXIT_UNFINISHED
    assert written.stat().st_ino == before


def test_finished_run_when_run_again_then_says_so_and_changes_nothing(server, command, uninterrupted):
    output = uninterrupted("dpo")
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file() and p.name != ".lock"}
    ended = server.train(command("dpo", output))
    assert ended.status == 0
    assert f"\n{output}: this run is finished; the model is in {output}/model\n" in ended.out
    assert "step/s" not in ended.err  # no step was taken
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_finished_run_when_its_model_is_damaged_then_exports_it_again(server, command, uninterrupted, tmp_path):
    argv = command("dpo", tmp_path / "run")
    finish(server, argv)
    weights = tmp_path / "run" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    finish(server, argv)
    assert_same_run(tmp_path / "run", uninterrupted("dpo"))


def test_run_prints_its_threads_and_uses_them(server, command, tmp_path):
    argv = command("dpo", tmp_path / "run", train__threads=2, train__max_steps=1)
    assert ", 2 CPU threads per rank; " in server.train(argv).out


# The launcher ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGKILL", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_run_when_its_launcher_dies_then_saves_and_leaves(name, server, command, task, tmp_path):
    import fcntl

    output = tmp_path / "run"
    argv = command("dpo", output, train__max_steps=2000, train__save_every=2000, eval__every=2000)
    launch = "accelerate.commands.accelerate_cli launch --num_processes 1 --num_machines 1 --cpu --mixed_precision no"
    script = Path(__file__).resolve().parents[2] / "scripts" / "train.py"
    env = os.environ | {"PREFOPT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "out.txt").open("w") as out:
        words = [sys.executable, "-m", *launch.split(), "--dynamo_backend", "no", str(script), *argv]
        launcher = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=env)
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert launcher.poll() is None, (tmp_path / "out.txt").read_text()
        assert time.monotonic() < deadline, (tmp_path / "out.txt").read_text()
        time.sleep(0.05)
    launcher.send_signal(getattr(signal, name))
    launcher.wait()
    began = time.monotonic()
    with (output / ".lock").open() as lock:
        while time.monotonic() < began + 20:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        else:
            pytest.fail("the orphan did not leave within 20 s")
    said = (tmp_path / "out.txt").read_text()
    assert "SIGTERM: saving, then leaving with exit status 75; again to leave at once\n" in said
    (checkpoint,) = (output / "checkpoints").iterdir()
    done = json.loads((checkpoint / "state.json").read_text())["step"]
    assert f"left at step {done} of 2000; the same command continues\n" in said
    assert 0 < done < 2000
    assert load_file(checkpoint / "model.safetensors")
    # the schedule is laid out for 2000 steps: the same command continues, another number is another run
    ended = server.train(command("dpo", output, train__max_steps=done + 2, eval__every=2000))
    assert ended.status == 2
    assert ended.err == (
        f"error: --output {output}: holds a run with other settings (train.max_steps: 2000 -> {done + 2}); "
        "choose another --output, or use the settings of that run to resume it\n"
    )
    fault = {"at": ENGINE + "trainer:Trainer._step", "count": 3, "do": "SIGTERM"}
    ended = server.train(argv, fault)
    assert ended.status == EXIT_UNFINISHED
    assert ended.out.endswith(f"\nleft at step {done + 2} of 2000; the same command continues\n")
