"""A plan of one run under every parallel backend: memory, seconds of a step, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefopt import settings
from prefopt.errors import ConfigError
from prefopt.planner.activations import MicroBatch, largest_micro_batch
from prefopt.planner.memory import BACKENDS, GB, Memory, host_while_loading, memory_of
from prefopt.planner.model_counts import ModelCounts, read_model
from prefopt.planner.step_time import ranks_of, seconds
from prefopt.settings import RunConfig
from prefopt.settings.plan import PlanConfig
from prefopt.training import backends

USABLE = 0.9  # of a GPU's memory that a plan may fill: allocators leave gaps, and sequences differ in length


@dataclass(frozen=True)
class BackendPlan:
    """One backend.

    Args:
        seconds: of a step, (fast, slow).
        refused: why this run cannot use the backend; None where it can.
        host: bytes of one node's host memory at most.
        hours: of an epoch, (fast, slow), where the number of pairs is known.
    """

    memory: Memory
    seconds: tuple[float, float]
    refused: str | None
    fits: bool
    host: float = 0.0
    hours: tuple[float, float] | None = None


def micro_batch_of(own: PlanConfig, config: RunConfig) -> MicroBatch:
    """The largest micro-batch, with the mean pair's fraction of completion tokens."""
    prompt, response = own.prompt_tokens or 1, own.completion_tokens or 1
    return largest_micro_batch(config, response / (prompt + response))


def plans_of(own: PlanConfig, config: RunConfig) -> tuple[ModelCounts, list[BackendPlan]]:
    """The model, and a plan for each backend."""
    batch = micro_batch_of(own, config)
    model = read_model(config, batch)
    plans = []
    pairs = pairs_of(own, config)
    steps = None if pairs is None else max(1, pairs // config.train.global_batch)
    for backend in BACKENDS:
        memory = memory_of(config, model, batch, backend, own.gpus)
        refused = refusal(own, config, backend)
        fits = refused is None and memory.total <= USABLE * own.gpu_memory * GB
        ranks = ranks_of(own, backend)
        on_node = min(ranks, own.gpus_per_node)
        host = on_node * max(memory.host, host_while_loading(config, model, backend, ranks))
        low, high = seconds(own, config, model, backend)
        hours = None if steps is None else (low * steps / 3600, high * steps / 3600)
        plans.append(BackendPlan(memory, (low, high), refused, fits, host, hours))
    return model, plans


def refusal(own: PlanConfig, config: RunConfig, backend: str) -> str | None:
    """Why a backend cannot run this, or None."""
    if backend == "single process":
        return None
    if own.gpus == 1:
        return "needs several GPUs"
    if backend == "ddp":
        return None
    try:
        backends.check_supported(config, backend.partition(" ")[0])
    except ConfigError as error:
        return str(error).partition(",")[0].replace("found ", "")
    return None


def pairs_of(own: PlanConfig, config: RunConfig) -> int | None:
    """Number of pairs, where it is given or can be counted as lines of JSONL files."""
    if own.pairs is not None:
        return own.pairs
    files = [Path(name) for name in settings.sources(config.data.train)]
    if not files or not all(path.is_file() and path.suffix == ".jsonl" for path in files):
        return None
    return sum(sum(1 for _ in path.open("rb")) for path in files)
