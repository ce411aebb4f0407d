"""Weak scaling from one rank to two: the seconds of a step with a constant number of pairs per rank.

    python benchmarks/processes.py [--pairs 256] [--steps 30]

TDPO on the testbed's world and model, one thread per rank, gloo; two ranks train on twice the pairs of one. Each run is
started by torchrun, one backend after the other and all of them twice. Writes a table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import measure

from prefopt.training.metrics import read_lines
from tests.fork_server import ENGINES

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default=256, type=int, help="of a process and step")
    parser.add_argument("--steps", default=30, type=int)
    args = parser.parse_args()
    runs = [("single process", 1, {}), *((engine, 2, variables) for engine, variables in ENGINES.items())]
    found: dict[str, list[float]] = {name: [] for name, _, _ in runs}
    for _ in range(2):
        for name, processes, variables in runs:
            found[name] += _seconds(processes, variables, args.pairs, args.steps)
    alone = statistics.median(found["single process"])
    rows = []
    for name, processes, _ in runs:
        step = statistics.median(found[name])
        row = {"engine": name, "processes": processes, "pairs a step": processes * args.pairs, "s a step": step}
        rows.append(row | {"pairs/s": processes * args.pairs / step, "weak scaling": alone / step})
    steps = 2 * (args.steps - args.steps // 3)
    note = f"Median of {steps} steps in two runs; weak scaling is 1 if a step of two ranks takes no longer."
    measure.write("processes", "cpu", rows, [note])


def _seconds(processes: int, variables: dict[str, str], pairs: int, steps: int) -> list[float]:
    """Seconds of the later two thirds of the steps of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += ["--master_port", "29571", str(ROOT / "scripts" / "train.py"), "--method", "tdpo"]
        settings = {"train.global_batch": processes * pairs, "train.micro_batch": pairs, "train.max_steps": steps}
        settings |= {"eval.every": steps, "train.save_every": steps, "train.check_first_batch": "false"}
        settings |= {"output": folder, "train.threads": 1}
        command += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
        ran = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
        assert ran.returncode == 0, ran.stderr[-2000:]
        lines = [line for line in read_lines(Path(folder) / "metrics.jsonl") if line["split"] == "train"]
    return [line["seconds"] for line in lines[steps // 3 :]]


if __name__ == "__main__":
    main()
