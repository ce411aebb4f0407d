"""Weights in 4 bits (QLoRA): how they are asked for, and what is different about them once they are there.

The only file that knows bitsandbytes' layers.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from prefopt.settings import ModelConfig


def hush() -> None:
    """bitsandbytes' word on kernels that it could fetch from a hub, which are not wanted, is not for users."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def arguments(settings: ModelConfig) -> dict[str, Any]:
    """What `from_pretrained` is to be told; nothing where weights are held as they are.

    transformers leaves output heads, and embeddings that are tied to them, as they are.
    """
    if settings.quantize is None:
        return {}
    hush()
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=settings.compute_dtype or settings.dtype,
    )
    return {"quantization_config": config}


def settle(model: nn.Module) -> None:
    """Hold the layers of a loaded model to one way of computing.

    On CPUs with bfloat16 products bitsandbytes repacks a layer's weights when it is first evaluated, to compute in
    bfloat16 from then on, and passes no gradient on any more.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_quantized(weight: Any) -> bool:
    """Whether a weight is held in fewer bits than it is computed with."""
    return getattr(weight, "quant_state", None) is not None


def kind(module: nn.Module) -> str | None:
    """How a module holds a weight of its own: `nf4` or `fp4`; None: as it is, or it has none."""
    weight: Any = module._parameters.get("weight")
    return str(weight.quant_state.quant_type) if is_quantized(weight) else None


def numel(weight: Any) -> int:
    """Entries of a weight, which may be held two to a byte."""
    return int(weight.quant_state.shape.numel()) if is_quantized(weight) else weight.numel()


def is_finite(weight: Any) -> bool:
    """Whether a weight has neither a NaN nor an infinity; a quantised one shows them in the scales of its blocks."""
    if not is_quantized(weight):
        return bool(weight.isfinite().all())
    state = weight.quant_state
    scales = [state.absmax] if not state.nested else [state.offset, state.state2.absmax]
    return all(bool(scale.isfinite().all()) for scale in scales)


def precision(lm: Any) -> torch.dtype:
    """The coarsest type that a model computes in: that of its weights, or of its quantised products."""
    found = next(p.dtype for p in lm.parameters() if p.is_floating_point())
    computed = {m.compute_dtype for m in lm.modules() if kind(m) is not None}
    return max({found, *computed}, key=lambda dtype: torch.finfo(dtype).eps)


@contextlib.contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While it lasts, products with quantised weights are computed in another type."""
    layers: list[Any] = [module for module in model.modules() if kind(module) is not None]
    types = [layer.compute_dtype for layer in layers]
    try:
        for layer in layers:
            layer.compute_dtype = dtype
        yield
    finally:
        for layer, own in zip(layers, types, strict=True):
            layer.compute_dtype = own
