"""Engines that sample completions from a policy, behind one interface; `make` opens the one that the settings name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prefopt.errors import ConfigError
from prefopt.settings import GenerateConfig, ModelConfig

if TYPE_CHECKING:
    from torch import nn

    from prefopt.generation.base import Engine

# Which settings only one engine reads.
_OWN = {
    "transformers": ("batch", "continuous"),
    "vllm": ("python", "tensor_parallel", "replicas", "args"),
    "openai": ("url", "served_model", "api_key_env", "concurrency", "retries", "timeout"),
}


def check(settings: GenerateConfig) -> None:
    """Refuse what can be refused before anything is loaded.

    Raises: ConfigError naming the setting.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(settings)} | {"args": {}}
    for engine, names in _OWN.items():
        for name in names:
            if engine != settings.engine and getattr(settings, name) != defaults[name]:
                raise ConfigError(
                    f"generate.{name}: found {getattr(settings, name)!r}, which engine '{settings.engine}' does not "
                    f"read (leave it out, or --generate.engine {engine})"
                )
    if settings.engine == "openai":
        from prefopt.generation.server import check_server

        check_server(settings.url, "generate")
    if settings.engine == "vllm":
        from prefopt.generation.vllm_engine import check_python

        check_python(settings.python)


def in_ranks(settings: GenerateConfig) -> bool:
    """Whether the engine can run inside the processes of a training run."""
    return settings.engine == "transformers"


def make(
    settings: GenerateConfig, *, path: str, load: Callable[[], nn.Module], model: ModelConfig, tokenizer: Any
) -> Engine:
    """The engine that the settings name, ready to answer.

    Args:
        path: where the policy lies, a model or an adapter of one.
        load: gives the policy itself, for the engine in this process.
        model: the settings with which it is loaded.
        tokenizer: its tokenizer.
    Raises: RoundError when the engine cannot be opened; TrainError when the weights cannot be used.
    """
    if settings.engine == "transformers":
        from prefopt.generation.transformers_engine import TransformersEngine

        return TransformersEngine(load(), tokenizer, batch=settings.batch, continuous=settings.continuous)
    from prefopt.training import model_sources

    weights = model_sources.find(path, model)
    if settings.engine == "openai":
        from prefopt.generation.openai_engine import OpenAIEngine

        return OpenAIEngine(settings, weights, model, tokenizer)
    from prefopt.generation.vllm_engine import VllmEngine
    from prefopt.training import models

    models.check_model(weights.base, weights.base_settings(model), "generate")
    return VllmEngine(settings, weights, model, tokenizer)
