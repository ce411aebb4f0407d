"""The train command under each launcher: two real processes, joined, with the weights of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefopt.training.metrics import WALL_CLOCK_KEYS, read_lines
from tests.dist.ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TWO = {
    "accelerate": lambda port: [
        *(*ACCELERATE, "--config_file", "configs/accelerate/cpu.yaml", "--num_processes", "2"),
        *("--main_process_port", port, "scripts/train.py"),
    ],
    "torchrun": lambda port: [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
        *("--master_port", port, "scripts/train.py"),
    ],
}
STEPS = 3


@pytest.fixture(scope="module")
def train(task, command, tmp_path_factory):
    """Runs the train command behind the words of a launcher; gives (output folder, first line, all that was said)."""

    def train(launcher):
        output = tmp_path_factory.mktemp("launched") / "run"
        # 11 pairs a step: the last micro-batch of one process is smaller
        settings = {"train__max_steps": STEPS, "train__global_batch": 11, "train__micro_batch": 3, "eval__every": 2}
        argv = command("tdpo", output, optim__lr=1e-3, **settings)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_"))}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PREFOPT_CACHE": str(task.folder / "cache")}
        environment |= {"CUDA_VISIBLE_DEVICES": ""}
        run = [*launcher, *argv]
        done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return output, done.stdout.splitlines()[0], done.stdout

    return train


@pytest.fixture(scope="module")
def alone(train):
    return train([sys.executable, "scripts/train.py"])


def comparable(output):
    """The metrics without what depends on the machine."""
    return [
        {k: v for k, v in line.items() if k not in WALL_CLOCK_KEYS} for line in read_lines(output / "metrics.jsonl")
    ]


def test_script_when_run_alone_then_one_process_says_so_and_finishes(alone):
    output, first, said = alone
    assert first.startswith("prefopt: world size 1, backend single process, device cpu, method tdpo (tdpo2, alpha 0.5")
    assert f"finished: model in {output}/model" in said
    assert [(line["split"], line["step"]) for line in comparable(output)] == [
        ("eval", 0),
        ("train", 1),
        ("train", 2),
        ("eval", 2),
        ("train", 3),
        ("eval", 3),
    ]


def test_package_when_run_as_a_module_then_it_is_the_same_command(alone, train):
    output, first, _ = train([sys.executable, "-m", "prefopt", "train"])
    assert first == alone[1]
    assert comparable(output) == comparable(alone[0])
    for name, weight in load_file(output / "model/model.safetensors").items():
        assert torch.equal(weight, load_file(alone[0] / "model/model.safetensors")[name])


@pytest.mark.parametrize("launcher", TWO)
def test_launcher_when_asked_for_two_processes_then_they_join_and_train_what_one_trains(launcher, alone, train):
    output, first, said = train(TWO[launcher](str(free_port())))
    assert first.startswith("prefopt: world size 2, backend ddp, device cpu, method tdpo")
    assert said.count("prefopt: ") == 1, "only the first process speaks"
    expected, found = comparable(alone[0]), comparable(output)
    assert [(line["split"], line["step"]) for line in found] == [(line["split"], line["step"]) for line in expected]
    for mine, other in zip(expected, found, strict=True):
        assert mine.pop("split") == other.pop("split")
        mine.pop("padding_fraction", None), other.pop("padding_fraction", None)  # which pairs share a pass is no process's result
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6), mine["step"]
    weights, others = (load_file(folder / "model/model.safetensors") for folder in (alone[0], output))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert (weight - others[name]).norm() <= 1e-5 * weight.norm(), name
