"""Optimizer and weights kept in the host's memory or on NVMe: the run of one process, continued bit for bit."""

import json
import os
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from prefopt.training.metrics import read_lines
from tests.dist.test_backends import update_gap, weights
from tests.fork_server import ROOT
from tests.helpers import tiny_llama

SHORT = {"train__max_steps": 6, "train__save_every": 3, "eval__every": 3, "optim__args.eps": 1e-6}
KILLED = {"at": "prefopt.training.trainer:Trainer._step", "count": 5, "do": "SIGKILL"}
KEPT = {"reference__cache": "hidden", "reference__cache_dtype": "float32"}


@pytest.fixture
def compared(server, command, tmp_path):
    """Trains in one process, and offloading in two, straight and killed; the three must agree. Gives what was said."""

    def run(model, said, *, backend, environment=None, **settings):
        settings = {**SHORT, "model__path": model, **settings}
        offloading = {"ranks": 2, "backend": backend, "environment": environment}
        for name, how, fault in (("alone", {}, None), ("straight", offloading, None), ("killed", offloading, KILLED)):
            argv = command("tdpo", tmp_path / name, **settings)
            if fault is not None:
                assert server.train(argv, fault, **how).status == -9
            ended = server.train(argv, **how)
            assert ended.status == 0, ended.err
        assert f"world size 2, backend {said}, device cpu" in ended.out
        assert "resuming from" in ended.out
        assert json.loads((tmp_path / "killed/run_card.json").read_text())["backend"] == said
        lines = [read_lines(tmp_path / name / "metrics.jsonl") for name in ("alone", "killed")]
        for one, other in zip(*lines, strict=True):
            assert (one["step"], one["split"]) == (other["step"], other["split"])
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5), one["step"]
        alone, straight, killed = (weights(tmp_path / name) for name in ("alone", "straight", "killed"))
        assert update_gap(alone, killed, load_file(model / "model.safetensors")) <= 1e-3
        assert all(killed[name].equal(weight) for name, weight in straight.items())

    return run


def test_run_that_offloads_to_the_hosts_memory_is_the_run_of_one_process(compared, task):
    compared(task.model, "zero3 (optimizer on cpu, weights on cpu)", backend="zero3_offload")


# NVMe -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def large(task, tmp_path):
    """A model of matrices that are worth swapping: DeepSpeed leaves parts under 1 MiB in memory."""
    folder = tmp_path / "large"
    tiny_llama(len(task.tokenizer), hidden=512, layers=1).save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def nvme(tmp_path):
    """The environment of a run that offloads to a folder, which is made. Skips where DeepSpeed's part is not built."""
    pytest.importorskip("deepspeed")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io cannot be built here: it needs libaio (libaio-dev) and a C++ compiler")
    return on_nvme(tmp_path / "nvme")


def on_nvme(folder):
    folder.mkdir()
    found = {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": str(folder)}
    return found | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # ninja, which builds it


def weights_on_nvme(folder):
    """The environment that names settings which put the weights there too, as a file."""
    settings = json.loads((ROOT / "configs/deepspeed/zero3_nvme.json").read_text())
    place = {"device": "nvme", "nvme_path": str(folder / "nvme"), "buffer_size": 10**6}
    settings["zero_optimization"]["offload_param"] = place
    (folder / "nvme.json").write_text(json.dumps(settings))
    return {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(folder / "nvme.json")}


def swapped(folder):
    return {path.name.partition("-")[0] for path in (folder / "nvme").rglob("*.swp")}


@pytest.mark.slow  # async_io is compiled by the first run, in minutes
def test_run_that_offloads_its_optimizer_to_nvme_is_the_run_of_one_process(compared, large, nvme, tmp_path):
    said = "zero3 (optimizer on nvme, weights on cpu)"
    compared(large, said, backend="zero3_nvme", environment=nvme, optim__lr=3e-5)
    assert {"exp_avg", "exp_avg_sq"} <= swapped(tmp_path)


@pytest.mark.slow
def test_run_that_offloads_its_weights_to_nvme_too_is_the_run_of_one_process(compared, large, nvme, tmp_path):
    said = "zero3 (optimizer on nvme, weights on nvme)"
    environment = nvme | weights_on_nvme(tmp_path)
    compared(large, said, backend="zero3_nvme", environment=environment, optim__lr=3e-5, **KEPT)
    assert any(name.endswith("_param.tensor.swp") for name in swapped(tmp_path))


@pytest.mark.slow
def test_weights_of_two_models_on_nvme_are_refused_in_one_line(server, command, nvme, tmp_path):
    environment = nvme | weights_on_nvme(tmp_path)
    ended = server.train(command("tdpo", tmp_path / "run"), ranks=2, backend="zero3_nvme", environment=environment)
    assert ended.status == 2
    assert ended.err.splitlines()[-1] == (
        "error: launcher: found weights offloaded to nvme, where DeepSpeed supports one model only, and the "
        "reference is a second one; expected weights on cpu (configs/accelerate/zero3_nvme.yaml), LoRA, or "
        "--reference.cache hidden"
    )


@pytest.mark.parametrize("path", [None, "missing"])
def test_folder_on_nvme_that_is_not_there_is_refused_in_one_line(path, server, command, tmp_path):
    environment = {} if path is None else {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": str(tmp_path / path)}
    ended = server.train(command("dpo", tmp_path / "run"), ranks=2, backend="zero3_nvme", environment=environment)
    assert ended.status == 2
    said = ended.err.splitlines()[-1]
    assert said.startswith("error: launcher: rank 0 on ")
    assert f"offloads the optimizer to nvme_path '{path and tmp_path / path or 'none'}', expected a" in said
    assert said.endswith('(ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH where DeepSpeed\'s file has "auto")')


def test_machine_where_async_io_cannot_be_built_is_refused_in_one_line(server, command, tmp_path):
    environment = on_nvme(tmp_path / "nvme") | {"LDFLAGS": "-fuse-ld=none"}  # nothing can be linked, nor libaio
    ended = server.train(command("dpo", tmp_path / "run"), ranks=2, backend="zero3_nvme", environment=environment)
    assert ended.status == 2
    said = ended.err.splitlines()[-1]
    assert "cannot build DeepSpeed's async_io, which NVMe offload needs; install libaio (apt-get install" in said
