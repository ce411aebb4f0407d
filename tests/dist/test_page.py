"""The commands of docs/distributed.md that lead from a single process to two nodes, with two ranks on this machine.

The fifth is a job; tests/slurm/test_readme.py submits its like to a real Slurm.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.ranks import free_port
from tests.fork_server import ROOT

PAGE = (ROOT / "docs/distributed.md").read_text()
COMMANDS = re.search(r"## From a single process to two nodes\n.*?```bash\n(.*?)```", PAGE, re.DOTALL)[1].strip().splitlines()
NAMES = ["alone", "ddp", "zero3", "nodes", "job"]


def at_our_size(command, port, output, config):
    """The words of a command of the page, with two processes and a small run."""
    command = command.partition("  #")[0]
    command = command.replace("--num_processes 8", f"--num_processes 2 --main_process_port {port}")
    command = command.replace("--nproc_per_node 8", "--nproc_per_node 1").replace("HOST:29500", f"127.0.0.1:{port}")
    words = command.replace("my.yaml", str(config)).split()
    programs = {"python": [], "accelerate": ["-m", "accelerate.commands.accelerate_cli"]}
    programs |= {"torchrun": ["-m", "torch.distributed.run"]}
    return [sys.executable, *programs[words[0]], *words[1:], "--output", str(output)]


@pytest.fixture(scope="module")
def run(task, command, tmp_path_factory):
    """Runs the command with a name; gives (the weights, what was said)."""
    folder, done = tmp_path_factory.mktemp("page"), {}
    config = folder / "my.yaml"
    words = command("tdpo", folder, train__max_steps=3, optim__name="sgd", optim__lr=0.1)
    pairs = [(word, words[at + 1]) for at, word in enumerate(words) if word.startswith("--")]
    own = ("--method", "--output")
    config.write_text("".join(f"{word[2:]}: {value}\n" for word, value in pairs if word not in own))
    known = ("ACCELERATE_", "MASTER_", "FSDP_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(known)}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PREFOPT_CACHE": str(folder / "cache")}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}

    def run(name):
        if name not in done:
            words = at_our_size(COMMANDS[NAMES.index(name)], free_port(), folder / name, config)
            how = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            nodes = [subprocess.Popen(words, **how) for _ in range(2 if name == "nodes" else 1)]
            said = [node.communicate(timeout=240)[0] for node in nodes]
            assert [node.returncode for node in nodes] == [0] * len(nodes), "\n".join(said)
            done[name] = load_file(folder / name / "model/model.safetensors"), "".join(said)
        return done[name]

    return run


def test_page_has_five_commands():
    assert len(COMMANDS) == 5
    assert [command.split()[0] for command in COMMANDS] == ["python", "accelerate", "accelerate", "torchrun", "sbatch"]


@pytest.mark.parametrize(
    ("name", "backend"),
    [pytest.param("ddp", "ddp", marks=pytest.mark.slow), ("zero3", "zero3"), ("nodes", "ddp")],
)
def test_command_of_the_page_trains_what_one_process_trains(name, backend, run):
    expected, _ = run("alone")
    found, said = run(name)
    assert f"world size 2, backend {backend}, device cpu" in said
    assert found.keys() == expected.keys()
    for weight, value in expected.items():
        assert torch.allclose(found[weight], value, atol=1e-6), weight
