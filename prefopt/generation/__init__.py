"""Inference engines: they sample completions from a policy, behind one interface; `make` opens the one in the settings.

Each is one file NAME_engine.py of this folder that holds one subclass of `EngineKind`; nothing else names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prefopt import registry
from prefopt.errors import ConfigError
from prefopt.settings import GenerateConfig, ModelConfig

if TYPE_CHECKING:
    from torch import nn

    from prefopt.generation.base import Engine, EngineKind


def kind_of(name: str) -> type[EngineKind]:
    """The class of an inference engine: a file of this folder, or a dotted path. Raises: ConfigError."""
    from prefopt.generation.base import EngineKind

    return registry.ENGINES.load(name, EngineKind)


def check(settings: GenerateConfig) -> None:
    """Refuse what can be refused before anything is loaded.

    Raises: ConfigError naming the setting.
    """
    kind, plain = kind_of(settings.engine), GenerateConfig()
    changed = [f.name for f in dataclasses.fields(plain) if getattr(settings, f.name) != getattr(plain, f.name)]
    for name in changed:
        readers = [] if name in kind.reads else [e for e in registry.ENGINES.names() if name in kind_of(e).reads]
        if readers:
            raise ConfigError(
                f"generate.{name}: found {getattr(settings, name)!r}, which engine '{settings.engine}' does not "
                f"read (leave it out, or --generate.engine {' or '.join(readers)})"
            )
    kind.check(settings)


def in_ranks(settings: GenerateConfig) -> bool:
    """Whether the engine can run inside the ranks of a training run."""
    return kind_of(settings.engine).in_ranks


def make(
    settings: GenerateConfig, *, path: str, load: Callable[[], nn.Module], model: ModelConfig, tokenizer: Any
) -> Engine:
    """The engine that the settings name, ready to answer.

    Args: as those of `PolicySource`.
    Raises: RoundError when the engine cannot be opened; TrainError when the weights cannot be used.
    """
    from prefopt.generation.base import PolicySource

    return kind_of(settings.engine).open(settings, PolicySource(path, load, model, tokenizer))
