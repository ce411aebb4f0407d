"""4-bit weights (QLoRA): how they are loaded, and the operations that differ for them.

This is the only module that depends on the layers of bitsandbytes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from prefopt.settings import ModelConfig


def silence_log() -> None:
    """Silence bitsandbytes' warnings about optional kernels that it could download from a hub, which are not used."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def loading_arguments(settings: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for 4-bit weights; empty without quantisation.

    transformers does not quantise output heads, nor embeddings that are tied to them.
    """
    if settings.quantize is None:
        return {}
    silence_log()
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=settings.compute_dtype or settings.dtype,
    )
    return {"quantization_config": config}


def disable_repacking(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking the weights of a loaded model.

    On CPUs with bfloat16 instructions it repacks a layer's weights at the first call in eval mode, computes in bfloat16
    from then on, and no longer propagates gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_quantized(weight: Any) -> bool:
    """Whether a weight is stored in 4 bits."""
    return getattr(weight, "quant_state", None) is not None


def quantization_type(module: nn.Module) -> str | None:
    """The 4-bit format of a module's own weight, `nf4` or `fp4`; None if it is not quantised or there is none."""
    weight: Any = module._parameters.get("weight")
    return str(weight.quant_state.quant_type) if is_quantized(weight) else None


def numel(weight: Any) -> int:
    """Number of entries of a weight; a 4-bit weight stores two of them per byte."""
    return int(weight.quant_state.shape.numel()) if is_quantized(weight) else weight.numel()


def is_finite(weight: Any) -> bool:
    """Whether a weight has no NaN or infinity; in a quantised one they appear in the scales of its blocks."""
    if not is_quantized(weight):
        return bool(weight.isfinite().all())
    state = weight.quant_state
    scales = [state.absmax] if not state.nested else [state.offset, state.state2.absmax]
    return all(bool(scale.isfinite().all()) for scale in scales)


def precision(lm: Any) -> torch.dtype:
    """The least precise dtype that a model computes in: that of its weights, or of its quantised layers."""
    found = next(p.dtype for p in lm.parameters() if p.is_floating_point())
    computed = {m.compute_dtype for m in lm.modules() if quantization_type(m) is not None}
    return max({found, *computed}, key=lambda dtype: torch.finfo(dtype).eps)


@contextlib.contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Context manager in which quantised layers compute in another dtype."""
    layers: list[Any] = [module for module in model.modules() if quantization_type(module) is not None]
    types = [layer.compute_dtype for layer in layers]
    try:
        for layer in layers:
            layer.compute_dtype = dtype
        yield
    finally:
        for layer, own in zip(layers, types, strict=True):
            layer.compute_dtype = own
