"""The model as modules on the meta device: shapes and parameter counts, no values."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from prefopt.errors import ConfigError
from prefopt.settings import RunConfig
from prefopt.training import adapters, models


def build(architecture: Any, config: RunConfig, dtype: str) -> Any:
    """A model of this architecture, on the default device of the caller."""
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
                # flash and flex attention save what SDPA saves, and may not be installed on this machine
                attn_implementation=models.attention_of(
                    architecture, "eager" if config.model.attention == "eager" else "sdpa", kind
                ),
                trust_remote_code=config.model.trust_remote_code,
            )
    except Exception as error:
        raise models.load_error("model.path", str(config.model.path), error) from error


def output_head(lm: Any) -> Any:
    """The output head of a language model, or the score layer of a classifier."""
    base = adapters.base_of(lm)
    return getattr(base, "score", None) or base.get_output_embeddings()


def numel(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def layers_of(lm: nn.Module) -> list[nn.Module]:
    """The transformer layers: the module list that holds most parameters."""
    lists = [module for module in lm.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ConfigError(f"model.path: {type(lm).__name__} has no list of layers; prefopt cannot plan its memory")
    sizes = [numel(layers) for layers in lists]
    return list(lists[sizes.index(max(sizes))])
