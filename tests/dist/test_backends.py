"""Whole runs of two processes under each backend: what one process does, saved, continued, exported."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prefopt.training.metrics import read_lines
from tests.fork_server import BACKENDS

SHORT = {"train__max_steps": 6, "train__save_every": 3, "eval__every": 3, "optim__name": "sgd", "optim__lr": 0.1}


def weights(output, folder="model"):
    files = sorted((output / folder).glob("*model*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def update_gap(expected, found, start):
    """||d - d1|| / ||d1|| of the update, all weights together."""
    names = sorted(expected)
    apart = sum(float((expected[n] - found[n]).double().norm() ** 2) for n in names) ** 0.5
    moved = sum(float((expected[n] - start[n]).double().norm() ** 2) for n in names) ** 0.5
    assert moved > 0
    return apart / moved


@pytest.fixture(scope="module")
def alone(server, command, tmp_path_factory):
    """The output folder of a run of one process."""
    done = {}

    def run(method, **settings):
        key = (method, *settings.items())
        if key not in done:
            output = tmp_path_factory.mktemp("alone") / "run"
            ended = server.train(command(method, output, **settings))
            assert ended.status == 0, ended.err
            done[key] = output
        return done[key]

    return run


@pytest.mark.parametrize("backend", BACKENDS)
def test_run_of_two_processes_is_the_run_of_one(backend, server, command, task, alone, tmp_path):
    adam = {**SHORT, "train__max_shard_mb": 0.02, "optim__name": "adamw", "optim__lr": 1e-3, "optim__args.eps": 1e-6}
    straight = alone("tdpo", **adam)
    argv = command("tdpo", tmp_path / "run", **adam)
    stop = {"at": "prefopt.training.trainer:Trainer._step", "count": 5, "do": "SIGKILL"}
    assert server.train(argv, stop, ranks=2, backend=backend).status == -9
    ended = server.train(argv, ranks=2, backend=backend)
    assert ended.status == 0, ended.err
    assert f"world size 2, backend {backend}, device cpu" in ended.out
    assert "resuming from" in ended.out
    for mine, other in zip(read_lines(tmp_path / "run/metrics.jsonl"), read_lines(straight / "metrics.jsonl"), strict=True):
        assert (mine["step"], mine["split"]) == (other["step"], other["split"])
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
    start = load_file(task.model / "model.safetensors")
    assert update_gap(weights(straight), weights(tmp_path / "run"), start) <= 1e-3
    exported = weights(tmp_path / "run")
    assert exported.keys() == start.keys()
    for name, value in AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").named_parameters():
        assert torch.equal(value, exported[name])
    last = tmp_path / "run/checkpoints/step_00000006"
    assert len(list(last.glob("model-*.safetensors"))) > 2  # which the processes wrote in turn
    assert len(list(last.glob("optimizer-*.safetensors"))) > 2
    kept = weights(tmp_path / "run", last)
    assert all(torch.equal(kept[name], exported[name]) for name in exported)
    assert json.loads((tmp_path / "run/run_card.json").read_text())["backend"] == backend
