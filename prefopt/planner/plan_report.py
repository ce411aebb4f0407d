"""The page that `prefopt plan` prints: a row per backend, what a step costs, and which backend to take."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from prefopt import settings
from prefopt.errors import ConfigError
from prefopt.planner import plan
from prefopt.planner.plan import GB, Batch, Memory, Model
from prefopt.settings import RunConfig
from prefopt.settings.plan import PlanConfig
from prefopt.training import backends, layout_choice, model_sources

ROOM = 0.9  # of a GPU that a plan may fill: allocators leave gaps, and rows differ
TFLOPS = {2: (200.0, 450.0), 4: (20.0, 45.0)}  # of an H100 in training, by bytes of what products are made of
HOST_BANDWIDTH = 20.0  # GB/s between a GPU and its host's memory; a guess
HOST_UPDATES = 0.5e9  # weights that one rank's share of the host updates in a second; a guess
FASTER = 1.5  # times as fast as in float32 must bf16 be to be recommended in its place
TIE = 1.02  # a backend that is less than this faster is no reason to leave a simpler one


@dataclass(frozen=True)
class Row:
    """One backend: what it holds, the seconds of a step (fast, slow), and why it cannot be, if so."""

    memory: Memory
    seconds: tuple[float, float]
    refused: str | None
    fits: bool
    host: float = 0.0  # bytes of a node's host at the most
    hours: tuple[float, float] | None = None  # of an epoch, where the number of pairs is known


def report(own: PlanConfig, config: RunConfig) -> str:
    """The page. Raises: ConfigError or TrainError in one line, for a model that cannot be trained as `config` says."""
    model, rows = planned(own, config)
    lora = f", {model.trained:,} of them trained" if model.trained != model.weights else ""
    batch = batch_of(own, config)
    lines = [
        f"{config.model.path}: {model.weights + model.adapter:,} parameters{lora}, in {config.model.dtype}"
        + (f" with {config.train.mixed_precision}" if config.train.mixed_precision != "no" else ""),
        f"a micro-batch: {batch.rows} sequences of up to {batch.width} tokens, {batch.scored} tokens scored"
        + ("; activations are recomputed" if config.model.gradient_checkpointing else ""),
        f"reference: {reference_line(config, model)}",
        f"GB of one of {own.gpus} GPU(s) of {number(own.gpu_memory)} GB; parts do not peak together, total is their "
        f"largest sum at one time; host: GB of a node's host at most, with {min(own.gpus, own.gpus_per_node)} rank(s)",
        "",
        *table(rows),
        "",
        *cache_lines(own, config, model),
        steps_line(own, config, model),
        *advice(own, config, rows),
    ]
    return "\n".join(lines)


def batch_of(own: PlanConfig, config: RunConfig) -> Batch:
    """The largest micro-batch, scored as far as the mean row is."""
    prompt, response = own.prompt_tokens or 1, own.completion_tokens or 1
    return plan.batch_of(config, response / (prompt + response))


def planned(own: PlanConfig, config: RunConfig) -> tuple[Model, list[Row]]:
    """The model, and a row for each backend."""
    batch = batch_of(own, config)
    model = plan.read_model(config, batch)
    rows = []
    pairs = pairs_of(own, config)
    steps = None if pairs is None else max(1, pairs // config.train.global_batch)
    for backend in plan.BACKENDS:
        memory = plan.memory(config, model, batch, backend, own.gpus)
        refused = refusal(own, config, backend)
        fits = refused is None and memory.total <= ROOM * own.gpu_memory * GB
        ranks = 1 if backend == "single process" else own.gpus
        host = min(ranks, own.gpus_per_node) * max(memory.host, plan.starting_host(config, model, backend, ranks))
        low, high = seconds(own, config, model, backend)
        hours = None if steps is None else (low * steps / 3600, high * steps / 3600)
        rows.append(Row(memory, (low, high), refused, fits, host, hours))
    return model, rows


def refusal(own: PlanConfig, config: RunConfig, backend: str) -> str | None:
    """Why a backend cannot run this, or None."""
    if backend == "single process":
        return None
    if own.gpus == 1:
        return "needs several GPUs"
    if config.method.needs.coupled:
        return "the method looks at a batch as a whole"
    if backend == "ddp":
        return None
    try:
        backends.check_supported(config, backend.partition(" ")[0])
    except ConfigError as error:
        return str(error).partition(",")[0].replace("found ", "")
    return None


# Time ----------------------------------------------------------------------------------------------------------------


def flops(own: PlanConfig, config: RunConfig, model: Model) -> float:
    """Floating-point operations of a step, over all ranks.

    A multiply-add counts two. The backward pass of a weight that is trained costs two forward passes, of one that is
    not, one; recomputing costs another, a live reference one.
    """
    pairs, both = config.train.global_batch, config.method.needs.rows == "pairs"
    prompt, response = own.prompt_tokens or 1, own.completion_tokens or 1
    parts = np.array([(prompt, response)] * (2 if both else 1), np.int64)
    shape = layout_choice.Shape(model.layers, model.width, model.matrices)
    asked = config.train.layout
    possible = layout_choice.possible_layouts(config.method.needs, "by_unit") if asked == "auto" else (asked,)
    works = [layout_choice.work(parts, layout, "by_unit", shape, "cuda") for layout in possible]
    work = min(works, key=lambda work: layout_choice.seconds(work, layout_choice.SPEEDS["cuda"]))
    forward = 2 * work.linear + 4 * (work.causal + work.masked)
    head = 2.0 * len(parts) * response * model.vocabulary * model.hidden
    if config.method.needs.output == "scores":
        head = 0.0
    backward = 1 if model.adapter else 2
    times = 1 + backward + config.model.gradient_checkpointing
    scores = config.method.needs.reference != "none" and config.reference.cache == "none"
    compares = config.method.needs.reference == "token" or scores
    total = forward * (times + scores) + head * (2 + model.head_trained + compares)
    return pairs * total


def volume(own: PlanConfig, config: RunConfig, model: Model, backend: str) -> float:
    """Bytes that a rank sends in a step, and receives."""
    if backend == "single process" or own.gpus == 1:
        return 0.0
    share = 1 - 1 / own.gpus
    passes = micro_batches(own, config, backend)
    wide = plan._BYTES[config.model.dtype]
    narrow = 2 if config.train.mixed_precision != "no" else wide
    live = plan._live_reference(config, model)
    gradients = (4 if model.adapter else wide) * model.trained
    if backend == "ddp":
        return 2 * share * gradients
    if backend in ("zero1", "zero2"):
        again = passes if backend == "zero2" else 1
        return share * narrow * model.trained * (again + 1) + (share * narrow * model.trained if again == 1 else 0)
    gathered = share * narrow * (2 * (model.weights + model.adapter) + live)
    reduced = share * (4 if backend == "fsdp2" else narrow) * model.trained
    return passes * gathered + (1 if backend == "fsdp2" else passes) * reduced


def micro_batches(own: PlanConfig, config: RunConfig, backend: str) -> int:
    """Forward passes of a rank in a step."""
    ranks = 1 if backend == "single process" else own.gpus
    return max(1, -(-config.train.global_batch // (ranks * config.train.micro_batch)))


def seconds(own: PlanConfig, config: RunConfig, model: Model, backend: str) -> tuple[float, float]:
    """(fast, slow): compute and communication at the same time, or one after the other."""
    ranks = 1 if backend == "single process" else own.gpus
    narrow = config.train.mixed_precision != "no" or config.model.dtype == "bfloat16"
    low, high = own.tflops or TFLOPS[2 if narrow else 4]
    work = flops(own, config, model) / ranks / 1e12
    sent = volume(own, config, model, backend) / own.bandwidth / GB
    moved = 0.0
    if backend.endswith("offload"):
        bytes_ = 2 if narrow else 4
        passes = micro_batches(own, config, backend)
        once = bytes_ * (model.weights + model.adapter) / ranks
        moved = (2 * passes * once + 2 * bytes_ * model.trained / ranks) / HOST_BANDWIDTH / GB
        moved += model.trained / ranks / HOST_UPDATES
    return max(work / high, sent) + moved, work / low + sent + moved


# Words ---------------------------------------------------------------------------------------------------------------

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


def table(rows: list[Row]) -> Iterator[str]:
    """Lines of the table, columns aligned."""
    columns = _COLUMNS if rows[0].hours is None else (*_COLUMNS, _EPOCH)
    cells: list[tuple[str, ...]] = [columns]
    for row in rows:
        m = row.memory
        parts = (m.weights, m.gradients, m.optimizer, m.activations, m.head, m.reference, m.buffers, m.total)
        fits = "no: " + row.refused if row.refused else ("yes" if row.fits else "no")
        epoch = () if row.hours is None else (span(row.hours),)
        cells.append((m.backend, *map(_gb, parts), fits, _gb(row.host), span(row.seconds), *epoch))
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        first, *others = (
            cell.ljust(width) if i in (0, 9) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        yield "  ".join([first, *others]).rstrip()


def _gb(size: float) -> str:
    return f"{size / GB:,.1f}" if size >= 0.05 * GB or size == 0 else number(size / GB)


def number(value: float) -> str:
    """Three digits, and never an exponent."""
    if value >= 999.5:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 1e-4 or value == 0 else f"{value:.10f}".rstrip("0").rstrip(".") or "0"


def span(values: tuple[float, float]) -> str:
    """From the fast end to the slow one."""
    return f"{number(values[0])} to {number(values[1])}"


def reference_line(config: RunConfig, model: Model) -> str:
    """What a rank has of the reference."""
    if config.method.needs.reference == "none":
        return "none, the method reads none"
    if config.reference.cache == "logps":
        return "kept log-probabilities; nothing is held"
    if config.reference.cache == "hidden":
        return "kept hidden states; its head alone is held"
    if model.adapter and config.reference.path is None:
        return "the base weights under the adapter; nothing more is held"
    return "a frozen copy"


def pairs_of(own: PlanConfig, config: RunConfig) -> int | None:
    """How many pairs there are, if that is said or cheap to see."""
    if own.pairs is not None:
        return own.pairs
    files = [Path(name) for name in settings.sources(config.data.train)]
    if not files or not all(path.is_file() and path.suffix == ".jsonl" for path in files):
        return None
    return sum(sum(1 for _ in path.open("rb")) for path in files)


def cache_lines(own: PlanConfig, config: RunConfig, model: Model) -> list[str]:
    """What the kept values of a reference take on disk."""
    needs = config.method.needs
    if needs.reference == "none":
        return []
    pairs = pairs_of(own, config)
    if pairs is None:
        return ["cache of the reference: name --pairs for its size on disk"]
    sides = 2 if needs.rows == "pairs" else 1
    tokens = pairs * sides * (own.completion_tokens or 1)
    stored = 8 if config.model.dtype == "float64" else 4
    hidden = tokens * model.hidden * plan._BYTES[config.reference.cache_dtype]
    said = f"cache of the reference for {pairs:,} pairs: hidden {number(hidden / GB)} GB on disk"
    if needs.reference == "sequence":
        said += f", logps {number(tokens * stored / GB)} GB"
    return [said + ("" if config.reference.cache == "none" else f" (found reference.cache {config.reference.cache})")]


def steps_line(own: PlanConfig, config: RunConfig, model: Model) -> str:
    """What the time is made of."""
    narrow = config.train.mixed_precision != "no" or config.model.dtype == "bfloat16"
    low, high = own.tflops or TFLOPS[2 if narrow else 4]
    return (
        f"a step: {config.train.global_batch} pairs of {own.prompt_tokens} + {own.completion_tokens} tokens, "
        f"{number(flops(own, config, model) / 1e15)} PFLOP at {number(low)} to {number(high)} TFLOPS a GPU, "
        f"communication at {number(own.bandwidth)} GB/s beside it or after it"
    )


def recommended(rows: list[Row]) -> Row | None:
    """The fastest that fits by its slow end; of those that are as fast, the one that does least."""
    fitting = [row for row in rows if row.fits]
    if not fitting:
        return None
    best = min(row.seconds[1] for row in fitting)
    return next(row for row in fitting if row.seconds[1] <= TIE * best)


_FILES = {backend: f"configs/accelerate/{backend.replace(' ', '_')}.yaml" for backend in plan.BACKENDS[1:]}


def advice(own: PlanConfig, config: RunConfig, rows: list[Row]) -> list[str]:
    """Which backend to take and why, or what to change."""
    best = recommended(rows)
    if best is None:
        return what_to_change(own, config)
    name = best.memory.backend
    small = [row.memory.backend for row in rows if row.refused is None and not row.fits]
    why = f"{best.memory.total / GB:.1f} GB of {number(own.gpu_memory)}"
    if small:
        why += f", where {', '.join(small)} would not fit"
    if sum(row.fits for row in rows) > 1:
        why += "; of those that fit, the soonest done by the slow end of its range"
    start = "python scripts/train.py" if name == "single process" else f"--config_file {_FILES[name]}"
    faster = in_16_bits(own, config)
    better = None if faster is None else recommended(planned(own, faster)[1])
    if better is None or better.seconds[1] * FASTER > best.seconds[1]:
        return [f"recommended: {name} ({start}): {why}"]
    other = better.memory.backend
    start_other = "python scripts/train.py" if other == "single process" else f"--config_file {_FILES[other]}"
    return [
        f"as it is, in float32: {name} ({start}): {why}",
        f"recommended: --train.mixed_precision bf16 with {other} ({start_other}): {span(better.seconds)} s a step in "
        f"place of {span(best.seconds)}, {better.memory.total / GB:.1f} GB of {number(own.gpu_memory)}; statistics and "
        "the weights that are updated stay in float32",
    ]


def in_16_bits(own: PlanConfig, config: RunConfig) -> RunConfig | None:
    """The run with products in bfloat16, where it makes them in float32 and their speed is not given."""
    wide = config.train.mixed_precision == "no" and config.model.dtype == "float32"
    if not wide or own.tflops is not None:
        return None
    return replace(config, train=replace(config.train, mixed_precision="bf16"))


def what_to_change(own: PlanConfig, config: RunConfig) -> list[str]:
    """The changes, one after the other, after which a backend fits."""
    lines: list[str] = []
    for words, changed in changes(config):
        lines.append(words)
        _, rows = planned(replace_lengths(own, changed), changed)
        best = recommended(rows)
        if best is not None:
            said = f"{best.memory.backend} then needs {best.memory.total / GB:.1f} GB"
            return ["nothing fits as it is; change " + ", ".join(lines) + f": {said}"]
    return ["nothing fits, even with " + ", ".join(lines) + "; expected more GPUs, or a smaller model"]


def replace_lengths(own: PlanConfig, config: RunConfig) -> PlanConfig:
    """The mean lengths, where rows have become shorter than they were."""
    prompt, response, longest = own.prompt_tokens or 1, own.completion_tokens or 1, config.data.max_length
    share = min(1.0, longest / (prompt + response))
    return replace(own, prompt_tokens=max(1, int(prompt * share)), completion_tokens=max(1, int(response * share)))


def changes(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """(the flag, the settings with it and with all before it), those first that change no result."""

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
    stands = config.reference.cache == "none" and config.reference.sync_every is None and config.lora.r is None
    if needs != "none" and stands:
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
