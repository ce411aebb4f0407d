"""The page that `prefopt plan` prints: a table row per backend, what a step costs, and which backend to take."""

from __future__ import annotations

from collections.abc import Iterator

from prefopt.planner.activations import BYTES
from prefopt.planner.advice import advice
from prefopt.planner.backend_plans import BackendPlan, micro_batch_of, pairs_of, plans_of
from prefopt.planner.memory import GB, GPU_OVERHEAD
from prefopt.planner.model_counts import ModelCounts
from prefopt.planner.numbers import gigabytes, number, span
from prefopt.planner.step_time import flops, speeds
from prefopt.settings import RunConfig
from prefopt.settings.plan import PlanConfig

_COLUMNS = (
    "backend",
    "weights",
    "grads",
    "optim",
    "activ",
    "head",
    "ref",
    "comm",
    "total",
    "fits",
    "host",
    "s per step",
)
_EPOCH = "h per epoch"
_LEFT_ALIGNED = (0, _COLUMNS.index("fits"))


def report(own: PlanConfig, config: RunConfig) -> str:
    """The page. Raises: ConfigError or TrainError in one line, for a model that cannot be trained as `config` says."""
    model, plans = plans_of(own, config)
    trained = f", {model.trained:,} of them trained" if model.trained != model.parameters else ""
    batch = micro_batch_of(own, config)
    node_ranks = min(own.gpus, own.gpus_per_node)
    lines = [
        f"{config.model.path}: {model.parameters + model.adapter:,} parameters{trained}, in {config.model.dtype}"
        + (f" with {config.train.mixed_precision}" if config.train.mixed_precision != "no" else ""),
        f"micro-batch: {batch.rows} sequences of up to {batch.width} tokens, {batch.completion_tokens} of them in "
        "completions" + ("; gradient checkpointing" if config.model.gradient_checkpointing else ""),
        f"reference: {reference_line(config, model)}",
        "",
        f"GB per GPU, for {own.gpus} GPU(s) of {number(own.gpu_memory)} GB; total: the largest sum at one time, with "
        f"{number(GPU_OVERHEAD / GB)} GB for CUDA and NCCL (the columns do not peak together);",
        f"host: GB of host memory that a node of {node_ranks} rank(s) needs at most",
        "",
        *table(plans),
        "",
        *cache_lines(own, config, model),
        step_line(own, config, model),
        *advice(own, config, plans),
    ]
    return "\n".join(lines)


def table(plans: list[BackendPlan]) -> Iterator[str]:
    """Lines of the table, columns aligned."""
    columns = _COLUMNS if plans[0].hours is None else (*_COLUMNS, _EPOCH)
    table_rows: list[tuple[str, ...]] = [columns]
    for plan in plans:
        m = plan.memory
        parts = (m.weights, m.gradients, m.optimizer, m.activations, m.head, m.reference, m.communication, m.total)
        fits = "no: " + plan.refused if plan.refused else ("yes" if plan.fits else "no")
        epoch = () if plan.hours is None else (span(plan.hours),)
        table_rows.append((m.backend, *map(gigabytes, parts), fits, gigabytes(plan.host), span(plan.seconds), *epoch))
    widths = [max(len(row[i]) for row in table_rows) for i in range(len(columns))]
    for row in table_rows:
        padded = (
            text.ljust(width) if i in _LEFT_ALIGNED else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(padded).rstrip()


def reference_line(config: RunConfig, model: ModelCounts) -> str:
    """What a rank holds of the reference model."""
    if config.method.needs.reference == "none":
        return "none; the method does not read one"
    if config.reference.cache == "logps":
        return "cached log-probabilities; no reference model is loaded"
    if config.reference.cache == "hidden":
        return "cached hidden states; only the reference's head is loaded"
    if model.adapter and config.reference.path is None:
        return "the base weights without the adapter; they are not loaded twice"
    return "a frozen copy of the model"


def cache_lines(own: PlanConfig, config: RunConfig, model: ModelCounts) -> list[str]:
    """Size of the reference cache on disk."""
    needs = config.method.needs
    if needs.reference == "none":
        return []
    pairs = pairs_of(own, config)
    if pairs is None:
        return ["reference cache: give --pairs to see its size on disk"]
    sides = 2 if needs.rows == "pairs" else 1
    tokens = pairs * sides * (own.completion_tokens or 1)
    stored = 8 if config.model.dtype == "float64" else 4
    hidden = tokens * model.hidden_size * BYTES[config.reference.cache_dtype]
    line = f"reference cache of {pairs:,} pairs on disk: {number(hidden / GB)} GB with reference.cache hidden"
    if needs.reference == "sequence":
        line += f", {number(tokens * stored / GB)} GB with logps"
    return [line + ("" if config.reference.cache == "none" else f" (reference.cache is {config.reference.cache})")]


def step_line(own: PlanConfig, config: RunConfig, model: ModelCounts) -> str:
    """What the seconds of a step are computed from."""
    low, high = speeds(own, config)
    return (
        f"step: {config.train.global_batch} pairs of {own.prompt_tokens} prompt and {own.completion_tokens} completion "
        f"tokens, {number(flops(own, config, model) / 1e15)} PFLOP at {number(low)} to {number(high)} TFLOPS per GPU; "
        f"communication at {number(own.bandwidth)} GB/s, overlapping compute (fast) or not (slow)"
    )
