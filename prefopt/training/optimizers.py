"""Creates optimizers by name, and checks that their state can be saved."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
from torch import nn

from prefopt.errors import ConfigError
from prefopt.settings import OptimConfig
from prefopt.training import checkpoint, quantized, sharding

# Short name, as in `settings.OPTIMIZERS` -> (module, class).
_CLASSES = {
    "adamw": ("torch.optim", "AdamW"),
    "adamw_8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "paged_adamw_8bit": ("bitsandbytes.optim", "PagedAdamW8bit"),
    "adafactor": ("torch.optim", "Adafactor"),
    "rmsprop": ("torch.optim", "RMSprop"),
    "sgd": ("torch.optim", "SGD"),
}


def make_optimizer(settings: OptimConfig, lm: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    """Create the optimizer of the trainable weights; vectors (norms, biases) have no weight decay.

    Args: fused: whether adamw uses torch's fused implementation, which is faster, unless `settings.args` choose one.
    Raises: ConfigError for a class that does not exist, or for arguments that it does not accept.
    """
    kind = _class(settings.name)
    args = dict(settings.args)
    if settings.name == "adamw" and not args.keys() & {"fused", "foreach", "differentiable"}:
        args["fused"] = fused
    trainable = [p for p in lm.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if sharding.ndim(p) >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if sharding.ndim(p) < 2], "weight_decay": 0.0},
    ]
    try:
        return kind([g for g in groups if g["params"]], lr=settings.lr, **args)
    except (TypeError, ValueError) as error:
        key, given = ("optim.args", f" with {settings.args}") if settings.args else ("optim.name", "")
        raise ConfigError(f"{key}: {settings.name} cannot be created{given}: {error}") from error


def _class(name: str) -> Any:
    known = _CLASSES.get(name)
    quantized.silence_log()
    module, member = known or (name.rpartition(".")[0], name.rpartition(".")[2])
    try:
        kind: Any = getattr(importlib.import_module(module), member)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"optim.name: '{name}' cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ConfigError(f"optim.name: '{name}' is not an optimizer, expected a subclass of torch.optim.Optimizer")
    return kind


def check_optimizer(settings: OptimConfig, device: torch.device) -> None:
    """Check the optimizer on one small layer, before data and models are loaded.

    Raises: ConfigError for an optimizer that does not exist, whose `step()` needs arguments or fails, or whose state
        cannot be saved in a checkpoint.
    """
    if settings.name == "paged_adamw_8bit" and device.type == "cpu":
        raise ConfigError(
            "optim.name: 'paged_adamw_8bit' pages its state to the host's memory, where a CPU run keeps it in any "
            "case; use adamw_8bit"
        )
    probe = nn.Linear(1, 1).to(device)
    optimizer = make_optimizer(dataclasses.replace(settings, lr=1e-3), probe)
    probe(torch.ones(1, 1, device=device)).sum().backward()
    try:
        optimizer.step()
    except Exception as error:
        raise ConfigError(f"optim.name: '{settings.name}' fails in a step() without arguments: {error}") from error
    try:
        checkpoint.pack_state(optimizer.state_dict()["state"])
    except TypeError as error:
        raise ConfigError(f"optim.name: the state of '{settings.name}' cannot be saved: {error}") from error
