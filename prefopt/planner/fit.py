"""Whether a run fits on its GPUs, before any model is loaded: the plan of memory against what a GPU has."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from prefopt.errors import TrainError
from prefopt.planner import plan, plan_report
from prefopt.planner.plan import GB
from prefopt.settings import RunConfig
from prefopt.settings.plan import PlanConfig

if TYPE_CHECKING:
    from prefopt.training.runtime import Runtime

CERTAIN = 0.85  # of a plan, which was within 15% of what runs held: less than this is not there


def backend_of(runtime: Runtime) -> str | None:
    """The backend by the name that a plan has for it, or None for one that it does not know."""
    name = runtime.backend
    if name == "fsdp2" and os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        return None
    if not name.startswith("zero"):
        return name
    if not runtime.offloaded:
        return name
    return f"{name} offload" if name == "zero3" and len(runtime.offloaded) == 2 else None


def check(config: RunConfig, backend: str, gpus: int, total: int) -> str | None:
    """Hold the plan of one rank to the bytes of its GPU.

    What is refused is what no length of the rows changes: weights, gradients, the optimizer's state and the reference.
    Activations are planned for rows of data.max_length, which real ones may be far from, so those only warn.

    Args: backend: one of `plan.BACKENDS`; gpus: ranks; total: bytes of one GPU.
    Returns: a line to say where it may not fit. Raises: TrainError where it cannot, with what to change.
    """
    half = config.data.max_length // 2
    own = PlanConfig(
        gpus=gpus, gpu_memory=total / GB, prompt_tokens=config.data.max_length - half, completion_tokens=half
    )
    batch = plan_report.batch_of(own, config)
    try:
        model = plan.read_model(config, batch)
    except Exception as error:  # the run says what is wrong with its model; one that no plan knows may be right
        return f"memory is not planned for this model: {str(error).partition(chr(10))[0]}"
    found = plan.memory(config, model, batch, backend, gpus)
    held = found.weights + found.gradients + found.reference
    if config.optim.name in plan._STATES and not config.optim.name.startswith("paged"):
        held += found.optimizer
    has = f"found {plan_report.number(total / GB)} GB on its GPU"
    if held * CERTAIN > total:
        _, rows = plan_report.planned(own, config)
        raise TrainError(
            f"model.path: a rank holds {plan_report.number(held / GB)} GB under {backend} before the first row, {has}; "
            f"{'; '.join(plan_report.advice(own, config, rows))} (--train.check_memory false goes on regardless)"
        )
    if found.total > plan_report.ROOM * total:
        _, rows = plan_report.planned(own, config)
        return (
            f"warning: rows of data.max_length need about {plan_report.number(found.total / GB)} GB of a rank under "
            f"{backend}, {has}; "
            f"should it not fit: {'; '.join(plan_report.advice(own, config, rows))}"
        )
    return None
