"""The model that is exported is that of the best evaluation, where one is asked for."""

import json
import signal

import pytest
from safetensors.torch import load_file

from prefopt.engine.metrics import read_lines


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


@pytest.mark.parametrize(("metric", "better"), [("loss", min), ("rewards/rejected", max)])
def test_model_of_the_best_evaluation_is_exported(metric, better, train):
    flags = {"eval__every": 2, "train__save_every": 2, "train__keep_last": 20}
    run, ended = train("best", eval__select=metric, **flags)
    found = evaluations(run, metric)
    best = better(found, key=lambda step: found[step])
    assert f"exported: the model of step {best}, with the best {metric}: " in ended.out
    assert equal(weights(run), load_file(run / f"checkpoints/step_{best:08d}/model.safetensors"))
    if metric != "loss":
        assert best < 24, "this test would not tell the best from the last"
    assert not (run / "best").exists()
    assert not (run / "model/selected.json").exists()
    last, _ = train("last", **flags)
    assert evaluations(last, metric) == found, "choosing changes nothing of the training"
    assert equal(weights(last), load_file(run / "checkpoints/step_00000024/model.safetensors"))


@pytest.mark.parametrize("count", [2, 5])
def test_choosing_when_killed_then_ends_with_the_same_model(train, count):
    straight, _ = train("straight", eval__select="loss", optim__lr=0.03)
    at = {"at": "prefopt.engine.trainer:Trainer._keep_if_best", "when": "after", "count": count, "do": "SIGKILL"}
    run, _ = train("run", status=-signal.SIGKILL, fault=at, eval__select="loss", optim__lr=0.03)
    train("run", eval__select="loss", optim__lr=0.03)
    assert equal(weights(run), weights(straight))
    assert json.loads((run / "model/manifest.json").read_text()) == json.loads(
        (straight / "model/manifest.json").read_text()
    )


def test_metric_that_no_evaluation_has_is_named_before_the_first_step(train):
    run, ended = train("run", status=2, eval__select="rewards/accuracy")
    assert "eval.select: found 'rewards/accuracy', expected a metric of the evaluations: " in ended.err
    assert "did you mean 'rewards/accuracies'?" in ended.err
    assert all(line["step"] == 0 for line in read_lines(run / "metrics.jsonl"))
