"""Compiles a backbone layer by layer with torch.compile, so that all layers and all lengths share one graph.

Attention is excluded from the graphs: it is called once per packed segment, and these differ in each batch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from prefopt.errors import ConfigError
from prefopt.training.attention import PER_SEGMENT, attend_per_segment

# Maximum number of graphs per code object. torch.compile makes variants with and without gradients, adapter and mask,
# in training and evaluation mode, and for one batch row or several.
_MAX_GRAPHS = 64


def check(device: torch.device) -> None:
    """Raises: ConfigError where no compiler is installed."""
    if device.type == "cpu":
        compilers = [os.environ.get("CXX"), "g++", "clang++", "c++"]
        if not any(name and shutil.which(name) for name in compilers):
            raise ConfigError(
                "train.compile: needs a C++ compiler (g++) on a CPU, found none; install one, or omit the setting"
            )
        return
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "train.compile: needs Triton on a GPU, which is not installed; pip install triton, or omit the setting"
        )


def compile_layers(backbone: nn.Module) -> int:
    """Compile each decoder layer in place; parameter names do not change. Returns: number of layers.

    Raises: ConfigError for a model whose decoder layers cannot be identified.
    """
    from transformers import AttentionInterface
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"train.compile: {type(backbone).__name__} has no decoder layers that transformers marks as such; omit the "
            "setting"
        )
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _MAX_GRAPHS)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 4 * _MAX_GRAPHS)
    AttentionInterface.register(PER_SEGMENT, _attention_outside_graphs())
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


@functools.cache
def _attention_outside_graphs() -> Any:
    return torch.compiler.disable(attend_per_segment)


@contextlib.contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """Context manager in which compiled layers of `model` run eagerly."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
