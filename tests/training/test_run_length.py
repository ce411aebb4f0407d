"""Runs that end after so many tokens or seconds, in one attempt or in several."""

import itertools
import json

import pytest

from prefopt.errors import ConfigError
from prefopt.settings import parse
from prefopt.training.metrics import read_lines
from prefopt.training.schedule import learning_rate
from prefopt.training.signals import EXIT_UNFINISHED

STEP = "prefopt.training.trainer:Trainer._step"
NO_STEPS = ("train.max_steps",)


def trained(output):
    return [line for line in read_lines(output / "metrics.jsonl") if line["split"] == "train"]


def test_run_when_tokens_end_it_then_the_step_that_reaches_them_is_the_last_and_the_rate_falls_with_them(
    server, command, tmp_path
):
    settings = {"train__max_tokens": 5000, "without": NO_STEPS, "optim__warmup_ratio": 0.2}
    assert server.train(command("dpo", tmp_path / "run", **settings)).status == 0
    lines = trained(tmp_path / "run")
    gone = list(itertools.accumulate(line["tokens_processed"] for line in lines))
    assert gone[-2] < 5000 <= gone[-1]
    assert (tmp_path / "run" / "checkpoints" / f"step_{len(lines):08d}").is_dir()
    for line, before, after in zip(lines, [0, *gone], gone, strict=False):
        share = min(1, after / 5000 / 0.2) if before < 1000 else 1 - (before / 5000 - 0.2) / 0.8
        assert line["learning_rate"] == pytest.approx(1e-2 * share)


def test_run_when_tokens_end_it_and_it_is_killed_then_it_ends_bit_identical_and_holds_what_counts_tokens(
    server, command, tmp_path
):
    settings = {"train__max_tokens": 4000, "without": NO_STEPS}
    straight, killed = (command("tdpo", tmp_path / name, **settings) for name in ("straight", "killed"))
    assert server.train(straight).status == 0
    assert server.train(killed, {"at": STEP, "count": 9, "do": "SIGKILL"}).status < 0
    changed = server.train(command("tdpo", tmp_path / "killed", **settings, train__micro_batch=3))
    assert changed.status == 2
    assert "train.micro_batch: 2 -> 3" in changed.err
    assert server.train(killed).status == 0
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("straight", "killed")]
    assert weights[0] == weights[1]
    assert [line["learning_rate"] for line in trained(tmp_path / "killed")] == [
        line["learning_rate"] for line in trained(tmp_path / "straight")
    ]


def test_run_when_seconds_end_it_then_those_of_all_attempts_count(server, command, tmp_path):
    argv = command("dpo", tmp_path / "run", train__max_seconds=4, without=NO_STEPS)
    assert server.train(argv, {"at": STEP, "count": 5, "do": "SIGTERM"}).status == EXIT_UNFINISHED
    first = sum(line["seconds"] for line in trained(tmp_path / "run"))
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000004" / "state.json").read_text())
    assert state["budget"]["seconds"] == pytest.approx(first)
    assert server.train(argv).status == 0
    seconds = [line["seconds"] for line in trained(tmp_path / "run")]
    assert sum(seconds[:-1]) < 4 <= sum(seconds)


def test_two_processes_when_seconds_end_their_run_then_they_end_it_together(server, command, tmp_path):
    argv = command("dpo", tmp_path / "run", train__max_seconds=0.3, without=NO_STEPS)
    ended = server.train(argv, ranks=2)
    assert ended.status == 0, ended.err
    seconds = [line["seconds"] for line in trained(tmp_path / "run")]
    assert sum(seconds[:-1]) < 0.3 <= sum(seconds)


def test_rate_when_warm_up_is_counted_in_steps_or_epochs_are_named_then_they_hold():
    def ten(epochs):
        return int(10 * epochs)

    model = ["--method", "dpo", "--model.path", "m", "--data.train", "p.jsonl", "--optim.lr", "1"]
    steps = parse([*model, "--train.max_tokens", "100", "--optim.warmup_steps", "2"])
    rates = [learning_rate(steps, ten, step, gone) for step, gone in enumerate([(0, 0.1), (0.1, 0.5), (0.5, 0.9)])]
    assert rates == pytest.approx([0.5, 1, 0.5])
    epochs = parse([*model, "--train.max_tokens", "100", "--train.schedule_epochs", "2", "--optim.warmup_ratio", "0"])
    assert learning_rate(epochs, ten, 5, (0.9, 1)) == pytest.approx(1 - 5 / 20)
    constant = parse([*model, "--train.max_seconds", "9", "--optim.schedule", "constant", "--optim.warmup_ratio", "1"])
    assert learning_rate(constant, ten, 5, (0.25, 0.5)) == pytest.approx(0.5)


def test_testbed_stream_may_be_ended_by_tokens_or_seconds():
    assert parse(["--method", "dpo", "--train.max_tokens", "1e6"]).train.max_steps is None
    assert parse(["--method", "dpo", "--train.max_seconds", "60"]).train.max_steps is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--train.max_tokens", "0"], "train.max_tokens: found 0, expected a number > 0, or none"),
        (["--train.max_seconds", "inf"], "train.max_seconds: found inf, expected a number > 0, or none"),
        (
            ["--train.max_steps", "5", "--train.max_tokens", "9"],
            "train.max_tokens: given with train.max_steps, but only one can end a run; leave one out",
        ),
        (
            ["--train.max_seconds", "5", "--train.max_tokens", "9"],
            "train.max_seconds: given with train.max_tokens, but only one can end a run; leave one out",
        ),
    ],
)
def test_budget_that_makes_no_sense_is_refused(flags, expected):
    with pytest.raises(ConfigError) as found:
        parse(["--method", "dpo", *flags])
    assert str(found.value) == expected
