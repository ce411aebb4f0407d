"""What `--dry_run` prints: settings that differ from the defaults; steps, tokens, memory and time of the run."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from prefopt import settings
from prefopt.data.pairs import blocks, pair_metadata
from prefopt.figures import readable
from prefopt.kernels.token_stats import TILES
from prefopt.planner import fit
from prefopt.planner.backend_plans import micro_batch_of
from prefopt.planner.memory import GB, Assumptions, memory_of
from prefopt.planner.model_counts import read_model
from prefopt.planner.step_time import seconds, speeds
from prefopt.redaction import hidden
from prefopt.settings import RunConfig
from prefopt.settings.plan import PlanConfig
from prefopt.training.schedule import learning_rate, total_steps
from prefopt.types import EncodedPair

if TYPE_CHECKING:
    from prefopt.data.loader import Batches
    from prefopt.training.runtime import Runtime

SAMPLE = 4096  # pairs of a stream, whose lengths stand for those of all


def differences(config: RunConfig) -> list[str]:
    """The settings that differ from the defaults, a line each; the testbed's defaults are together on one line."""
    changed = [
        dataclasses.replace(one, value=hidden({one.name: one.value})[one.name]) for one in settings.overrides(config)
    ]
    given, own = ([one for one in changed if one.on_testbed is side] for side in (False, True))
    lines = [f"  {one.key}: {_shown(one.value)} (default {_shown(one.default)})" for one in given]
    if own:
        lines.append("  testbed defaults: " + ", ".join(f"{one.key} {_shown(one.value)}" for one in own))
    return ["settings that differ from the defaults:", *(lines or ["  none"])]


def _shown(value: Any) -> str:
    """A value as it is written in YAML."""
    if isinstance(value, float):
        return readable(value, 6)
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000)
    return "none" if value is None else text.removesuffix("\n").removesuffix("\n...").strip()


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Mean tokens per pair, and the longest sequence.

    Args: processed: input tokens of all sequences of a pair; loss_tokens: completion tokens that the loss reads;
        prompt, completion: of one sequence; longest: tokens of the longest sequence.
    """

    processed: float
    loss_tokens: float
    prompt: float
    completion: float
    longest: int


def lengths_of(pairs: Sequence[EncodedPair], both: bool) -> Lengths:
    """Lengths of these pairs. Args: both: whether the rejected completion is read too."""
    sums, longest = np.zeros(4), 0
    for begin, end in blocks(pairs):
        prompt, chosen, chosen_loss_tokens = (
            pair_metadata(pairs, name, begin, end) for name in ("prompt", "chosen", "chosen_loss_tokens")
        )
        rejected, rejected_loss_tokens = (
            pair_metadata(pairs, name, begin, end) if both else np.zeros(end - begin, np.int64)
            for name in ("rejected", "rejected_loss_tokens")
        )
        sums += [
            prompt.sum(),
            chosen.sum() + rejected.sum(),
            chosen_loss_tokens.sum() + rejected_loss_tokens.sum(),
            end - begin,
        ]
        longest = max(longest, int((prompt + np.maximum(chosen, rejected)).max()))
    prompt_mean, completions, scored = (float(total) for total in sums[:3] / sums[3])
    sequences = 2 if both else 1
    return Lengths(prompt_mean * sequences + completions, scored, prompt_mean, completions / sequences, longest)


def of_run(
    config: RunConfig, runtime: Runtime, train: Batches, held_out: int, model_path: str, total: int | None
) -> list[str]:
    """Steps, schedule, tokens, memory and time of a training run, a line each.

    Args: held_out: pairs of each evaluation. model_path: the model that training starts from. total: bytes of the GPU,
        None on a CPU.
    """
    both = config.method.needs.rows == "pairs"
    known = getattr(train, "pairs", None)  # None for a stream
    pairs: Sequence[EncodedPair] = train.global_batch(0)[:SAMPLE] if known is None else known
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
    """The same lines for a run of rounds. Args: prompts: number of prompts of each round."""
    n, most, batch = config.generate.n, config.generate.max_tokens, config.train.global_batch
    epochs = config.train.epochs
    steps = [config.train.max_steps or -(-int(count * epochs) // batch) for count in prompts]
    completions = sum(prompts) * n
    lengths = Lengths(0.0, 0.0, config.data.max_length - most, most, config.data.max_length)
    return [
        "plan:",
        f"  rounds: {len(prompts)}, of {_range(prompts)} prompts with {n} completions each",
        f"  steps: at most {_range(steps)} per round, of {batch:,} pairs each; each prompt gives at most one pair",
        f"  schedule: {_shape(config)}, in each round",
        f"  tokens: at most {completions * most:,} sampled in {completions:,} completions",
        *_memory_and_time(config, runtime, lengths, model_path, total, None)[:1],
        "  time: not estimated; it depends on the lengths of the sampled completions",
    ]


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _steps(config: RunConfig, runtime: Runtime, train: Batches, steps: int | None) -> str:
    what = config.train
    of = f"{what.global_batch:,} pairs" if what.tokens_per_batch is None else f"{what.tokens_per_batch:,} tokens"
    if steps is None:
        end = f"{what.max_tokens:,} input tokens" if what.max_tokens else f"{readable(what.max_seconds or 0.0)} s"
        return f"until {end} are spent, {of} per step"
    epochs = ""
    if train.steps_per_epoch is not None:
        epochs = f", {readable(train.epochs(steps))} epochs of {train.steps_per_epoch:,} steps"
    forward = -(-what.global_batch // (what.micro_batch * runtime.world))
    each = "" if what.tokens_per_batch is not None else f", {forward:,} forward passes per step and rank"
    return f"{steps:,} of {of}{epochs}{each}"


def _shape(config: RunConfig) -> str:
    return f"{config.optim.schedule}, peak {readable(config.optim.lr)} ({settings.rate_source(config)})"


def _schedule(config: RunConfig, train: Batches, steps: int | None) -> str:
    shape = _shape(config)
    if steps is None:
        return shape + ", as a function of the fraction of the budget that is spent"
    of_epochs = None if train.steps_per_epoch is None else train.steps
    rate = functools.partial(learning_rate, config, of_epochs)
    # the rate rises to the peak and falls after it, so a bisection finds the first step that is not below the next
    peak = bisect.bisect_left(range(steps - 1), True, key=lambda step: rate(step + 1) <= rate(step)) + 1
    return f"{shape} from step {peak:,}, {readable(rate(0))} at step 1, {readable(rate(steps - 1))} at step {steps:,}"


def _evaluations(config: RunConfig, held_out: int, steps: int | None) -> str:
    first = "one before step 1, " if config.eval.at_start else ""
    count = ""
    if steps is not None:
        regular = steps // config.eval.every + (steps % config.eval.every > 0)
        count = f"{regular + config.eval.at_start:,}: "
    return f"{count}{first}every {config.eval.every:,} steps and at the end, on {held_out:,} held-out pairs"


def _tokens(config: RunConfig, lengths: Lengths, steps: int | None, train: Batches) -> str:
    processed, loss_tokens = readable(lengths.processed), readable(lengths.loss_tokens)
    each = f"{processed} input tokens and {loss_tokens} completion tokens per pair on average"
    if steps is None:
        return each
    if config.train.tokens_per_batch is not None:
        return f"{each}; at most {steps * config.train.tokens_per_batch:,} input tokens in the run"
    pairs = getattr(train, "pairs", None)  # an epoch's last step may have fewer pairs than the others
    trained = steps * config.train.global_batch if pairs is None else train.epochs(steps) * len(pairs)
    return f"{each}; about {readable(lengths.processed * trained)} input tokens in the run"


def _memory_and_time(
    config: RunConfig, runtime: Runtime, lengths: Lengths, model_path: str, total: int | None, steps: int | None
) -> list[str]:
    """The planner's estimate, or one line with the reason why there is none."""
    backend = fit.backend_of(runtime)
    if backend is None:
        return [f"  memory and time: not estimated for the parallel backend {runtime.described_backend}"]
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
        batch = micro_batch_of(own, config)
        model = read_model(config, batch)
        assumed = Assumptions() if total is not None else Assumptions(overhead=0.0, tiles=TILES["cpu"])
        found = memory_of(config, model, batch, backend, runtime.world, assumed)
        fast, slow = seconds(own, config, model, backend)
    except Exception as error:  # the run itself reports what is wrong with its model; one without a plan may be right
        return [f"  memory and time: not estimated for this model: {str(error).partition(chr(10))[0]}"]
    parts = {
        "weights": found.weights,
        "gradients": found.gradients,
        "optimizer states": found.optimizer,
        "reference": found.reference,
        "activations": found.activations,
        "head": found.head,
        "communication": found.communication,
    }
    shown = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size >= 0.005 * found.total)
    of = "" if total is None else f" of the GPU's {_size(total)}"
    memory = f"  memory: {_size(found.total)}{of} per rank ({backend}): {shown}"
    low, high = speeds(own, config)
    step = "under 1 ms per step" if slow < 1e-3 else f"{_duration(fast)} to {_duration(slow)} per step"
    whole = ""
    if steps is not None:
        whole = f", {_duration(fast * steps)} to {_duration(slow * steps)} in total without evaluations"
    gpus = f"on {runtime.world} GPU(s) of {low:g} to {high:g} TFLOPS"
    return [memory, f"  time: {'not estimated for a CPU; ' if total is None else ''}{step}{whole} {gpus}"]


def _size(size: float) -> str:
    unit, name = next(((unit, name) for unit, name in ((GB, "GB"), (1e6, "MB")) if size >= unit), (1e3, "kB"))
    return f"{readable(size / unit, 3)} {name}"


def _duration(seconds: float) -> str:
    if seconds < 0.1:
        return f"{readable(seconds * 1000, 2)} ms" if seconds >= 1e-3 else "1 ms"
    if seconds < 120:
        return f"{readable(seconds, 2)} s"
    return f"{readable(seconds / 60, 2)} min" if seconds < 7200 else f"{readable(seconds / 3600, 2)} h"
