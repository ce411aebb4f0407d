"""What a run will hold on each GPU and how long a step will take, from its settings and the model's config alone.

Parameters are counted on the meta device, and what the backbone saves for its backward pass is counted by a forward
pass over fake tensors: no weight is made or read. What backends hold beside that is in closed form, from their sources.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from prefopt.errors import ConfigError
from prefopt.kernels.token_stats import TILES
from prefopt.settings import RunConfig
from prefopt.training import adapter_checks, adapter_loading, adapters, layout_choice, model_sources, models, towers
from prefopt.training.forward import statistics_for

BACKENDS = ("single process", "ddp", "zero1", "zero2", "zero3", "zero3 offload", "fsdp2")
GB = 1e9
# DeepSpeed's defaults, in entries of weights; configs/deepspeed/*.json leaves them as they are.
REDUCE_BUCKET = 500_000_000
MAX_LIVE = 1_000_000_000
GPU_OVERHEAD = 1.5 * GB  # a CUDA context, the libraries' workspaces and NCCL: a guess
# The constants that benchmarks/plan.py fitted.
ZERO3_ENDS = 2.0  # of embedding and head: copies of ZeRO-3's while they are gathered and their gradients sent
FSDP2_ENDS = 1.3  # of embedding and head of both models: what FSDP2 holds whole, copies in flight among it

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_STATES = {"adamw": 8.0, "adamw_8bit": 2.1, "paged_adamw_8bit": 2.1, "adafactor": 0.1, "rmsprop": 4.0, "sgd": 0.0}
_NF4 = 0.516  # bytes of an entry: 4 bits and, for each 64, a scale that is quantised itself


# The model -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """Bytes that a forward pass of the backbone saves for the backward pass.

    Args: layers: in all layers; outside: around them; casts: of weights that autocast rounds and keeps.
    """

    layers: int
    outside: int
    casts: int


@dataclass(frozen=True)
class Model:
    """What memory and time depend on.

    Args:
        weights: entries without an adapter; adapter: of what is trained beside them, or of modules trained whole in
            their place; trained: of all that is trained.
        embedding, head: entries of the two, which are one tensor where `tied`; layer: of the largest layer.
        matrices: entries of the backbone's matrices without the embedding: multiply-adds per token.
        width: size of the heads of one layer together.
        saved: where weights are held as `model.dtype` says; narrow: where a backend holds them in 16 bits.
    """

    weights: int
    trained: int
    adapter: int
    embedding: int
    head: int
    layer: int
    matrices: int
    hidden: int
    layers: int
    width: int
    vocabulary: int
    tied: bool
    head_trained: bool
    saved: Saved
    narrow: Saved


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one process: rows of `width` cells, `scored` positions among them."""

    rows: int
    width: int
    scored: int

    @property
    def cells(self) -> int:
        return self.rows * self.width


def batch_of(config: RunConfig, response: float) -> Batch:
    """The largest micro-batch: padded rows of data.max_length, of which a share `response` is scored."""
    rows = config.train.micro_batch * (2 if config.method.needs.rows == "pairs" else 1)
    return Batch(rows, config.data.max_length, max(1, round(rows * config.data.max_length * response)))


def read_model(config: RunConfig, batch: Batch) -> Model:
    """The model that `config` trains, as it is with this micro-batch.

    Raises: TrainError or ConfigError in one line for a model or an adapter that cannot be trained.
    """
    start = model_sources.find(str(config.model.path), config.model)
    architecture = models.load_config(start.base, start.base_settings(config.model))
    adapter_checks.check(config, start, architecture)
    text: Any = architecture.get_text_config()
    with torch.device("meta"):
        lm = _hollow(architecture, config, config.model.dtype)
    shape, layers = layout_choice.shape_of(lm), _layers(lm)
    embedding, head = lm.get_input_embeddings().weight, _head_of(lm).weight
    weights, layer = _numel(lm), max(_numel(layer) for layer in layers)
    with torch.device("meta"):
        lm = adapter_loading.attach_like(lm, config, start)
    narrow = {"bf16": "bfloat16", "fp16": "bfloat16"}.get(config.train.mixed_precision, config.model.dtype)
    saved = _saved(architecture, config, start, batch, len(layers), config.model.dtype)
    return Model(
        weights=weights,
        trained=sum(p.numel() for p in lm.parameters() if p.requires_grad),
        adapter=sum(p.numel() for p in lm.parameters()) - weights,
        embedding=embedding.numel(),
        head=head.numel(),
        layer=layer,
        matrices=shape.weights,
        hidden=int(text.hidden_size),
        layers=len(layers),
        width=shape.width,
        vocabulary=int(text.vocab_size),
        tied=head is embedding,
        head_trained=any(p.requires_grad for p in _head_of(lm).parameters()),
        saved=saved,
        narrow=saved
        if narrow == config.model.dtype
        else _saved(architecture, config, start, batch, len(layers), narrow, autocast=False),
    )


def _hollow(architecture: Any, config: RunConfig, dtype: str) -> Any:
    """A model of this architecture, on whatever device is the default."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    scores = config.method.needs.output == "scores"
    kind: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    architecture = copy.deepcopy(architecture)
    if scores:
        architecture.num_labels = 1
    try:
        with models.quiet_transformers():
            return kind.from_config(
                architecture,
                dtype=getattr(torch, dtype),
                # the others save what SDPA does, and may not be installed here
                attn_implementation=models.attention_of(
                    architecture, "eager" if config.model.attention == "eager" else "sdpa", kind
                ),
                trust_remote_code=config.model.trust_remote_code,
            )
    except Exception as error:
        raise models.load_error("model.path", str(config.model.path), error) from error


def _head_of(lm: Any) -> Any:
    """The output head, of a language model or a classifier."""
    base = adapters.base_of(lm)
    return getattr(base, "score", None) or base.get_output_embeddings()


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _layers(lm: nn.Module) -> list[nn.Module]:
    """The layers of the backbone: the list of modules that holds most weights."""
    lists = [module for module in lm.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ConfigError(f"model.path: {type(lm).__name__} has no list of layers, which a plan is made of")
    sizes = [_numel(layers) for layers in lists]
    return list(lists[sizes.index(max(sizes))])


def _saved(
    architecture: Any, config: RunConfig, start: Any, batch: Batch, layers: int, dtype: str, autocast: bool = True
) -> Saved:
    """What two layers save, counted over fake tensors, which have shapes and no values; the others save as much."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    short = copy.deepcopy(architecture)
    text: Any = short.get_text_config()
    text.num_hidden_layers = min(2, layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    autocast = autocast and config.train.mixed_precision != "no" and dtype != "float64"
    kept: dict[int, tuple[int, torch.Tensor]] = {}
    marks: list[int] = []

    def held() -> int:
        return sum(size for size, _ in kept.values())

    with torch.device("meta"):
        lm = adapter_loading.attach_like(_hollow(short, config, dtype), config, start)
    with FakeTensorMode(allow_non_fake_inputs=True):
        towers.off_meta(lm)
        weights = {p.untyped_storage()._cdata for p in lm.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = (storage.nbytes(), tensor)
            return tensor

        run = _layers(lm)
        for layer in run:
            layer.register_forward_pre_hook(lambda *_: marks.append(held()))
        ids = torch.zeros(batch.rows, batch.width, dtype=torch.long)
        positions = torch.arange(batch.width).expand(batch.rows, batch.width)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            adapters.base_of(lm).base_model(input_ids=ids, position_ids=positions, use_cache=False)
        layer_bytes = (held() - marks[0]) // len(run) if len(run) < 2 else marks[1] - marks[0]
        outside = held() - layer_bytes * len(run)
        rounded = autocast and dtype == "float32"
        linear: list[Any] = [m for m in run[0].modules() if adapters.is_linear(m)]
        casts = 2 * sum(m.weight.numel() for m in linear) if rounded else 0
    return Saved((layer_bytes - casts) * layers, max(0, outside), casts * layers)


def starting_host(config: RunConfig, model: Model, backend: str, ranks: int) -> float:
    """Bytes of its host's memory that a rank holds while models are loaded, before they are on its GPU.

    ZeRO-3 shards them as they are read; under every other backend each rank reads them whole.
    """
    entries = model.weights + model.adapter + _live_reference(config, model)
    return _BYTES[config.model.dtype] * entries / (ranks if backend.startswith("zero3") else 1)


# Memory --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank under one backend, `host` of its host's. `total` is the largest sum at one time."""

    backend: str
    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    reference: float
    buffers: float
    total: float
    host: float = 0.0


def memory(config: RunConfig, model: Model, batch: Batch, backend: str, gpus: int, **how: Any) -> Memory:
    """What one rank holds.

    Args:
        gpus: ranks; one process has one of them.
        how: `reduce_bucket` entries of DeepSpeed's buffer, `overhead` bytes of the device's own, `accumulates` whether
            a step has several micro-batches, `tiles` of the head, where they are not those of a GPU.
    """
    ranks = 1 if backend == "single process" else gpus
    bucket, overhead = how.get("reduce_bucket", REDUCE_BUCKET), how.get("overhead", GPU_OVERHEAD)
    accumulates = how.get("accumulates", config.train.global_batch > config.train.micro_batch * ranks)
    zero = int(backend[4]) if backend.startswith("zero") else 0
    sharded, mixed = zero or backend == "fsdp2", config.train.mixed_precision != "no"
    wide = _BYTES[config.model.dtype]
    narrow = 2 if mixed and sharded else wide  # what products are made of
    cut = ranks if zero == 3 or backend == "fsdp2" else 1
    frozen = model.weights + model.adapter - model.trained
    trained_bytes = 4 if model.adapter else wide  # of an adapter's weights

    # what is there all the time
    at_rest = narrow if zero else trained_bytes
    kept = (_frozen_bytes(config, model, frozen, narrow if zero else wide) + model.trained * at_rest) / cut
    master = 4 * model.trained / ranks if zero else 0.0  # ZeRO's own copy in 32 bits
    states = _STATES.get(config.optim.name, 8.0) * model.trained / (ranks if zero else cut)
    states *= 1 if zero or config.optim.name.endswith("8bit") else trained_bytes / 4
    optimizer = master + states
    reference = _reference(config, model, narrow if zero else wide, cut)

    # gradients, and what they travel in
    grad = narrow if zero else trained_bytes
    # micro-batches add up in 32 bits, whatever weights are held in; ZeRO-1 holds the last one's beside their sum
    added = 4.0 if zero or accumulates else float(grad)
    added += grad if zero == 1 and grad < 4 else 0
    # FSDP2 cuts them when they are sent, with the last micro-batch of a step
    together = backend == "fsdp2" and not accumulates
    gradients = added * model.trained / (ranks if zero >= 2 or together else 1)
    buffers = 0.0
    ends = model.head if model.tied else model.embedding + model.head
    if backend == "ddp":
        buffers = grad * model.trained  # buckets of the same size
    elif zero in (1, 2):
        twice = zero == 2 and how.get("overlap", True)  # as configs/deepspeed/zero2.json has it
        buffers = grad * bucket * (1 + twice)
    elif zero == 3:
        live = min(model.weights + model.adapter + _live_reference(config, model), MAX_LIVE + model.head)
        buffers = narrow * (live + ZERO3_ENDS * ends) + grad * model.hidden**2
    elif backend == "fsdp2":
        pair = FSDP2_ENDS * ends * (2 if _live_reference(config, model) else 1)
        buffers = narrow * (pair + 2 * model.layer)

    # a micro-batch
    saved = model.narrow if sharded and mixed else model.saved
    stream = batch.cells * model.hidden * (2 if mixed or wide == 2 else wide)
    layer = (saved.layers + saved.casts) / model.layers
    waiting: float = saved.outside + saved.layers + saved.casts  # for the backward pass, while the head is at work
    if config.model.gradient_checkpointing:
        waiting = saved.outside + model.layers * stream
    elif config.model.offload_activations:
        waiting = saved.outside + 2 * layer
    again = layer if config.model.gradient_checkpointing else 0.0
    forward, backward, d_weight = _head(config, model, batch, narrow if sharded else (2 if mixed else wide), grad, how)
    whole = 0.0  # gradients of the layers at work, before they are cut
    if zero >= 2 or backend == "fsdp2":
        whole = grad * model.trained / model.weights * (model.embedding + 2 * model.layer)
    # ZeRO-3 lets go of what its backward pass has gone through
    released = narrow * min(model.weights - ends - 2 * model.layer, MAX_LIVE) if zero == 3 else 0.0
    before = gradients if accumulates else 0.0
    resident = kept + optimizer + reference + buffers + overhead
    if zero == 3:
        resident += gradients  # a buffer that is always there
        before = 0.0
    after = 0.0 if zero == 3 else gradients
    peak = resident + max(
        before + waiting + forward,
        before + waiting + backward + d_weight,
        before + waiting + d_weight + again,
        after + saved.outside + layer + whole - released,
        after + (4 * model.trained / ranks if zero else 0.0) - released,  # the step's copy of its gradients in 32 bits
    )
    found = Memory(
        backend=backend,
        weights=kept,
        gradients=gradients,
        optimizer=optimizer,
        activations=waiting + again,
        head=max(forward, backward + d_weight),
        reference=reference,
        buffers=buffers,
        total=peak,
    )
    if not backend.endswith("offload"):
        return found
    away = kept + reference + optimizer + gradients
    return replace(found, total=peak - away, host=away, weights=0.0, optimizer=0.0, reference=0.0, gradients=0.0)


def _frozen_bytes(config: RunConfig, model: Model, entries: int, wide: float) -> float:
    """Of weights that stand still under an adapter; embedding and head are not quantised."""
    if config.model.quantize is None:
        return wide * entries
    whole = model.embedding + (0 if model.tied else model.head)
    return wide * min(entries, whole) + _NF4 * max(0, entries - whole)


def _live_reference(config: RunConfig, model: Model) -> int:
    """Entries of a frozen copy that is held beside the policy."""
    needs = config.method.needs.reference != "none"
    own = model.adapter and config.reference.path is None
    return model.weights if needs and not own and config.reference.cache == "none" else 0


def _reference(config: RunConfig, model: Model, wide: float, cut: int) -> float:
    """Bytes of what a rank holds of the reference beside the policy's own weights."""
    if config.reference.cache == "hidden" and not model.adapter:
        return wide * model.head / cut
    return wide * _live_reference(config, model) / cut


def _head(
    config: RunConfig, model: Model, batch: Batch, wide: int, grad: float, how: dict[str, Any]
) -> tuple[float, float, float]:
    """(bytes of logits in the forward pass, in the backward pass, of the gradient of the head's weight)."""
    if config.method.needs.output == "scores":
        return 0.0, 0.0, 0.0
    default = how.get("tiles", TILES["cuda"])
    want = statistics_for(config.method.needs)
    compared, pairwise = "ref_logp" in want and config.reference.cache != "logps", "kl" in want
    columns = min(config.kernel.vocab_tile or default[1], model.vocabulary)
    slack = max(1, (config.kernel.vocab_tile or default[1]) // model.vocabulary)
    rows = min((config.kernel.token_tile or default[0]) * slack, batch.scored)
    tile, stat = 4.0 * rows * columns, 8 if wide == 8 else 4
    tile *= stat / 4
    whole = stat * batch.scored * model.vocabulary * (1 + pairwise)
    kept = min(whole, config.kernel.cache_mb * 2**20)
    missing = whole > kept  # then a product is made again, in a buffer
    states = batch.scored * model.hidden * (2 * wide + stat)
    forward = kept + tile * (1 + missing + (2 if compared else 0) + (1 if pairwise else 0)) + states
    backward = kept + tile * (2 + missing + ((1 + missing) if pairwise else 0)) + states
    backward += stat * columns * model.hidden if wide < stat else 0  # a tile of the weight's gradient in 32 bits
    return forward, backward, grad * model.head if model.head_trained else 0.0
