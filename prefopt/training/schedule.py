"""How many optimizer steps a run has, and the learning rate of each."""

from __future__ import annotations

import math
from collections.abc import Callable

from prefopt.errors import ConfigError
from prefopt.settings import RunConfig


def total_steps(config: RunConfig, steps: Callable[[float], int] | None) -> int | None:
    """The number of optimizer steps of the run; None where train.max_tokens or train.max_seconds ends it.

    Args: steps: gives the number of steps of so many epochs from the start; None for an endless stream.
    Raises: ConfigError for an endless stream without train.max_steps.
    """
    if config.train.max_tokens is not None or config.train.max_seconds is not None:
        return None
    if config.train.max_steps is not None:
        return config.train.max_steps
    if steps is None:
        raise ConfigError("train.max_steps: found none, expected a number of steps for an endless stream of pairs")
    return steps(config.train.epochs)


def learning_rate(
    config: RunConfig,
    steps: Callable[[float], int] | None,
    step: int,
    spent: tuple[float, float] | None = None,
) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Linear warm-up over W of T steps reaches the peak on its last step: `lr (step + 1) / W`. Then, with
    `d = (step - W) / (T - W)`, linear decay is `lr (1 - d)` and cosine decay `lr (1 + cos(pi d)) / 2`: 0 at the end of
    the schedule, which may lie beyond the end of training (train.schedule_epochs).

    Args:
        steps: as in `total_steps`.
        spent: the fraction of the run's tokens or seconds that is spent before this step and after it, where tokens or
            seconds end the run. The schedule then follows this fraction instead of steps, unless
            train.schedule_epochs is set.
    """
    optim, epochs = config.optim, config.train.schedule_epochs
    if epochs is not None and steps is not None:
        length, spent = steps(epochs), None
    else:
        length = total_steps(config, steps) or 0
    warmup = optim.warmup_steps if optim.warmup_steps is not None else math.ceil(optim.warmup_ratio * length)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if spent is None:
        done = min(1.0, (step - warmup) / max(1, length - warmup))
    else:
        (before, after), warm = spent, optim.warmup_ratio if optim.warmup_steps is None else 0.0
        if before < warm:
            return optim.lr * min(1.0, after / warm)
        done = min(1.0, (before - warm) / (1 - warm)) if warm < 1 else 1.0
    if optim.schedule == "constant":
        return optim.lr
    return optim.lr * (1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
