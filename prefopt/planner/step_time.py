"""Seconds of an optimizer step under each parallel backend: floating-point operations, bytes sent, speeds of GPUs."""

from __future__ import annotations

import numpy as np

from prefopt.planner.activations import BYTES
from prefopt.planner.memory import GB, live_reference
from prefopt.planner.model_counts import ModelCounts
from prefopt.settings import RunConfig
from prefopt.settings.plan import PlanConfig
from prefopt.training import layout_choice

TFLOPS = {2: (200.0, 450.0), 4: (20.0, 45.0)}  # of an H100 in training, by bytes of what is multiplied
HOST_BANDWIDTH = 20.0  # GB/s between a GPU and its host's memory; a guess
HOST_UPDATES = 0.5e9  # parameters that one rank's part of the host updates per second; a guess


def computes_in_16_bits(config: RunConfig) -> bool:
    """Whether matrix products are made of 16-bit operands."""
    return config.train.mixed_precision != "no" or config.model.dtype == "bfloat16"


def speeds(own: PlanConfig, config: RunConfig) -> tuple[float, float]:
    """(lowest, highest) TFLOPS of one GPU in such a run."""
    if own.tflops is not None:
        low, high = own.tflops
        return low, high
    return TFLOPS[2 if computes_in_16_bits(config) else 4]


def ranks_of(own: PlanConfig, backend: str) -> int:
    """World size under a backend."""
    return 1 if backend == "single process" else own.gpus


def flops(own: PlanConfig, config: RunConfig, model: ModelCounts) -> float:
    """Floating-point operations of a step, over all ranks.

    A multiply-add counts two. With F operations of a forward pass of the backbone and H of the head, per pair:

        F * (1 + backward + recomputed + reference) + H * (2 + head trained + reference logits)

    where backward = 2 (input and weight) if weights are trained, 1 (input) under an adapter.
    """
    pairs, both = config.train.global_batch, config.method.needs.rows == "pairs"
    prompt, response = own.prompt_tokens or 1, own.completion_tokens or 1
    parts = np.array([(prompt, response)] * (2 if both else 1), np.int64)  # (sequences, 2) tokens
    shape = layout_choice.Shape(model.layers, model.attention_width, model.matrices)
    given = config.train.layout
    possible = layout_choice.possible_layouts(config.method.needs, "per_segment") if given == "auto" else (given,)
    works = [layout_choice.work(parts, layout, "per_segment", shape, "cuda") for layout in possible]
    work = min(works, key=lambda work: layout_choice.seconds(work, layout_choice.SPEEDS["cuda"]))
    forward = 2 * work.linear + 4 * (work.causal + work.masked)  # attention: queries x keys and weights x values
    head = 2.0 * len(parts) * response * model.vocabulary * model.hidden_size
    if config.method.needs.output == "scores":
        head = 0.0
    backward = 1 if model.adapter else 2
    passes = 1 + backward + config.model.gradient_checkpointing
    live = config.method.needs.reference != "none" and config.reference.cache == "none"
    reference_logits = config.method.needs.reference == "token" or live
    return pairs * (forward * (passes + live) + head * (2 + model.head_trained + reference_logits))


def communicated_bytes(own: PlanConfig, config: RunConfig, model: ModelCounts, backend: str) -> float:
    """Bytes that a rank sends in a step, and receives.

    A ring's reduce-scatter or all-gather of B bytes sends (N - 1) / N * B; an all-reduce is one of each.

        ddp          all-reduce of gradients
        zero1        all-reduce of gradients, all-gather of updated weights
        zero2        reduce-scatter of gradients per micro-batch, all-gather of updated weights
        zero3        two all-gathers of weights (forward, backward) and a reduce-scatter of gradients per micro-batch
        fsdp2        two all-gathers per micro-batch, one reduce-scatter in 32 bits per step
    """
    if backend == "single process" or own.gpus == 1:
        return 0.0
    others = 1 - 1 / own.gpus
    passes = micro_batches(own, config, backend)
    weight_bytes = BYTES[config.model.dtype]
    compute_bytes = 2 if config.train.mixed_precision != "no" else weight_bytes
    if backend == "ddp":
        return 2 * others * ((4 if model.adapter else weight_bytes) * model.trained)
    trained = others * compute_bytes * model.trained
    if backend == "zero1":
        return trained * 2 + trained
    if backend == "zero2":
        # one micro-batch is reduced as under ZeRO-1
        return trained * (passes + 1) + (trained if passes == 1 else 0)
    weights = 2 * (model.parameters + model.adapter) + live_reference(config, model)  # a reference goes forward only
    gathered = others * compute_bytes * weights
    reduced = others * (4 if backend == "fsdp2" else compute_bytes) * model.trained
    return passes * gathered + (1 if backend == "fsdp2" else passes) * reduced


def micro_batches(own: PlanConfig, config: RunConfig, backend: str) -> int:
    """Forward passes of a rank in a step."""
    return max(1, -(-config.train.global_batch // (ranks_of(own, backend) * config.train.micro_batch)))


def seconds(own: PlanConfig, config: RunConfig, model: ModelCounts, backend: str) -> tuple[float, float]:
    """(fast, slow) seconds of a step: communication overlaps compute entirely, or not at all."""
    ranks = ranks_of(own, backend)
    low, high = speeds(own, config)
    tflop = flops(own, config, model) / ranks / 1e12
    sending = communicated_bytes(own, config, model, backend) / own.bandwidth / GB
    offloading = 0.0
    if backend.endswith("offload"):
        each = 2 if computes_in_16_bits(config) else 4
        passes = micro_batches(own, config, backend)
        partition = each * (model.parameters + model.adapter) / ranks
        # weights to the GPU twice per micro-batch; gradients to the host and updated weights back once per step
        offloading = (2 * passes * partition + 2 * each * model.trained / ranks) / HOST_BANDWIDTH / GB
        offloading += model.trained / ranks / HOST_UPDATES
    return max(tflop / high, sending) + offloading, tflop / low + sending + offloading
