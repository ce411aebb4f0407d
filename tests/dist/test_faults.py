"""One process of several dies: the others end soon, and the same command goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefopt.training.metrics import read_lines
from tests.dist.ranks import free_port
from tests.fork_server import BACKENDS, ROOT

pytestmark = pytest.mark.slow


def children(pid):
    threads = (Path(f"/proc/{pid}/task") / thread / "children" for thread in os.listdir(f"/proc/{pid}/task"))
    return [int(child) for path in threads for child in path.read_text().split()]


def torchrun(argv, cache, *flags, backend="ddp"):
    """Two processes of the train command, started."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PREFOPT_CACHE": str(cache)}
    return subprocess.Popen(
        [*launch, str(ROOT / "scripts/train.py"), *argv],
        env=env | BACKENDS[backend],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_a_checkpoint(process, output):
    until = time.monotonic() + 240
    while not list(output.glob("checkpoints/step_*")) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.2)
    ranks = children(process.pid)
    assert len(ranks) == 2
    return ranks


@pytest.mark.parametrize("backend", ["ddp", "zero3"])
def test_run_when_one_process_is_killed_then_the_others_end_within_a_minute_and_it_can_go_on(backend, command, tmp_path):
    output = tmp_path / "run"
    argv = command("dpo", output, train__max_steps=3000, train__save_every=20, eval__every=3000)
    process = torchrun(argv, tmp_path / "cache", "--master_port", str(free_port()), backend=backend)
    try:
        ranks = wait_for_a_checkpoint(process, output)
        os.kill(ranks[-1], signal.SIGKILL)
        began = time.monotonic()
        said, _ = process.communicate(timeout=60)
        assert time.monotonic() - began < 60
    finally:
        process.kill()
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in said
    assert not any(os.path.exists(f"/proc/{rank}") for rank in ranks)
    steps = [line["step"] for line in read_lines(output / "metrics.jsonl") if line["split"] == "train"]
    assert 20 <= steps[-1] < 3000


@pytest.mark.parametrize("who", ["first", "last"])
@pytest.mark.parametrize("meeting", ["standalone", "at_a_port"])
def test_run_when_torchrun_starts_it_again_after_a_process_was_killed_then_it_ends_with_the_same_weights(
    meeting, who, server, command, tmp_path
):
    settings = {"train__max_steps": 400, "train__save_every": 20, "eval__every": 400}
    output = tmp_path / "run"
    flags = ["--standalone"] if meeting == "standalone" else ["--master_port", str(free_port())]
    # one would do, but torch has been seen to abort a process that had finished, while Python was ending
    process = torchrun(command("dpo", output, **settings), tmp_path / "cache", "--max_restarts", "3", *flags)
    try:
        ranks = wait_for_a_checkpoint(process, output)
        os.kill(ranks[0 if who == "first" else -1], signal.SIGKILL)
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert "resuming from" in said
    straight = server.train(command("dpo", tmp_path / "straight", **settings), ranks=2)
    assert straight.status == 0, straight.err
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (output, tmp_path / "straight")]
    assert weights[0] == weights[1]
