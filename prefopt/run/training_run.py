"""A training run, from its data to the exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prefopt import settings
from prefopt.evaluate.sampler import sampler
from prefopt.planner import dry_run, fit
from prefopt.redaction import hidden, printable
from prefopt.run.card import CARD, first_day, write_or_check_card
from prefopt.run.card_contents import run_card
from prefopt.run.results import print_results, target_beta
from prefopt.run.task import Task, file_task, limit_held_out, testbed_task
from prefopt.settings import RunConfig
from prefopt.testbed.cache import cache_root
from prefopt.training import (
    adapter_loading,
    adapters,
    checkpoint,
    extension,
    model_sources,
    models,
    preflight,
    random_state,
    sharding,
)
from prefopt.training import runtime as rt
from prefopt.training.forward import PolicyWithReference, ReferenceHead, Scorer
from prefopt.training.launcher import print_rank_0
from prefopt.training.metrics import Evaluator
from prefopt.training.reference import ReferenceModel, obtain
from prefopt.training.reference_cache import ReferenceValues
from prefopt.training.run import TrainingRun
from prefopt.training.schedule import learning_rate, total_steps
from prefopt.training.tracking import Trackers
from prefopt.training.trainer import Trainer


def train_run(config: RunConfig, runtime: rt.Runtime, evaluators: Sequence[Evaluator] = ()) -> int:
    """Train from the data to the exported model, or resume it.

    Args: evaluators: functions of the policy that every evaluation runs too. Returns: the exit status.
    """
    output = Path(config.output)
    if config.train.check_memory and not config.on_testbed:
        _check_memory(config, runtime)
    day = runtime.from_main(first_day(output))
    task = runtime.on_main_first(lambda: testbed_task(config)) if config.on_testbed else file_task(config, day)
    limit_held_out(config, task)
    for line in task.report:
        print_rank_0(printable(line))
    if config.dry_run:
        total = preflight.gpu_memory(runtime.device)
        lines = dry_run.of_run(config, runtime, task.train, len(task.eval_pairs), task.start.path, total)
        print_dry_run(config, lines)
        return 0
    resume_from = checkpoint.latest(output / "checkpoints", print_rank_0, runtime)

    def write_card() -> dict[str, str] | None:
        card = run_card(config, runtime, task)
        write_or_check_card(card, output)
        return card["reference"]

    hashes = runtime.on_main(write_card)  # hashing reads all weights, so only rank 0 does it
    note = runtime.on_main(lambda: _begin_extension(config, task, output))
    if note is not None:
        print_rank_0(note)
    if runtime.on_main(lambda: checkpoint.damage(output / "model") is None):
        print_rank_0(f"{output}: this run is finished; the model is in {output / 'model'}")
        print_results(config, runtime, task, output)
        return 0
    trackers, failed = Trackers(runtime, config, output, output / CARD), True
    try:
        status = _fit(config, runtime, task, output, resume_from, evaluators, trackers, hashes)
        if status == 0:
            print_rank_0(f"finished: model in {output / 'model'}, metrics in {output / 'metrics.jsonl'}")
            print_results(config, runtime, task, output, trackers)
        failed = False
    finally:
        trackers.finish(failed)
    return status


def _begin_extension(config: RunConfig, task: Task, output: Path) -> str | None:
    """Let a finished run resume where its length was raised. Returns: a line on its schedule, or None."""
    steps = None if task.train.steps_per_epoch is None else task.train.steps

    def rate(settings: RunConfig, step: int) -> float | None:
        return None if total_steps(settings, steps) is None else learning_rate(settings, steps, step)

    return extension.record_extension(output, output / CARD, config, rate)


def _check_memory(config: RunConfig, runtime: rt.Runtime) -> None:
    """Warn where the run may not fit into GPU memory. Raises: TrainError where it cannot fit."""
    total = preflight.gpu_memory(runtime.device)
    if total is None:
        return

    backend = fit.backend_of(runtime)
    if backend is not None:
        warning = runtime.on_main(lambda: fit.check(config, backend, runtime.world, total))
        if warning is not None:
            print_rank_0(warning)


def _fit(
    config: RunConfig,
    runtime: rt.Runtime,
    task: Task,
    output: Path,
    resume_from: Path | None,
    evaluators: Sequence[Evaluator] = (),
    trackers: Trackers | None = None,
    hashes: Mapping[str, str] | None = None,
) -> int:
    """Load the models and train. Returns: the exit status."""
    _check_disk_space(config, runtime, task, output)
    cached = task.reference is not None and config.reference.cache != "none"
    lm, reference = _load_models(config, runtime, task, resume_from, cached)
    # dropout differs between ranks, and must not depend on what was drawn while the models were loaded
    random_state.set_seed(config.seed + runtime.rank)
    threads = rt.set_threads(config.train.threads, sum(sharding.numel(p) for p in lm.parameters()))
    if resume_from is not None:
        print_rank_0(f"resuming from {resume_from}")
    _print_models(config, task, lm, threads, output)
    values: ReferenceValues | None = None
    reference_head: ReferenceHead | None = None
    if cached:
        values, reference_head = _cached_reference(config, runtime, task, lm, resume_from is None, hashes or {})
        reference = reference if isinstance(reference, adapters.Frozen) else None
    scores = config.method.needs.output == "scores"
    if scores:
        models.set_padding(adapters.base_of(lm), task.tokenizer)
    evaluators = [*evaluators]
    if task.world is not None and not scores:  # the exact figures of a world are those of a policy that generates
        world, beta = task.world, target_beta(config)
        evaluators.append(lambda policy: world.evaluate(policy, beta))
    policy = Scorer(lm) if scores else PolicyWithReference(lm, reference, config.kernel, reference_head)
    if config.eval.generate and isinstance(policy, PolicyWithReference):
        agree = runtime.from_main if runtime.backend in rt.SHARDING else None
        precision = runtime.accelerator.autocast
        evaluators.append(sampler(config, policy, task.tokenizer, task.eval_pairs, precision, agree))
    run = TrainingRun(
        config=config,
        runtime=runtime,
        policy=policy,
        tokenizer=task.tokenizer,
        train=task.train,
        eval_pairs=task.eval_pairs,
        output=output,
        values=values,
    )
    return Trainer(run, resume_from, evaluators, trackers).train()


def _check_disk_space(config: RunConfig, runtime: rt.Runtime, task: Task, output: Path) -> None:
    """Raises: TrainError where the disk has no space for the checkpoints of a full model."""
    start = task.start
    if config.lora.r is None and start.adapter is None:
        runtime.on_main(
            lambda: preflight.check_disk_space(
                config, models.parameter_count(start.base, start.base_settings(config.model)), output
            )
        )


def _load_models(
    config: RunConfig, runtime: rt.Runtime, task: Task, resume_from: Path | None, cached: bool
) -> tuple[Any, Any]:
    """The policy and its reference.

    Args: cached: whether the reference is not needed during training, since its values are read from the cache.
    Returns: (policy, the reference: a model of its own, a frozen part of the policy, None, or its source if cached).
    """
    reference: Any = task.reference
    second = isinstance(reference, model_sources.ModelSource) and not cached
    if second:
        preflight.check_nvme_holds_one_model(runtime)
    with runtime.sharded_loading():
        lm = adapter_loading.load_policy(config, task.start, task.reference, resume_from)
    if second:
        with runtime.sharded_loading():
            reference = adapter_loading.load_frozen(reference, config.model, _reference_key(config))
    return lm, reference


def _reference_key(config: RunConfig) -> str:
    """The setting that names the reference, for errors."""
    return "model.path" if config.reference.path is None else "reference.path"


def _print_models(config: RunConfig, task: Task, lm: Any, threads: int, output: Path) -> None:
    """Print what the policy and the reference are, and warn of settings that cost accuracy or speed."""
    name, adapter = type(adapters.base_of(lm)).__name__, adapters.describe_policy(lm)
    parameters = sum(sharding.numel(p) for p in lm.parameters())
    adapted = f", {adapter}" if adapter else ""
    cpu = f"{threads} CPU thread{'' if threads == 1 else 's'} per rank"
    print_rank_0(f"policy: {name}, {parameters:,} parameters{adapted}, {cpu}; output: {output}")
    if config.model.attention == "sdpa" and adapters.base_of(lm).config._attn_implementation == "eager":
        print_rank_0(f"attention: eager, since {name} needs what SDPA does not support (such as an attention soft-cap)")
    for line in adapters.remarks(lm):
        print_rank_0(line)
    if task.reference is not None:
        print_rank_0(f"reference: {model_sources.describe_reference(task.reference, task.start, config)}")
    if config.model.dtype == "bfloat16" and not adapter:
        print_rank_0(
            "warning: weights in bfloat16 lose updates smaller than 1/256 of a weight; "
            "float32 weights with train.mixed_precision bf16 do not"
        )


def _cached_reference(
    config: RunConfig, runtime: rt.Runtime, task: Task, lm: Any, fresh: bool, hashes: Mapping[str, str]
) -> tuple[ReferenceValues, ReferenceHead | None]:
    """The reference cache, computed where it does not exist yet.

    Args:
        lm: the policy, which computes the reference's values where both have the same weights.
        fresh: whether the policy still has its starting weights.
        hashes: of the reference's weights.
    Returns: (cached values, the reference's output head where hidden states are cached and the policy's differs).
    """
    what = task.reference
    assert what is not None
    if isinstance(what, adapters.Frozen):
        model = ReferenceModel(lm, what, hashes)
    elif fresh and what == task.start:
        model = ReferenceModel(lm, None, hashes)
    else:
        with runtime.sharded_loading():
            model = ReferenceModel(
                adapter_loading.load_frozen(what, config.model, _reference_key(config)), None, hashes
            )
    if not sharding.is_sharded(model.lm):
        torch.nn.Module.to(model.lm, runtime.device)
    cache_dir = Path(config.reference.cache_dir) if config.reference.cache_dir else cache_root() / "reference"
    with sharding.gathered_by_layer(model.lm):
        values = obtain(config, runtime, model, task.sources, cache_dir, int(task.tokenizer.pad_token_id))
    if config.reference.cache != "hidden" or model.frozen is not None:
        return values, None
    with sharding.gathered(model.lm.get_output_embeddings()):
        return values, ReferenceHead(model.lm)


def print_dry_run(config: RunConfig, plan: Sequence[str]) -> None:
    """Print the end of a `--dry_run`: overrides, plan and settings. Args: plan: what the run would do and need."""
    resolved = (
        [] if config.dry_run != "config" else ["", "resolved config:", settings.yaml_of(hidden(config.to_dict()))]
    )
    changed = [printable(line) for line in dry_run.differences(config)]
    print_rank_0("\n".join(["", *changed, *plan, *resolved]))
    if not resolved:
        print_rank_0("(--dry_run config prints every setting as YAML)")
