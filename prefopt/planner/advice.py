"""Which parallel backend to take for a run, or which settings to change where none fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace

from prefopt.planner.backend_plans import BackendPlan, plans_of
from prefopt.planner.memory import BACKENDS, GB
from prefopt.planner.numbers import number, span
from prefopt.settings import RunConfig
from prefopt.settings.plan import PlanConfig
from prefopt.training import model_sources

SPEEDUP = 1.5  # of bf16 over float32 from which it is recommended
TIE = 1.02  # a backend that is less than this faster is no reason to leave a simpler one

_FILES = {backend: f"configs/accelerate/{backend.replace(' ', '_')}.yaml" for backend in BACKENDS[1:]}


def recommended(plans: list[BackendPlan]) -> BackendPlan | None:
    """The fitting backend with the smallest slow estimate; of those within `TIE`, the simplest."""
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return None
    best = min(plan.seconds[1] for plan in fitting)
    return next(plan for plan in fitting if plan.seconds[1] <= TIE * best)


def advice(own: PlanConfig, config: RunConfig, plans: list[BackendPlan]) -> list[str]:
    """Which backend to take and why, or which settings to change."""
    best = recommended(plans)
    if best is None:
        return what_to_change(own, config)
    name = best.memory.backend
    too_small = [plan.memory.backend for plan in plans if plan.refused is None and not plan.fits]
    why = f"it needs {best.memory.total / GB:.1f} of {number(own.gpu_memory)} GB"
    if too_small:
        why += f", where {', '.join(too_small)} would not fit"
    if sum(plan.fits for plan in plans) > 1:
        why += "; of the backends that fit, its slow estimate is the shortest"
    faster = in_16_bits(own, config)
    better = None if faster is None else recommended(plans_of(own, faster)[1])
    if better is None or better.seconds[1] * SPEEDUP > best.seconds[1]:
        return [f"recommended: {name} ({_start(name)}): {why}"]
    other = better.memory.backend
    return [
        f"with these settings, in float32: {name} ({_start(name)}): {why}",
        f"recommended: --train.mixed_precision bf16 with {other} ({_start(other)}): {span(better.seconds)} s per step "
        f"instead of {span(best.seconds)}, {better.memory.total / GB:.1f} of {number(own.gpu_memory)} GB; token "
        "statistics and the master weights stay in float32",
    ]


def _start(backend: str) -> str:
    return "python scripts/train.py" if backend == "single process" else f"--config_file {_FILES[backend]}"


def in_16_bits(own: PlanConfig, config: RunConfig) -> RunConfig | None:
    """The run under bf16 mixed precision, where it computes in float32 and --tflops is not given."""
    in_32_bits = config.train.mixed_precision == "no" and config.model.dtype == "float32"
    if not in_32_bits or own.tflops is not None:
        return None
    return replace(config, train=replace(config.train, mixed_precision="bf16"))


def what_to_change(own: PlanConfig, config: RunConfig) -> list[str]:
    """The shortest prefix of `changes` after which a backend fits."""
    flags: list[str] = []
    for flag, changed in changes(config):
        flags.append(flag)
        _, plans = plans_of(_shortened(own, changed), changed)
        best = recommended(plans)
        if best is not None:
            needs = f"{best.memory.backend} then needs {best.memory.total / GB:.1f} GB"
            return [f"no backend fits; change {', '.join(flags)}: {needs}"]
    return [f"no backend fits, even with {', '.join(flags)}; use more GPUs or a smaller model"]


def _shortened(own: PlanConfig, config: RunConfig) -> PlanConfig:
    """The mean lengths after data.max_length truncates sequences, by the same factor for prompt and completion."""
    prompt, response, longest = own.prompt_tokens or 1, own.completion_tokens or 1, config.data.max_length
    factor = min(1.0, longest / (prompt + response))
    return replace(own, prompt_tokens=max(1, int(prompt * factor)), completion_tokens=max(1, int(response * factor)))


def changes(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """(flag, settings with it and all flags before it); first those that do not change what is computed."""

    def put(group: str, **values: object) -> RunConfig:
        return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **values)})

    if config.train.micro_batch > 1:
        config = put("train", micro_batch=1)
        yield "--train.micro_batch 1", config
    if not config.model.gradient_checkpointing:
        config = put("model", gradient_checkpointing=True)
        yield "--model.gradient_checkpointing true", config
    if config.train.mixed_precision == "no" and config.model.dtype == "float32":
        config = put("train", mixed_precision="bf16")
        yield "--train.mixed_precision bf16", config
    needs = config.method.needs.reference
    loaded = config.reference.cache == "none" and config.reference.sync_every is None and config.lora.r is None
    if needs != "none" and loaded:
        kind = "logps" if needs == "sequence" else "hidden"
        config = put("reference", cache=kind)
        yield f"--reference.cache {kind}", config
    start = model_sources.find(str(config.model.path), config.model)
    if config.lora.r is None and start.adapter is None:
        config = put("lora", r=16)
        config = put("model", dtype="bfloat16")
        yield "--lora.r 16 --model.dtype bfloat16", config
    if config.model.quantize is None:
        config = put("model", quantize="nf4", compute_dtype="bfloat16")
        yield "--model.quantize nf4", config
    if config.data.max_length > 512:
        config = put("data", max_length=512)
        yield "--data.max_length 512", config
