"""Whether a run fits on its GPUs, before any model is loaded: planned memory against the memory of one GPU."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from prefopt.errors import TrainError
from prefopt.planner.advice import advice
from prefopt.planner.backend_plans import USABLE, micro_batch_of, plans_of
from prefopt.planner.memory import GB, OPTIMIZER_STATES, memory_of
from prefopt.planner.model_counts import read_model
from prefopt.planner.numbers import number
from prefopt.settings import RunConfig
from prefopt.settings.plan import PlanConfig

if TYPE_CHECKING:
    from prefopt.training.runtime import Runtime

CERTAIN = 0.85  # of a plan: measured runs were within 15% of it, so less than this does not suffice


def backend_of(runtime: Runtime) -> str | None:
    """The planner's name of the run's parallel backend, or None for one that it has no formula for."""
    name = runtime.backend
    if name == "fsdp2" and os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        return None
    if not name.startswith("zero"):
        return name
    if not runtime.offloaded:
        return name
    return f"{name} offload" if name == "zero3" and len(runtime.offloaded) == 2 else None


def check(config: RunConfig, backend: str, gpus: int, total: int) -> str | None:
    """Compare one rank's plan with the memory of its GPU.

    The run is refused for what no length of the sequences changes: weights, gradients, optimizer states and the
    reference. Activations are planned for sequences of data.max_length, which real ones may be far below, so they only
    cause a warning.

    Args: backend: one of `memory.BACKENDS`; gpus: ranks; total: bytes of one GPU.
    Returns: a warning where the run may not fit. Raises: TrainError where it cannot, with the settings to change.
    """
    half = config.data.max_length // 2
    own = PlanConfig(
        gpus=gpus, gpu_memory=total / GB, prompt_tokens=config.data.max_length - half, completion_tokens=half
    )
    batch = micro_batch_of(own, config)
    try:
        model = read_model(config, batch)
    except Exception as error:  # the run reports what is wrong with its model; one without a plan may be right
        return f"warning: the memory of this model cannot be planned: {str(error).partition(chr(10))[0]}"
    found = memory_of(config, model, batch, backend, gpus)
    held = found.weights + found.gradients + found.reference
    if config.optim.name in OPTIMIZER_STATES and not config.optim.name.startswith("paged"):
        held += found.optimizer
    if held * CERTAIN > total:
        _, plans = plans_of(own, config)
        raise TrainError(
            f"model.path: weights, gradients, optimizer states and reference take {number(held / GB)} GB per rank "
            f"under {backend}, the GPU has {number(total / GB)} GB; {'; '.join(advice(own, config, plans))} "
            "(--train.check_memory false starts regardless)"
        )
    if found.total > USABLE * total:
        _, plans = plans_of(own, config)
        return (
            f"warning: with sequences of data.max_length a rank needs about {number(found.total / GB)} GB under "
            f"{backend}, the GPU has {number(total / GB)} GB; if the run is out of memory: "
            f"{'; '.join(advice(own, config, plans))}"
        )
    return None
