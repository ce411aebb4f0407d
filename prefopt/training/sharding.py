"""Weights as a rank holds them: their full shape, its shard of them, and gathering what ZeRO-3 has sharded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from prefopt.training import quantized


def local_shard(parameter: Any) -> torch.Tensor:
    """What this process holds of a weight: all of it, or its part where a backend has sharded it."""
    part = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3
    return part.to_local() if hasattr(part, "to_local") else part  # FSDP2


def local_copies(parameter: Any) -> list[torch.Tensor]:
    """The same, and all of it beside its part where ZeRO-3 keeps a small weight whole too."""
    whole = hasattr(parameter, "ds_id") and parameter.ds_status.name == "AVAILABLE"
    return [local_shard(parameter), *([parameter.data] if whole else [])]


def numel(parameter: Any) -> int:
    """How many entries a weight has, over all processes."""
    return int(parameter.ds_numel) if hasattr(parameter, "ds_numel") else quantized.numel(parameter)


def shape(parameter: Any) -> tuple[int, ...]:
    """The shape of a weight, whole."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def ndim(parameter: Any) -> int:
    """How many dimensions a weight has, whole."""
    return len(shape(parameter))


def not_finite(model: nn.Module) -> str | None:
    """The name of the first weight that has a NaN or an infinity in what this process holds of it, or None."""
    return next(
        (name for name, weight in model.named_parameters() if not quantized.is_finite(local_shard(weight))), None
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether DeepSpeed has sharded the weights of a model as it was loaded."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


@contextlib.contextmanager
def unsharded_loading() -> Iterator[bool]:
    """While it lasts, ZeRO-3 shards nothing that is loaded. Yields whether it would."""
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
    """While it lasts, every process holds all weights of models that DeepSpeed shards, and nothing is trained."""
    with gathered_tensors([p for model in some if model is not None for p in model.parameters()]):
        yield


@contextlib.contextmanager
def gathered_tensors(some: Sequence[nn.Parameter], from_rank_0: bool = False) -> Iterator[None]:
    """The same of single weights.

    Args: from_rank_0: what the first process makes of them is what they are afterwards.
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
    """While it lasts, a layer of a model that DeepSpeed shards is whole as long as it is called, and no longer.

    For use without gradients, before a backend has the model; all processes must make the same calls of it.
    """
    if not is_sharded(model):
        yield
        return
    import deepspeed

    layers = {layer for some in model.modules() if isinstance(some, nn.ModuleList) for layer in some}
    inside = {part for layer in layers for part in layer.modules() if part is not layer}
    hooks = []
    for module in model.modules():
        mine = list(module.parameters(recurse=module in layers))
        if mine and module not in inside:
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
