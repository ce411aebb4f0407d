"""One process of several dies: the others end soon, and the same command goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefopt.engine.metrics import read_lines
from tests.dist.ranks import free_port
from tests.fork_server import ENGINES, ROOT

pytestmark = pytest.mark.slow


def children(pid):
    threads = (Path(f"/proc/{pid}/task") / thread / "children" for thread in os.listdir(f"/proc/{pid}/task"))
    return [int(child) for path in threads for child in path.read_text().split()]


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_run_when_one_process_is_killed_then_the_others_end_within_a_minute_and_it_can_go_on(engine, command, tmp_path):
    output = tmp_path / "run"
    argv = command("dpo", output, train__max_steps=3000, train__save_every=20, eval__every=3000)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PREFOPT_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(
        [*launch, str(ROOT / "scripts/train.py"), *argv],
        env=env | ENGINES[engine],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until = time.monotonic() + 240
        while not list(output.glob("checkpoints/step_*")) and time.monotonic() < until and process.poll() is None:
            time.sleep(0.2)
        ranks = children(process.pid)
        assert len(ranks) == 2
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
