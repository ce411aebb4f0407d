"""What `--dry_run` prints of a run that has not begun: what differs from the defaults, and what it will do and need."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from prefopt import settings
from prefopt.data.pairs import blocks, facts
from prefopt.figures import readable
from prefopt.planner import fit, plan, plan_report
from prefopt.planner.plan import GB
from prefopt.redaction import hidden
from prefopt.settings import RunConfig
from prefopt.settings.plan import PlanConfig
from prefopt.training.schedule import learning_rate, total_steps
from prefopt.types import EncodedPair

if TYPE_CHECKING:
    from prefopt.data.loader import Batches
    from prefopt.training.runtime import Runtime

SAMPLE = 4096  # pairs of a stream, or of a large file, whose lengths stand for all


def differences(config: RunConfig) -> list[str]:
    """What differs from the defaults, a line each; what the testbed's own defaults change stands in one line."""
    changed = [
        dataclasses.replace(one, value=hidden({one.name: one.value})[one.name]) for one in settings.overrides(config)
    ]
    given, own = ([one for one in changed if one.on_testbed is side] for side in (False, True))
    lines = [f"  {one.key}: {_shown(one.value)} (default {_shown(one.default)})" for one in given]
    if own:
        lines.append("  the testbed's own: " + ", ".join(f"{one.key} {_shown(one.value)}" for one in own))
    return ["differs from the defaults:", *(lines or ["  nothing"])]


def _shown(value: Any) -> str:
    """A value as YAML and flags have it."""
    if isinstance(value, float):
        return readable(value, 6)
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000)
    return "none" if value is None else text.removesuffix("\n").removesuffix("\n...").strip()


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Mean tokens of a pair, and of its longest sequence.

    Args: processed: input tokens of all its sequences; scored: completion tokens that the loss reads; prompt,
        completion: of one sequence; longest: of any sequence.
    """

    processed: float
    scored: float
    prompt: float
    completion: float
    longest: int


def lengths_of(pairs: Sequence[EncodedPair], both: bool) -> Lengths:
    """Args: both: whether the rejected side is read too."""
    sums, longest = np.zeros(4), 0
    for begin, end in blocks(pairs):
        prompt, chosen, chosen_scored = (
            facts(pairs, name, begin, end) for name in ("prompt", "chosen", "chosen_scored")
        )
        rejected, rejected_scored = (
            facts(pairs, name, begin, end) if both else np.zeros(end - begin, np.int64)
            for name in ("rejected", "rejected_scored")
        )
        sums += [prompt.sum(), chosen.sum() + rejected.sum(), chosen_scored.sum() + rejected_scored.sum(), end - begin]
        longest = max(longest, int((prompt + np.maximum(chosen, rejected)).max()))
    prompt_mean, completions, scored = (float(total) for total in sums[:3] / sums[3])
    sequences = 2 if both else 1
    return Lengths(prompt_mean * sequences + completions, scored, prompt_mean, completions / sequences, longest)


def of_run(
    config: RunConfig, runtime: Runtime, train: Batches, held_out: int, model_path: str, total: int | None
) -> list[str]:
    """Steps, schedule, tokens, memory and time of a training, a line each.

    Args: held_out: pairs that evaluations score. model_path: what training starts from. total: bytes of the GPU, None
        on a CPU.
    """
    both = config.method.needs.rows == "pairs"
    there = getattr(train, "pairs", None)
    pairs: Sequence[EncodedPair] = train.global_batch(0)[:SAMPLE] if there is None else there
    lengths = lengths_of(pairs, both)
    steps = total_steps(config, None if train.steps_per_epoch is None else train.steps)
    return [
        "plan:",
        f"  steps: {_steps(config, runtime, train, steps)}",
        f"  schedule: {_schedule(config, train, steps)}",
        f"  evaluations: {_evaluations(config, held_out, steps)}",
        f"  tokens: {_tokens(config, lengths, steps, train)}",
        *_memory_and_time(config, runtime, lengths, model_path, total, steps),
    ]


def of_rounds(
    config: RunConfig, runtime: Runtime, prompts: Sequence[int], model_path: str, total: int | None
) -> list[str]:
    """The same of rounds. Args: prompts: of each round."""
    n, most, batch = config.generate.n, config.generate.max_tokens, config.train.global_batch
    epochs = config.train.epochs
    steps = [config.train.max_steps or -(-int(count * epochs) // batch) for count in prompts]
    answers = sum(prompts) * n
    lengths = Lengths(0.0, 0.0, config.data.max_length - most, most, config.data.max_length)
    return [
        "plan:",
        f"  rounds: {len(prompts)}, of {_range(prompts)} prompts with {n} completions each",
        f"  steps: at most {_range(steps)} a round, {batch:,} pairs each: a prompt gives one pair or none",
        f"  schedule: {_shape(config)}, in each round",
        f"  tokens: at most {answers * most:,} sampled in {answers:,} completions",
        *_memory_and_time(config, runtime, lengths, model_path, total, None)[:1],
        "  time: no plan, since how long completions get is not known before they are sampled",
    ]


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _steps(config: RunConfig, runtime: Runtime, train: Batches, steps: int | None) -> str:
    what = config.train
    of = f"{what.global_batch:,} pairs" if what.tokens_per_batch is None else f"{what.tokens_per_batch:,} tokens"
    if steps is None:
        end = f"{what.max_tokens:,} input tokens" if what.max_tokens else f"{readable(what.max_seconds or 0.0)} s"
        return f"until {end} are spent, {of} a step"
    passes = ""
    if train.steps_per_epoch is not None:
        passes = f", {readable(train.epochs(steps))} epochs of {train.steps_per_epoch:,} steps"
    forward = -(-what.global_batch // (what.micro_batch * runtime.world))
    each = "" if what.tokens_per_batch is not None else f", {forward:,} forward passes a step and process"
    return f"{steps:,} of {of}{passes}{each}"


def _shape(config: RunConfig) -> str:
    return f"{config.optim.schedule}, peak {readable(config.optim.lr)} ({settings.rate_source(config)})"


def _schedule(config: RunConfig, train: Batches, steps: int | None) -> str:
    shape = _shape(config)
    if steps is None:
        return shape + ", over the share of the budget that is spent"
    of_epochs = None if train.steps_per_epoch is None else train.steps
    rate = functools.partial(learning_rate, config, of_epochs)
    # it only rises up to the peak, and only falls after it
    peak = bisect.bisect_left(range(steps - 1), True, key=lambda step: rate(step + 1) <= rate(step)) + 1
    return f"{shape} from step {peak:,}, {readable(rate(0))} at step 1, {readable(rate(steps - 1))} at step {steps:,}"


def _evaluations(config: RunConfig, held_out: int, steps: int | None) -> str:
    first = "one before step 1, " if config.eval.at_start else ""
    count = ""
    if steps is not None:
        regular = steps // config.eval.every + (steps % config.eval.every > 0)
        count = f"{regular + config.eval.at_start:,}: "
    return f"{count}{first}every {config.eval.every:,} steps and at the end, of {held_out:,} held-out pairs"


def _tokens(config: RunConfig, lengths: Lengths, steps: int | None, train: Batches) -> str:
    each = f"{readable(lengths.processed)} input and {readable(lengths.scored)} completion tokens a pair on average"
    if steps is None:
        return each
    if config.train.tokens_per_batch is not None:
        return f"{each}; at most {steps * config.train.tokens_per_batch:,} input tokens in the run"
    pairs = getattr(train, "pairs", None)  # an epoch's last step may have fewer than the others
    trained = steps * config.train.global_batch if pairs is None else train.epochs(steps) * len(pairs)
    return f"{each}; about {readable(lengths.processed * trained)} input tokens in the run"


def _memory_and_time(
    config: RunConfig, runtime: Runtime, lengths: Lengths, model_path: str, total: int | None, steps: int | None
) -> list[str]:
    """What the planner knows, or in one line why there is no plan."""
    backend = fit.backend_of(runtime)
    if backend is None:
        return [f"  memory and time: no plan for the parallel backend {runtime.described_backend}"]
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=model_path),
        data=dataclasses.replace(config.data, max_length=lengths.longest),
    )
    own = PlanConfig(
        gpus=runtime.world,
        gpu_memory=80.0 if total is None else total / GB,
        prompt_tokens=max(1, round(lengths.prompt)),
        completion_tokens=max(1, round(lengths.completion)),
    )
    try:
        batch = plan_report.batch_of(own, config)
        model = plan.read_model(config, batch)
        how: dict[str, Any] = {} if total is not None else {"overhead": 0.0, "tiles": plan.TILES["cpu"]}
        found = plan.memory(config, model, batch, backend, runtime.world, **how)
        fast, slow = plan_report.seconds(own, config, model, backend)
    except Exception as error:  # the run itself says what is wrong with its model; one without a plan may be right
        return [f"  memory and time: no plan for this model: {str(error).partition(chr(10))[0]}"]
    parts = {
        "weights": found.weights,
        "gradients": found.gradients,
        "optimizer": found.optimizer,
        "reference": found.reference,
        "activations": found.activations,
        "head": found.head,
        "communication": found.buffers,
    }
    shown = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size >= 0.005 * found.total)
    of = "" if total is None else f" of the GPU's {_size(total)}"
    memory = f"  memory: {_size(found.total)}{of} for one rank ({backend}): {shown}"
    low, high = own.tflops or plan_report.TFLOPS[2 if _is_16_bit(config) else 4]
    a_step = "under 1 ms a step" if slow < 1e-3 else f"{_span(fast)} to {_span(slow)} a step"
    in_all = "" if steps is None else f", {_span(fast * steps)} to {_span(slow * steps)} in all without evaluations"
    gpus = f"on {runtime.world} GPU(s) of {low:g} to {high:g} TFLOPS"
    return [memory, f"  time: {'no plan for a CPU; ' if total is None else ''}{a_step}{in_all} {gpus}"]


def _is_16_bit(config: RunConfig) -> bool:
    return config.train.mixed_precision != "no" or config.model.dtype == "bfloat16"


def _size(size: float) -> str:
    unit, name = next(((unit, name) for unit, name in ((GB, "GB"), (1e6, "MB")) if size >= unit), (1e3, "kB"))
    return f"{readable(size / unit, 3)} {name}"


def _span(seconds: float) -> str:
    if seconds < 0.1:
        return f"{readable(seconds * 1000, 2)} ms" if seconds >= 1e-3 else "1 ms"
    if seconds < 120:
        return f"{readable(seconds, 2)} s"
    return f"{readable(seconds / 60, 2)} min" if seconds < 7200 else f"{readable(seconds / 3600, 2)} h"
