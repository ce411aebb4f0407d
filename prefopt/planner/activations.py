"""Bytes that one micro-batch adds: activations of the backbone, and the logits of the output head.

Saved activations are counted, not modelled: two layers run forward over fake tensors, which have shapes and no values.
The head is in closed form, as `kernels.token_stats` allocates it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from prefopt.kernels.token_stats import TILES
from prefopt.planner import meta_model
from prefopt.settings import RunConfig
from prefopt.training import adapter_loading, adapters, towers
from prefopt.training.forward import statistics_for

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class MicroBatch:
    """One rank's micro-batch: `rows` sequences of `width` positions each.

    Args: completion_tokens: positions whose logits the loss reads.
    """

    rows: int
    width: int
    completion_tokens: int

    @property
    def positions(self) -> int:
        return self.rows * self.width


def largest_micro_batch(config: RunConfig, completion_fraction: float) -> MicroBatch:
    """The largest micro-batch: padded sequences of data.max_length, of which this fraction is completion tokens."""
    rows = config.train.micro_batch * (2 if config.method.needs.rows == "pairs" else 1)
    return MicroBatch(rows, config.data.max_length, max(1, round(rows * config.data.max_length * completion_fraction)))


@dataclass(frozen=True)
class SavedActivations:
    """Bytes that a forward pass of the backbone saves for its backward pass.

    Args: layers: in all layers; outside: before and after them; autocast_copies: 16-bit copies of 32-bit weights, which
        autocast makes in each layer and caches until the backward pass.
    """

    layers: int
    outside: int
    autocast_copies: int


def count_saved(
    architecture: Any, config: RunConfig, start: Any, batch: MicroBatch, layers: int, dtype: str, autocast: bool = True
) -> SavedActivations:
    """What a forward pass saves when weights are held in `dtype`.

    A model of two layers is run; its second layer stands for each of the `layers` of the model.

    Args:
        start: what training starts from (`model_sources.find`).
        autocast: whether mixed precision is autocast's, and not a backend's that holds 16-bit weights.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    short = copy.deepcopy(architecture)
    text: Any = short.get_text_config()
    text.num_hidden_layers = min(2, layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    autocast = autocast and config.train.mixed_precision != "no" and dtype != "float64"
    # storages by identity: a tensor that several operations save is counted once. The tensor is kept alive, because
    # the identity of a freed storage may be given to a new one.
    saved: dict[int, tuple[int, torch.Tensor]] = {}
    before_layer: list[int] = []

    def total() -> int:
        return sum(size for size, _ in saved.values())

    with torch.device("meta"):
        lm = adapter_loading.attach_like(meta_model.build(short, config, dtype), config, start)
    with FakeTensorMode(allow_non_fake_inputs=True):
        towers.replace_meta_tensors(lm)
        weights = {p.untyped_storage()._cdata for p in lm.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:  # the weights themselves are no activations
                saved[storage._cdata] = (storage.nbytes(), tensor)
            return tensor

        run = meta_model.layers_of(lm)
        for layer in run:
            layer.register_forward_pre_hook(lambda *_: before_layer.append(total()))
        ids = torch.zeros(batch.rows, batch.width, dtype=torch.long)
        positions = torch.arange(batch.width).expand(batch.rows, batch.width)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            adapters.base_of(lm).base_model(input_ids=ids, position_ids=positions, use_cache=False)
        # with one layer only, what follows it counts as the layer's
        end = before_layer[1] if len(run) > 1 else total()
        layer_bytes = end - before_layer[0]
        outside = total() - layer_bytes * len(run)
        linear: list[Any] = [m for m in run[0].modules() if adapters.is_linear(m)]
        copies = 2 * sum(m.weight.numel() for m in linear) if autocast and dtype == "float32" else 0
    return SavedActivations((layer_bytes - copies) * layers, max(0, outside), copies * layers)


@dataclass(frozen=True)
class HeadMemory:
    """Bytes of logits and of what is computed from them, at the peak of the head's forward and backward pass."""

    forward: float
    backward: float


def head_memory(
    config: RunConfig,
    batch: MicroBatch,
    hidden_size: int,
    vocabulary: int,
    compute_bytes: int,
    tiles: tuple[int, int] = TILES["cuda"],
) -> HeadMemory:
    """Logits of the head, without the gradient of its weight, which depends on the backend.

    With K completion tokens, V vocabulary, H hidden size, c bytes of what is multiplied and f = 4 (8 in float64) bytes
    of statistics:

        tile    = f * token_tile * vocab_tile        one buffer of `kernels.tile`, (token_tile, vocab_tile)
        cached  = min(f K V * models, kernel.cache_mb)  logits cached for the backward pass
        states  = K H (2 c + f)                      hidden states as they come, as multiplied, and their gradient
        forward = cached + states + tile * buffers
        backward = cached + states + tile * buffers + f * vocab_tile * H (a tile of the weight's gradient, if c < f)

    Args: tiles: (token_tile, vocab_tile) where `kernel.token_tile` and `kernel.vocab_tile` are not set.
    """
    if config.method.needs.output == "scores":  # one number per sequence: no logits
        return HeadMemory(0.0, 0.0)
    wanted = statistics_for(config.method.needs)
    compared, pairwise = "ref_logp" in wanted and config.reference.cache != "logps", "kl" in wanted
    token_tile, vocab_tile = config.kernel.token_tile or tiles[0], config.kernel.vocab_tile or tiles[1]
    columns = min(vocab_tile, vocabulary)
    # a vocabulary smaller than a tile leaves room for more tokens in it
    rows = min(token_tile * max(1, vocab_tile // vocabulary), batch.completion_tokens)
    stat_bytes = 8 if compute_bytes == 8 else 4
    tile = float(stat_bytes) * rows * columns
    all_logits = stat_bytes * batch.completion_tokens * vocabulary * (1 + pairwise)  # of the reference too for a KL
    cached = min(all_logits, config.kernel.cache_mb * 2**20)
    recomputed = all_logits > cached  # then the product hidden @ weight.T is made again, in a buffer of its own
    states = batch.completion_tokens * hidden_size * (2 * compute_bytes + stat_bytes)
    # buffers: the policy's log-softmax; the reference's product and log-softmax; the terms of the KL
    forward_buffers = 1 + recomputed + (2 if compared else 0) + (1 if pairwise else 0)
    # buffers: the policy's log-softmax and the gradient; the reference's log-softmax where a KL has a gradient
    backward_buffers = 2 + recomputed + ((1 + recomputed) if pairwise else 0)
    weight_tile = stat_bytes * columns * hidden_size if compute_bytes < stat_bytes else 0
    return HeadMemory(
        forward=cached + tile * forward_buffers + states,
        backward=cached + tile * backward_buffers + states + weight_tile,
    )
