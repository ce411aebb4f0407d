"""Memory of one rank under each parallel backend: one function per backend, with formulas from the backends' sources.

Symbols of the formulas, which are those of ZeRO (Rajbhandari et al., 2020, arXiv 1910.02054, section 3) if it has them:

    P, A, T, F   parameters: of the model, added by an adapter, trained, frozen (F = P + A - T)
    N            ranks
    w            bytes of a weight in `model.dtype`
    c            bytes of a weight in a matmul: 2 under mixed precision, else w
    t            bytes of a trained weight: 4 if an adapter is trained, else w
    K            bytes of optimizer states per trained parameter, for 32-bit weights: AdamW 8

Every backend accumulates the gradients of micro-batches in 32 bits (`training.backends`), for any dtype of the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from prefopt.kernels.token_stats import TILES
from prefopt.planner.activations import BYTES, HeadMemory, MicroBatch, head_memory
from prefopt.planner.model_counts import ModelCounts
from prefopt.settings import RunConfig

GB = 1e9
GPU_OVERHEAD = 1.5 * GB  # an estimate of the CUDA context, the libraries' workspaces and NCCL's buffers
# DeepSpeed's defaults, in parameters; configs/deepspeed/*.json does not change them.
REDUCE_BUCKET = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
# Fitted by benchmarks/plan.py, as multiples of the parameters of embedding and head.
ZERO3_GATHERED = 2.0  # these weights while ZeRO-3 gathers them and reduces their gradients
FSDP2_GATHERED = 1.3  # of policy and of reference: FSDP2 gathers its root group in full, plus copies in transfer

# K, bytes of optimizer states per trained parameter. AdamW has exp_avg and exp_avg_sq, 4 bytes each, or 1 byte each
# and scales per block in 8 bits; Adafactor has one value per row and column of a matrix.
OPTIMIZER_STATES = {
    "adamw": 8.0,
    "adamw_8bit": 2.1,
    "paged_adamw_8bit": 2.1,
    "adafactor": 0.1,
    "rmsprop": 4.0,
    "sgd": 0.0,
}
# Bytes of a quantised parameter: 4 bits, and one 8-bit scale per block of 64 parameters (double quantisation).
NF4_BYTES = 0.516


@dataclass(frozen=True)
class Assumptions:
    """Values that the settings of a run do not determine.

    Args:
        reduce_bucket: parameters in DeepSpeed's gradient bucket.
        overhead: bytes used by the device's runtime itself.
        accumulates: whether a step has several micro-batches. None: derived from the batch sizes.
        overlap: ZeRO-2's `overlap_comm`; configs/deepspeed/zero2.json sets it.
        tiles: (token_tile, vocab_tile) of the head if the settings do not give them.
    """

    reduce_bucket: int = REDUCE_BUCKET
    overhead: float = GPU_OVERHEAD
    accumulates: bool | None = None
    overlap: bool = True
    tiles: tuple[int, int] = TILES["cuda"]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank under one backend.

    Args:
        activations: saved for the backward pass; with checkpointing, one recomputed layer is included.
        head: peak of logits and gradient of the head's weight.
        communication: buckets and gathered weights.
        total: the peak; less than the sum of the parts, because these do not peak at the same time.
        host: bytes of the host's memory, if the backend offloads to it.
    """

    backend: str
    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    reference: float
    communication: float
    total: float
    host: float = 0.0


@dataclass(frozen=True)
class Rank:
    """The inputs of every backend's formula: the settings, the model, one micro-batch and the number of ranks."""

    config: RunConfig
    model: ModelCounts
    batch: MicroBatch
    ranks: int
    assumptions: Assumptions

    @property
    def frozen(self) -> int:
        """F, parameters that are not trained."""
        return self.model.parameters + self.model.adapter - self.model.trained

    @property
    def mixed(self) -> bool:
        return self.config.train.mixed_precision != "no"

    @property
    def weight_bytes(self) -> int:
        """w, bytes of a weight in `model.dtype`."""
        return BYTES[self.config.model.dtype]

    @property
    def compute_bytes(self) -> int:
        """c, bytes of a weight in a matmul."""
        return 2 if self.mixed else self.weight_bytes

    @property
    def trained_bytes(self) -> int:
        """t, bytes of a trained weight: an adapter is float32, also over a base of 16 or 4 bits."""
        return 4 if self.model.adapter else self.weight_bytes

    @property
    def accumulates(self) -> bool:
        """Whether a step has several micro-batches, so that gradients are held in between."""
        given = self.assumptions.accumulates
        train = self.config.train
        return train.global_batch > train.micro_batch * self.ranks if given is None else given

    @property
    def optimizer_states(self) -> float:
        """K T, bytes of the optimizer states of all ranks together, for 32-bit weights."""
        # a class given by its dotted path is assumed to have as many states as AdamW
        return OPTIMIZER_STATES.get(self.config.optim.name, 8.0) * self.model.trained

    @property
    def states_scale(self) -> float:
        """t / 4, the factor of K for states in the dtype of the trained weights; 8-bit states do not depend on it."""
        return 1.0 if self.config.optim.name.endswith("8bit") else self.trained_bytes / 4

    @property
    def reference_entries(self) -> int:
        """Parameters of a separate reference model on this rank."""
        return live_reference(self.config, self.model)

    def frozen_weights(self, each: int) -> float:
        """Bytes of frozen weights at `each` bytes per weight; under NF4 that applies to embedding and head only."""
        if self.config.model.quantize is None:
            return float(each * self.frozen)
        plain = self.model.embedding_and_head  # bitsandbytes does not quantise them
        return each * min(self.frozen, plain) + NF4_BYTES * max(0, self.frozen - plain)

    def reference(self, each: int) -> float:
        """Bytes of the reference in addition to the policy: a frozen model, or its head if hidden states are cached."""
        # cached hidden states (N, H) still need the reference's head (V, H); with an adapter it is the policy's own
        if self.config.reference.cache == "hidden" and not self.model.adapter:
            return float(each * self.model.head)
        return float(each * self.reference_entries)

    def layer_gradients(self, each: int) -> float:
        """Bytes of unreduced gradients at one time: of the embedding and of two layers, before reduce-scatter.

        With an adapter only the fraction T / P of their parameters has gradients.
        """
        model = self.model
        return each * model.trained / model.parameters * (model.embedding + 2 * model.largest_layer)

    @functools.cached_property
    def head(self) -> HeadMemory:
        return head_memory(
            self.config,
            self.batch,
            self.model.hidden_size,
            self.model.vocabulary,
            self.compute_bytes,
            self.assumptions.tiles,
        )


def live_reference(config: RunConfig, model: ModelCounts) -> int:
    """Parameters of a frozen reference model that a rank holds in addition to the policy; 0 if there is none.

    With an adapter the base weights are the reference. A cached reference is not loaded.
    """
    reads = config.method.needs.reference != "none"
    under_adapter = model.adapter and config.reference.path is None
    return model.parameters if reads and not under_adapter and config.reference.cache == "none" else 0


def host_while_loading(config: RunConfig, model: ModelCounts, backend: str, ranks: int) -> float:
    """Bytes of host memory that a rank uses while models are loaded, before they are moved to its GPU.

    ZeRO-3 shards weights while they are read; under every other backend each rank reads them in full.
    """
    # policy and reference are on the host at the same time
    parameters = model.parameters + model.adapter + live_reference(config, model)
    return BYTES[config.model.dtype] * parameters / (ranks if backend.startswith("zero3") else 1)


# One function per backend --------------------------------------------------------------------------------------------


def single_process(rank: Rank) -> Memory:
    """All weights, gradients and states on one device, without communication.

    weights = w F + t T; gradients = 4 T if a step accumulates, else t T; optimizer = K T (t / 4).
    """
    return _replicated(rank, "single process", gradient_buckets=0.0)


def ddp(rank: Rank) -> Memory:
    """As a single process, with t T of gradient buckets in addition.

    torch's reducer copies gradients into buckets of the same total size, because `gradient_as_bucket_view` is off.
    """
    return _replicated(rank, "ddp", gradient_buckets=float(rank.trained_bytes * rank.model.trained))


def _replicated(rank: Rank, backend: str, gradient_buckets: float) -> Memory:
    trained, each = rank.model.trained, rank.trained_bytes
    # accumulated gradients are 32-bit sums, those of a single micro-batch have the dtype of the weights
    gradients = (4.0 if rank.accumulates else each) * trained
    held = _Held(
        weights=rank.frozen_weights(rank.weight_bytes) + each * trained,
        gradients=gradients,
        optimizer=rank.optimizer_states * rank.states_scale,
        reference=rank.reference(rank.weight_bytes),
        communication=gradient_buckets,
        gradient_bytes=each,
        before_backward=gradients if rank.accumulates else 0.0,
        after_backward=gradients,
    )
    return _peak(rank, backend, held, holds_16_bit=False)


def zero1(rank: Rank) -> Memory:
    """Optimizer states are partitioned (`DeepSpeedZeroOptimizer`, runtime/zero/stage_1_and_2.py).

    weights = c (F + T); optimizer = (4 + K) T / N, of which 4 is `single_partition_of_fp32_groups`, the 32-bit master
    weights; gradients = 4 T of `grad_accum`, and c T of the last micro-batch's `param.grad` if c < 4;
    communication = c times one bucket of `reduce_bucket_size`; the step copies the rank's gradients into 4 T / N.
    """
    trained, each = rank.model.trained, rank.compute_bytes
    # 32-bit accumulators of all gradients; 16-bit gradients of the last micro-batch exist beside them
    gradients = (4.0 + (each if each < 4 else 0)) * trained
    held = _Held(
        weights=rank.frozen_weights(each) + trained * each,
        gradients=gradients,
        optimizer=_partitioned_states(rank),
        reference=rank.reference(each),
        communication=float(each * rank.assumptions.reduce_bucket),
        gradient_bytes=each,
        before_backward=gradients if rank.accumulates else 0.0,
        after_backward=gradients,
        step_copy=4 * trained / rank.ranks,
    )
    return _peak(rank, "zero1", held, holds_16_bit=rank.mixed)


def zero2(rank: Rank) -> Memory:
    """Gradients are partitioned too (`partition_gradients` of the same file).

    As ZeRO-1, with gradients = 4 T / N of `averaged_gradients`, a second bucket if communication overlaps the backward
    pass (`overlap_comm`), and the gradients of the current layers before they are reduced.
    """
    trained, each = rank.model.trained, rank.compute_bytes
    gradients = 4.0 * trained / rank.ranks
    # with overlap, one bucket is reduced while the backward pass fills the other
    buckets = 2 if rank.assumptions.overlap else 1
    held = _Held(
        weights=rank.frozen_weights(each) + trained * each,
        gradients=gradients,
        optimizer=_partitioned_states(rank),
        reference=rank.reference(each),
        communication=float(each * rank.assumptions.reduce_bucket * buckets),
        gradient_bytes=each,
        before_backward=gradients if rank.accumulates else 0.0,
        after_backward=gradients,
        layer_gradients=rank.layer_gradients(each),
        step_copy=4 * trained / rank.ranks,
    )
    return _peak(rank, "zero2", held, holds_16_bit=rank.mixed)


def zero3(rank: Rank) -> Memory:
    """Weights are partitioned too (`DeepSpeedZeroOptimizer_Stage3`, runtime/zero/stage3.py).

    weights = c (F + T) / N; gradients = 4 T / N in `grad_partitions_flat_buffer`, which is always allocated;
    optimizer = (4 + K) T / N; communication = c times the gathered parameters: at most `max_live_parameters` plus the
    head (`partitioned_param_coordinator.py` releases parameters beyond that), 2 copies of embedding and head, and a
    bucket of hidden_size^2 gradients, which accelerate sets for `reduce_bucket_size: auto`.
    """
    model, each = rank.model, rank.compute_bytes
    trained, embedding_and_head = model.trained, model.embedding_and_head
    # parameters stay gathered until more than max_live_parameters are; a smaller model is gathered completely
    live = min(model.parameters + model.adapter + rank.reference_entries, MAX_LIVE_PARAMETERS + model.head)
    held = _Held(
        weights=(rank.frozen_weights(each) + trained * each) / rank.ranks,
        gradients=4.0 * trained / rank.ranks,
        optimizer=_partitioned_states(rank),
        reference=rank.reference(each) / rank.ranks,
        communication=each * (live + ZERO3_GATHERED * embedding_and_head) + each * model.hidden_size**2,
        gradient_bytes=each,
        always_gradients=True,
        layer_gradients=rank.layer_gradients(each),
        step_copy=4 * trained / rank.ranks,
        # at the end of the backward pass all gathered layers but the last two have been released
        released=float(
            each * min(model.parameters - embedding_and_head - 2 * model.largest_layer, MAX_LIVE_PARAMETERS)
        ),
    )
    return _peak(rank, "zero3", held, holds_16_bit=rank.mixed)


def zero3_offload(rank: Rank) -> Memory:
    """ZeRO-3 with `offload_param` and `offload_optimizer` to the host.

    Weights, reference, gradients and optimizer states are in host memory, and everything else is as in ZeRO-3.
    """
    found = zero3(rank)
    # these parts are allocated during the whole step, so the GPU's peak is reduced by their sum
    host = found.weights + found.reference + found.optimizer + found.gradients
    return replace(
        found,
        backend="zero3 offload",
        total=found.total - host,
        host=host,
        weights=0.0,
        optimizer=0.0,
        reference=0.0,
        gradients=0.0,
    )


def fsdp2(rank: Rank) -> Memory:
    """`fully_shard` of each layer and of the root (torch/distributed/fsdp/_fully_shard).

    weights = (w F + t T) / N, 32-bit under mixed precision, as are the optimizer states: K T (t / 4) / N;
    gradients = t T / N, reduced with the last micro-batch of a step; if a step has several, accelerate's `no_sync`
    (`set_requires_gradient_sync(False)`) leaves them unsharded until then: 4 T;
    communication = c times the root's group (embedding and head, of policy and reference) and two layers, the current
    one and the prefetched one.
    """
    model, each = rank.model, rank.trained_bytes
    trained = model.trained
    # only decoder layers are sharded one by one, so embedding and head are in the root group, gathered in full
    models_held = 2 if rank.reference_entries else 1
    root = FSDP2_GATHERED * model.embedding_and_head * models_held
    # without reduce-scatter between micro-batches, each rank holds the gradients of all T weights
    gradients = 4.0 * trained if rank.accumulates else each * trained / rank.ranks
    held = _Held(
        weights=(rank.frozen_weights(rank.weight_bytes) + trained * each) / rank.ranks,
        gradients=gradients,
        optimizer=rank.optimizer_states / rank.ranks * rank.states_scale,
        reference=rank.reference(rank.weight_bytes) / rank.ranks,
        communication=rank.compute_bytes * (root + 2 * model.largest_layer),
        gradient_bytes=each,
        before_backward=gradients if rank.accumulates else 0.0,
        after_backward=gradients,
        layer_gradients=rank.layer_gradients(each),
    )
    return _peak(rank, "fsdp2", held, holds_16_bit=rank.mixed)


def _partitioned_states(rank: Rank) -> float:
    """ZeRO: (4 + K) T / N, the 32-bit master weights and the optimizer states of a rank's partition."""
    return 4 * rank.model.trained / rank.ranks + rank.optimizer_states / rank.ranks


_BACKENDS: dict[str, Callable[[Rank], Memory]] = {
    "single process": single_process,
    "ddp": ddp,
    "zero1": zero1,
    "zero2": zero2,
    "zero3": zero3,
    "zero3 offload": zero3_offload,
    "fsdp2": fsdp2,
}
BACKENDS = tuple(_BACKENDS)


def memory_of(
    config: RunConfig,
    model: ModelCounts,
    batch: MicroBatch,
    backend: str,
    gpus: int,
    assumptions: Assumptions = Assumptions(),
) -> Memory:
    """The memory of one rank. Args: backend: one of `BACKENDS`; gpus: number of ranks, ignored for a single process."""
    ranks = 1 if backend == "single process" else gpus
    return _BACKENDS[backend](Rank(config, model, batch, ranks, assumptions))


# The peak of a step --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """The parts of a rank's memory that depend on the backend, in bytes.

    Args:
        gradient_bytes: bytes per entry of a gradient that the backward pass computes.
        always_gradients: whether gradients are in a buffer that is always allocated.
        before_backward, after_backward: gradients that are allocated before the last micro-batch's backward pass and
            at its end; 0 if they are in a buffer that is always allocated.
        layer_gradients: gradients of the current layers, before reduce-scatter.
        step_copy: 32-bit copy of a rank's gradients that the optimizer's step creates.
        released: gathered weights that the backward pass releases after their use.
    """

    weights: float
    gradients: float
    optimizer: float
    reference: float
    communication: float
    gradient_bytes: int
    always_gradients: bool = False
    before_backward: float = 0.0
    after_backward: float = 0.0
    layer_gradients: float = 0.0
    step_copy: float = 0.0
    released: float = 0.0


def _peak(rank: Rank, backend: str, held: _Held, holds_16_bit: bool) -> Memory:
    """Add activations to what a backend holds; the total is the maximum over five moments of a step's last micro-batch.

    Args: holds_16_bit: whether weights are 16-bit under mixed precision, so that there are no autocast copies.
    """
    config, model = rank.config, rank.model
    saved = model.saved_16_bit if holds_16_bit else model.saved
    layer = (saved.layers + saved.autocast_copies) / model.layers  # average of one layer
    recomputed = 0.0
    # saved for the backward pass when the backbone's forward pass is complete, which is when the head runs
    saved_total: float = saved.outside + saved.layers + saved.autocast_copies
    if config.model.gradient_checkpointing:
        # the input of each layer, (rows, width, hidden_size); one layer at a time is recomputed
        stream_bytes = 2 if rank.mixed or rank.weight_bytes == 2 else rank.weight_bytes
        saved_total = saved.outside + model.layers * (rank.batch.positions * model.hidden_size * stream_bytes)
        recomputed = layer
    elif config.model.offload_activations:
        saved_total = saved.outside + 2 * layer  # at most two layers are on the device, the others on the host
    # the gradient of the head's weight, (V, H), exists before that of any layer; a score head is negligible
    has_logits = config.method.needs.output != "scores"
    head_gradient = held.gradient_bytes * model.head if model.head_trained and has_logits else 0.0
    # allocated during the whole step
    always = held.weights + held.optimizer + held.reference + held.communication + rank.assumptions.overhead
    always += held.gradients if held.always_gradients else 0.0
    before, after = held.before_backward, held.after_backward
    total = always + max(
        before + saved_total + rank.head.forward,  # the head's forward pass
        before + saved_total + rank.head.backward + head_gradient,  # the head's backward pass
        before + saved_total + head_gradient + recomputed,  # the backward pass of the last layer begins
        after + saved.outside + layer + held.layer_gradients - held.released,  # that of the first layer ends
        after + held.step_copy - held.released,  # the optimizer's step
    )
    return Memory(
        backend=backend,
        weights=held.weights,
        gradients=held.gradients,
        optimizer=held.optimizer,
        activations=saved_total + recomputed,
        head=max(rank.head.forward, rank.head.backward + head_gradient),
        reference=held.reference,
        communication=held.communication,
        total=total,
    )
