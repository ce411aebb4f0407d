"""Callbacks: the order of their hooks, their errors, and exact resume with their state."""

import json
import signal
from pathlib import Path

import pytest

from prefopt.errors import ConfigError
from prefopt.training import callbacks
from prefopt.training.metrics import WALL_CLOCK_KEYS, read_lines

CLASSES = "tests.training.callback_classes."
SHORT = {"train__max_steps": 6, "train__save_every": 3, "eval__every": 4}


def named(*names):
    return {"train__callbacks": ",".join(CLASSES + name for name in names)}


def hooks(output):
    return [json.loads(line) for line in (output / "hooks.jsonl").read_text().splitlines()]


def weights(output):
    return (output / "model/model.safetensors").read_bytes()


def lines_of(output):
    lines = read_lines(output / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in WALL_CLOCK_KEYS} for line in lines]


@pytest.fixture(scope="module")
def straight(server, command, tmp_path_factory):
    """A run with callbacks that nothing interrupted."""
    output = tmp_path_factory.mktemp("straight") / "run"
    ended = server.train(command("dpo", output, **SHORT, **named("Recorder", "Mean")))
    assert ended.status == 0, ended.err
    return output


def test_hooks_are_called_in_the_order_of_the_loop(straight):
    pairs = hooks(straight)[1][2]["pairs"]
    assert hooks(straight) == [
        ["on_start", 0, {"resumed": False}],
        ["on_evaluation", 0, {"pairs": pairs}],
        *(["on_step", step, {}] for step in (1, 2, 3)),
        ["on_save", 3, {"complete": True, "last": False}],
        ["on_step", 4, {}],
        ["on_evaluation", 4, {"pairs": pairs}],
        *(["on_step", step, {}] for step in (5, 6)),
        ["on_evaluation", 6, {"pairs": pairs}],
        ["on_save", 6, {"complete": True, "last": True}],
        ["on_end", 6, {"outcome": "finished", "model": "model"}],
    ]


def test_callbacks_change_nothing_of_the_training(straight, server, command, tmp_path):
    ended = server.train(command("dpo", tmp_path / "run", **SHORT))
    assert ended.status == 0, ended.err
    assert weights(tmp_path / "run") == weights(straight)
    assert lines_of(tmp_path / "run") == lines_of(straight)


@pytest.mark.parametrize(
    ("place", "count", "do", "status"),
    [
        ("trainer:Trainer._step", 5, "SIGKILL", -signal.SIGKILL),
        ("checkpoint:_write_folder", 2, "SIGKILL", -signal.SIGKILL),
        ("trainer:Trainer._step", 5, "SIGTERM", 75),
    ],
)
def test_callback_with_state_when_the_run_is_killed_resumes_exactly(
    place, count, do, status, straight, server, command, tmp_path
):
    argv = command("dpo", tmp_path / "run", **SHORT, **named("Recorder", "Mean"))
    assert server.train(argv, {"at": f"prefopt.training.{place}", "count": count, "do": do}).status == status
    ended = server.train(argv)
    assert ended.status == 0, ended.err
    assert (tmp_path / "run/mean.json").read_text() == (straight / "mean.json").read_text()
    assert json.loads((straight / "mean.json").read_text())[0] == 6
    assert weights(tmp_path / "run") == weights(straight)
    assert lines_of(tmp_path / "run") == lines_of(straight)
    resumed = [entry for entry in hooks(tmp_path / "run") if entry[0] == "on_start"]
    assert [more["resumed"] for _, _, more in resumed] == [False, True]
    ends = [entry[2]["outcome"] for entry in hooks(tmp_path / "run") if entry[0] == "on_end"]
    assert ends == (["interrupted", "finished"] if status == 75 else ["finished"])


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_error_in_a_hook_is_one_line_that_names_the_callback(ranks, server, command, tmp_path):
    ended = server.train(command("dpo", tmp_path / "run", **SHORT, **named("Recorder", "Raises")), ranks=ranks)
    assert ended.status == 2
    *_, last = ended.err.replace("\r", "\n").splitlines()
    where = " (rank 1)" if ranks == 2 else ""
    assert last.startswith(
        f"error: callback {CLASSES}Raises: on_step at step 3 failed: ZeroDivisionError: no line (callback_classes.py:"
    )
    assert last.endswith(f"){where}")
    assert hooks(tmp_path / "run")[-1] == ["on_end", 3, {"outcome": "failed", "model": None}]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_callback_that_stops_the_run_ends_it_with_an_evaluation_and_a_checkpoint(ranks, server, command, tmp_path):
    settings = {**SHORT, "train__max_steps": 24, **named("StopAt5")}
    argv = command("dpo", tmp_path / "run", **settings)
    killed = {"at": "prefopt.training.trainer:Trainer._export", "do": "SIGKILL"}
    assert server.train(argv, killed, ranks=ranks).status == -signal.SIGKILL
    ended = server.train(argv, ranks=ranks)
    assert ended.status == 0, ended.err
    assert "stopped at step 5 of 24: five are enough\n" in ended.out
    lines = lines_of(tmp_path / "run")
    assert [(line["step"], line["split"]) for line in lines[-2:]] == [(5, "train"), (5, "eval")]
    assert (tmp_path / "run/checkpoints/step_00000005/manifest.json").is_file()
    assert weights(tmp_path / "run")
    longer = server.train(command("dpo", tmp_path / "run", **settings | {"train__max_steps": 30}), ranks=ranks)
    assert longer.status == 2
    assert "holds a run that a callback stopped before its full length (five are enough);" in longer.err


@pytest.mark.parametrize(
    ("name", "fault", "line"),
    [
        ("NoJson", None, "state_dict failed: TypeError: Object of type object is not JSON serializable"),
        ("Unfit", {"at": "prefopt.training.trainer:Trainer._step", "count": 5, "do": "SIGKILL"}, "load_state_dict"),
    ],
)
def test_state_that_does_not_fit_is_one_line(name, fault, line, server, command, tmp_path):
    argv = command("dpo", tmp_path / "run", **SHORT, **named(name))
    if fault is not None:
        assert server.train(argv, fault).status == -signal.SIGKILL
    ended = server.train(argv)
    assert ended.status == 2
    assert f"error: callback {CLASSES}{name}: {line}" in ended.err.replace("\r", "\n")


def test_other_callbacks_than_those_of_the_run_are_refused(straight, server, command):
    ended = server.train(command("dpo", straight, **SHORT, **named("Mean")))
    assert ended.status == 2
    assert "holds a run with other settings (train.callbacks: " in ended.err


def test_name_that_is_no_callback_is_refused_before_the_model_is_loaded(server, command, tmp_path):
    ended = server.train(command("dpo", tmp_path / "run", model__path="no/model", train__callbacks="nowhere.Mine"))
    assert ended.status == 2
    assert ended.err.startswith("error: train.callbacks: 'nowhere.Mine': no module named 'nowhere' (looked in ")


@pytest.mark.parametrize(
    ("paths", "line"),
    [
        ([CLASSES + "Gone"], "train.callbacks: module 'tests.training.callback_classes' has no class 'Gone'"),
        ([CLASSES + "NoCallback"], "is no subclass of prefopt.training.callbacks.Callback"),
        ([CLASSES + "NeedsArguments"], "cannot be constructed without arguments: TypeError: "),
        ([CLASSES + "Mean"] * 2, f"train.callbacks: '{CLASSES}Mean' is given twice"),
        (["mine.py:Log"], "train.callbacks: found 'mine.py:Log', expected a class by dotted path"),
        (["mine:Log"], "such as my_callbacks.Mine; did you mean 'mine.Log'?"),
        (["Log"], "train.callbacks: found 'Log', expected a class by dotted path, such as my_callbacks.Mine"),
    ],
)
def test_name_that_is_no_callback_is_one_line(paths, line):
    with pytest.raises(ConfigError) as caught:
        callbacks.load(paths)
    assert line in str(caught.value)


def test_module_that_fails_to_import_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken_callbacks.py").write_text("import json\n1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        callbacks.load(["broken_callbacks.Mine"])
    assert str(caught.value) == (
        "train.callbacks: importing 'broken_callbacks.Mine' failed: ZeroDivisionError: division by zero "
        "(broken_callbacks.py:2)"
    )


def test_the_example_of_the_page_is_the_file():
    root = Path(__file__).resolve().parents[2]
    assert (root / "examples/log_every_step.py").read_text() in (root / "docs/tracking.md").read_text()
