"""The step time that `prefopt plan` predicts for a single process, against steps on a CPU with measured matrix speed.

    python benchmarks/plan_time.py                       # some minutes

The plan receives the speed of the machine as it receives that of a GPU: that of a product with the shape of the model's
MLP, and that of a large square product, both timed between the steps. Communication is not included.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import plan  # noqa: E402

CASES = [
    *(plan.Case(plan.SHAPES[name], "single process", micro=4) for name in ("9M", "21M tied", "36M", "60M")),
    *(plan.Case(plan.SHAPES[name], "single process", "tdpo", micro=4) for name in ("9M", "36M")),
    plan.Case(plan.SHAPES["36M"], "single process", micro=4, checkpointing=True),
    plan.Case(plan.SHAPES["36M"], "single process", micro=4, lora=8),
    plan.Case(plan.SHAPES["36M"], "single process", micro=2, accumulation=3),
    plan.Case(plan.SHAPES["14M"], "single process", micro=2, prompt=256, response=256),
]
STEPS = 7


def tflops(rows: int, inner: int, columns: int) -> float:
    """Speed of one product of float32 matrices, TFLOPS."""
    import torch

    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    left @ right
    began = time.perf_counter()
    left @ right
    return 2 * rows * inner * columns / (time.perf_counter() - began) / 1e12


def measured(case: plan.Case) -> dict[str, Any]:
    """A row of the table."""
    import torch

    from prefopt.planner.activations import largest_micro_batch
    from prefopt.planner.model_counts import read_model
    from prefopt.planner.step_time import seconds as planned_seconds
    from prefopt.settings.plan import PlanConfig
    from prefopt.training import runtime as rt
    from prefopt.training import signals

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        plan.save(case, Path(folder))
        runtime = rt.start(
            signals.Stop(), seed=0, mixed_precision="no", deterministic=False, trackers=(), output=Path(folder)
        )
        trainer = plan.trainer_of(runtime, case, folder)
        trainer._step(0)
        tokens = 2 * case.micro * (case.prompt + case.response)
        seconds, low, high = [], [], []
        for _ in range(STEPS):
            began = time.perf_counter()
            trainer._step(1)
            seconds.append(time.perf_counter() - began)
            low.append(tflops(tokens, case.shape[0], case.shape[1]))
            high.append(tflops(1024, 1024, 1024))
        config = case.config(folder)
        model = read_model(config, largest_micro_batch(config, case.response / (case.prompt + case.response)))
        runtime.accelerator.free_memory()
    speeds = sorted((statistics.median(low), statistics.median(high)))
    own = PlanConfig(gpus=1, tflops=tuple(speeds), prompt_tokens=case.prompt, completion_tokens=case.response)
    fast, slow = planned_seconds(own, config, model, "single process")
    took = statistics.median(seconds)
    return {
        "weights": f"{model.parameters / 1e6:.1f}M",
        "method": case.method,
        "pairs": config.train.global_batch,
        "micro_batch": case.micro,
        "length": case.prompt + case.response,
        "checkpointing": case.checkpointing,
        "lora.r": case.lora or "",
        "GFLOPS": f"{1e3 * speeds[0]:.0f} to {1e3 * speeds[1]:.0f}",
        "predicted s": f"{fast:.2f} to {slow:.2f}",
        "measured s": round(took, 2),
        "measured / slow end": round(took / slow, 2),
    }


def main() -> None:
    from measure import write

    rows = []
    for case in CASES:
        rows.append(measured(case))
        print(rows[-1], flush=True)
    ratios = sorted(row["measured / slow end"] for row in rows)
    notes = [
        f"Of {len(rows)} cases the median takes {statistics.median(ratios):.2f} of the slow end of its range, the "
        f"quickest {ratios[0]:.2f}, the slowest {ratios[-1]:.2f}. float32, AdamW, padded rows, one process and thread, "
        f"medians of {STEPS} steps with a product of either shape timed after each.",
    ]
    write("plan-time", "cpu", rows, notes)


if __name__ == "__main__":
    main()
