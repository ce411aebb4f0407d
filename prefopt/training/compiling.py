"""torch.compile of a backbone, layer by layer: one graph for all layers, whatever lengths a run meets.

Attention stays outside of the graphs: it is called per packed segment, whose boundaries differ in each batch.
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

# Most graphs per code object: with and without gradients, adapter and mask, in training or not, of one row or more.
_GRAPHS = 64


def check(device: torch.device) -> None:
    """Raises: ConfigError where no compiler is installed."""
    if device.type == "cpu":
        compilers = [os.environ.get("CXX"), "g++", "clang++", "c++"]
        if not any(name and shutil.which(name) for name in compilers):
            raise ConfigError(
                "train.compile: needs a C++ compiler (g++) on a CPU, found none; install one, or leave it out"
            )
        return
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "train.compile: needs Triton on a GPU, which is not installed; pip install triton, or leave it out"
        )


def compile_layers(backbone: nn.Module) -> int:
    """Compile each decoder layer in place; names of weights do not change. Returns: number of layers.

    Raises: ConfigError for a model whose decoder layers cannot be identified.
    """
    from transformers import AttentionInterface
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"train.compile: {type(backbone).__name__} has no decoder layers that transformers knows; leave it out"
        )
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _GRAPHS)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 4 * _GRAPHS)
    AttentionInterface.register(PER_SEGMENT, _attention_outside_graphs())
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


@functools.cache
def _attention_outside_graphs() -> Any:
    return torch.compiler.disable(attend_per_segment)


@contextlib.contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """While it lasts, compiled layers of `model` run eagerly."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
