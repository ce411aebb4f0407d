"""The model that is exported is that of the best evaluation, where one is asked for."""

import json
import signal

import pytest
from safetensors.torch import load_file

from prefopt.errors import ConfigError
from prefopt.settings import parse
from prefopt.training.best_checkpoint import Selection
from prefopt.training.metrics import WALL_CLOCK_KEYS, read_lines


def weights(run):
    return load_file(run / "model/model.safetensors")


def equal(one, other):
    return all((one[name] == other[name]).all() for name in one)


def evaluations(run, name):
    lines = read_lines(run / "metrics.jsonl")
    return {line["step"]: line[name] for line in lines if line["split"] == "eval" and line["step"] > 0}


@pytest.fixture
def train(server, command, tmp_path):
    def train(name, status=0, fault=None, **flags):
        ended = server.train(command("dpo", tmp_path / name, **flags), fault)
        assert ended.status == status, ended.err
        return tmp_path / name, ended

    return train


@pytest.mark.parametrize(
    ("metric", "better", "direction"),
    [
        ("rewards/rejected", max, ""),
        ("logps/chosen", min, ":min"),
        pytest.param("loss", min, "", marks=pytest.mark.slow),
        pytest.param("logps/chosen", max, ":max", marks=pytest.mark.slow),
    ],
)
def test_model_of_the_best_evaluation_is_exported(metric, better, direction, train):
    flags = {"eval__every": 2, "train__save_every": 2, "train__keep_last": 20}
    run, ended = train("best", eval__select=metric + direction, **flags)
    found = evaluations(run, metric)
    best = better(found, key=lambda step: found[step])
    assert f"exported: the model of step {best}, with the best {metric}: " in ended.out
    assert equal(weights(run), load_file(run / f"checkpoints/step_{best:08d}/model.safetensors"))
    if metric == "rewards/rejected":
        assert best < 24, "this test would not tell the best from the last"
    assert not (run / "best").exists()
    assert not (run / "model/selected.json").exists()
    last, _ = train("last", **flags)
    assert evaluations(last, metric) == found, "choosing changes nothing of the training"
    assert equal(weights(last), load_file(run / "checkpoints/step_00000024/model.safetensors"))
    if metric == "loss":  # no copy of the best is left in a finished run
        (run / "model/model.safetensors").write_bytes(b"cut")
        _, ended = train("best", status=2, eval__select=metric, **flags)
        assert f"error: {run / 'model'}: is damaged (model.safetensors has 3 bytes" in ended.err


@pytest.mark.parametrize("count", [5, pytest.param(2, marks=pytest.mark.slow)])
def test_choosing_when_killed_then_ends_with_the_same_model(train, count):
    straight, _ = train("straight", eval__select="loss", optim__lr=0.03)
    at = {"at": "prefopt.training.best_model:BestModel.save_if_best", "when": "after", "count": count, "do": "SIGKILL"}
    run, _ = train("run", status=-signal.SIGKILL, fault=at, eval__select="loss", optim__lr=0.03)
    train("run", eval__select="loss", optim__lr=0.03)
    assert equal(weights(run), weights(straight))
    assert json.loads((run / "model/manifest.json").read_text()) == json.loads(
        (straight / "model/manifest.json").read_text()
    )


def test_choosing_when_another_attempt_finds_another_best_then_that_of_the_undone_attempt_is_not_exported(train):
    """Killed after step 8, the best so far, and continued from step 6 to another loss at step 8 than it had before."""
    flags = {"eval__select": "loss", "train__max_steps": 8}
    at = {"at": "prefopt.training.best_model:BestModel.save_if_best", "when": "after", "count": 3, "do": "SIGKILL"}
    run, _ = train("run", status=-signal.SIGKILL, fault=at, **flags)
    assert sorted(path.name for path in (run / "best").iterdir()) == ["step_00000004", "step_00000008"]
    fourth = (run / "best/step_00000004/model.safetensors").read_bytes()
    _, ended = train(
        "run", fault={"at": "prefopt.training.metrics:MetricsFile.write", "count": 3, "do": "WORSE"}, **flags
    )
    assert "exported: the model of step 4, with the best loss: " in ended.out
    assert (run / "model/model.safetensors").read_bytes() == fourth
    assert not (run / "best").exists()


def test_choosing_when_the_best_so_far_is_damaged_then_refused_before_the_first_step(train):
    flags = {"eval__select": "loss", "train__max_steps": 8}
    at = {"at": "prefopt.training.trainer:Trainer._step", "count": 8, "do": "SIGTERM"}
    run, _ = train("run", status=75, fault=at, **flags)
    weights = run / "best/step_00000004/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    lines = (run / "metrics.jsonl").read_bytes()
    _, ended = train("run", status=2, **flags)
    assert ended.err.startswith(f"error: {run}/best/step_00000004: the model that eval.select chose is damaged or miss")
    assert (run / "metrics.jsonl").read_bytes() == lines
    weights.write_bytes(content)
    train("run", **flags)


def test_metric_that_no_evaluation_has_is_named_before_the_first_step(train):
    run, ended = train("run", status=2, eval__select="rewards/accuracy")
    assert "eval.select: found 'rewards/accuracy', expected a metric of the evaluations: " in ended.err
    assert "did you mean 'rewards/accuracies'?" in ended.err
    assert all(line["step"] == 0 for line in read_lines(run / "metrics.jsonl"))


# A metric that is best early here and gets worse from there on, so that patience ends.
FALLING = {"eval__select": "rewards/rejected", "eval__every": 2, "eval__patience": 2, "train__save_every": 4}


def lines_of(run):
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK_KEYS} for line in read_lines(run / "metrics.jsonl")]


@pytest.fixture
def stopped(train):
    run, ended = train("straight", **FALLING)
    found = evaluations(run, "rewards/rejected")
    best = max(found, key=lambda step: found[step])
    at = list(found)[-1]
    assert at == best + 4 < 24, "two evaluations after the best one"
    assert f"stopped at step {at} of 24: no better rewards/rejected in 2 evaluations" in ended.out
    assert f"exported: the model of step {best}, with the best rewards/rejected: " in ended.out
    assert (run / f"checkpoints/step_{at:08d}/manifest.json").exists()
    return run, at


def test_run_without_patience_left_ends_as_a_finished_one(stopped, train):
    run, at = stopped
    assert [line["step"] for line in lines_of(run) if line["split"] == "train"] == list(range(1, at + 1))
    _, again = train("straight", **FALLING)
    assert f"{run}: this run is finished; the model is in {run}/model" in again.out


@pytest.mark.parametrize(
    ("place", "when", "count"),
    [
        ("patience:Patience.on_evaluation", "after", 3),
        ("trainer:Trainer._save", "before", -1),  # stopped, but not saved yet
        pytest.param("trainer:Trainer._export", "before", 1, marks=pytest.mark.slow),
        pytest.param("trainer:Trainer._step", "before", 5, marks=pytest.mark.slow),
    ],
)
def test_run_without_patience_left_when_killed_ends_the_same(place, when, count, stopped, train):
    straight, at = stopped
    count = -(-at // 4) if count < 0 else count  # the last one
    do = {"at": f"prefopt.training.{place}", "when": when, "count": count, "do": "SIGKILL"}
    run, _ = train("run", status=-signal.SIGKILL, fault=do, **FALLING)
    train("run", **FALLING)
    assert equal(weights(run), weights(straight))
    assert lines_of(run) == lines_of(straight)
    assert json.loads((run / "model/manifest.json").read_text()) == json.loads(
        (straight / "model/manifest.json").read_text()
    )


def test_two_processes_run_out_of_patience_together(server, command, tmp_path):
    ended = server.train(command("dpo", tmp_path / "run", **FALLING), ranks=2)
    assert ended.status == 0, ended.err
    assert "no better rewards/rejected in 2 evaluations" in ended.out


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--eval.patience", "2"], "eval.patience: found 2, but no metric to improve is given; set eval.select"),
        (["--eval.select", "loss", "--eval.patience", "0"], "eval.patience: found 0, expected a number > 0, or none"),
        (
            ["--eval.select", "kl/chosen:least"],
            "eval.select: found 'kl/chosen:least', expected a metric, optionally with a direction, e.g. kl/chosen:min "
            "or kl/chosen:max",
        ),
        (["--eval.select", ":min"], "eval.select: found ':min', expected a metric"),
        (["--rounds.count", "2", "--eval.patience", "2"], "set rounds.select_prompts"),
    ],
)
def test_bad_settings_of_choosing_are_one_line(argv, line):
    with pytest.raises(ConfigError) as caught:
        parse(["--method", "dpo", *argv])
    assert line in str(caught.value)


def test_selection_knows_the_best_and_how_long_it_is_ago():
    lines = [
        {"step": step, "split": split, **({"loss": value} if value is not None else {})}
        for step, split, value in [
            (0, "eval", 0.0),
            (1, "train", 0.1),
            (2, "eval", 3.0),
            (4, "eval", 1.0),
            (6, "eval", float("nan")),
            (8, "eval", 1.0),
            (10, "eval", None),
        ]
    ]
    assert (Selection.of("loss").best(lines), Selection.of("loss").stale(lines)) == (4, 3)
    assert (Selection.of("loss:max").best(lines), Selection.of("loss:max").stale(lines)) == (2, 4)
    assert (Selection.of("other").best(lines), Selection.of("other").stale(lines)) == (None, 5)
    assert Selection.of("loss/nll") == Selection("loss/nll", True)
    assert Selection.of("kl/chosen") == Selection("kl/chosen", False)
    assert Selection.of("kl/chosen:min") == Selection("kl/chosen", True)
