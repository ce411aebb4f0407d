"""Weights as a rank holds them: their full shape, its shard of them, and gathering what ZeRO-3 has sharded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from prefopt.training import quantized


def local_shard(parameter: Any) -> torch.Tensor:
    """This rank's shard of a weight, or all of it where no backend has sharded it."""
    part = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3
    return part.to_local() if hasattr(part, "to_local") else part  # FSDP2


def local_copies(parameter: Any) -> list[torch.Tensor]:
    """This rank's shard, and the full weight too where ZeRO-3 keeps a small one gathered."""
    whole = hasattr(parameter, "ds_id") and parameter.ds_status.name == "AVAILABLE"
    return [local_shard(parameter), *([parameter.data] if whole else [])]


def numel(parameter: Any) -> int:
    """Number of entries of the full weight, over all ranks."""
    return int(parameter.ds_numel) if hasattr(parameter, "ds_numel") else quantized.numel(parameter)


def shape(parameter: Any) -> tuple[int, ...]:
    """Shape of the full weight."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def ndim(parameter: Any) -> int:
    """Number of dimensions of the full weight."""
    return len(shape(parameter))


def not_finite(model: nn.Module) -> str | None:
    """The name of the first weight with a NaN or an infinity in this rank's shard, or None."""
    return next(
        (name for name, weight in model.named_parameters() if not quantized.is_finite(local_shard(weight))), None
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 has sharded the weights of a model when it was loaded."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


@contextlib.contextmanager
def unsharded_loading() -> Iterator[bool]:
    """While it lasts, ZeRO-3 does not shard models that are loaded. Yields whether it would have."""
    from transformers.integrations import deepspeed as integration

    known = integration._hf_deepspeed_config_weak_ref
    if known is None or not integration.is_deepspeed_zero3_enabled():
        yield False
        return
    integration.unset_hf_deepspeed_config()
    try:
        yield True
    finally:
        integration.set_hf_deepspeed_config(known())


@contextlib.contextmanager
def gathered(*some: nn.Module | None) -> Iterator[None]:
    """While it lasts, every rank holds the full weights of models that ZeRO-3 has sharded. Not for training."""
    with gathered_tensors([p for model in some if model is not None for p in model.parameters()]):
        yield


@contextlib.contextmanager
def gathered_tensors(some: Sequence[nn.Parameter], from_rank_0: bool = False) -> Iterator[None]:
    """The same for single weights.

    Args: from_rank_0: whether changes of the weights on rank 0 are broadcast at the end.
    """
    sharded = [p for p in some if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if from_rank_0 else None):
        yield


@contextlib.contextmanager
def gathered_by_layer(model: nn.Module) -> Iterator[None]:
    """While it lasts, each layer of a model that ZeRO-3 has sharded is gathered during its own forward only.

    For use without gradients, before a backend wraps the model; all ranks must make the same calls.
    """
    if not is_sharded(model):
        yield
        return
    import deepspeed

    layers = {layer for some in model.modules() if isinstance(some, nn.ModuleList) for layer in some}
    below = {part for layer in layers for part in layer.modules() if part is not layer}
    hooks = []
    for module in model.modules():
        mine = list(module.parameters(recurse=module in layers))
        if mine and module not in below:
            gathering = deepspeed.zero.GatheredParameters(mine)
            hooks += [
                module.register_forward_pre_hook(lambda *_, g=gathering: g.__enter__()),
                module.register_forward_hook(lambda *_, g=gathering: g.__exit__(None, None, None), always_call=True),
            ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
