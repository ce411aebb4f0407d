"""Memory of a rank while a checkpoint is written, and the time of writing, by the size of the checkpoint's files.

    python benchmarks/checkpoint.py                     # two gloo ranks with each backend: some minutes
    python benchmarks/checkpoint.py --shape 36M --only zero3

With a file size larger than the model one rank gathers and writes everything; smaller files are written in parallel.
Memory is in tensor bytes of each rank beyond those of training; both ranks share the machine's disk.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

import measure  # noqa: E402
import plan  # noqa: E402

FILES = (100_000, 100, 10)  # MB; the first is larger than every model here


def measured(runtime: Any, case: plan.Case, folder: str) -> dict[float, dict[str, float]]:
    """For each file size: bytes held by this rank, and seconds per save. Runs on each rank."""
    import dataclasses

    trainer = plan.trainer_of(runtime, case, folder)
    trainer._step(0)
    found = {}
    for size in FILES:
        trainer.config = dataclasses.replace(
            trainer.config, train=dataclasses.replace(trainer.config.train, max_shard_mb=size, keep_last=1)
        )
        held = measure.peak_bytes(lambda: trainer._save(1), "cpu")
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            trainer._save(1)
            seconds.append(time.perf_counter() - began)
        found[size] = {"held": held, "seconds": statistics.median(seconds)}
    whole = sum(path.stat().st_size for path in Path(folder).glob("checkpoints/step_*/*.safetensors"))
    return found | {0: {"held": whole, "seconds": 0.0}}


def main() -> None:
    from tests.dist.ranks import run_ranks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="this engine alone")
    parser.add_argument("--shape", default="60M", choices=plan.SHAPES)
    args = parser.parse_args()
    rows = []
    for engine in plan.TWO:
        if args.only and engine != args.only:
            continue
        case = plan.Case(plan.SHAPES[args.shape], engine, micro=1, prompt=16, response=16)
        with tempfile.TemporaryDirectory() as folder:
            plan.save(case, Path(folder))
            ranks = run_ranks(measured, case, folder, world=2, engine=engine, timeout=900)
        whole = ranks[0].pop(0)["held"]
        for size in FILES:
            row: dict[str, Any] = {"weights": args.shape, "engine": engine, "checkpoint MB": round(whole / 1e6)}
            row |= {"max_shard_mb": size if size < whole / 1e6 else "one file"}
            row |= {f"rank {rank} holds MB": round(found[size]["held"] / 1e6) for rank, found in enumerate(ranks)}
            rows.append(row | {"seconds": round(ranks[0][size]["seconds"], 2)})
            print(rows[-1], flush=True)
    notes = [
        "Held: tensor bytes beyond what a rank trains with, at the peak of a save; seconds: median of three saves."
    ]
    measure.write("checkpoint", "cpu", rows, notes)


if __name__ == "__main__":
    main()
