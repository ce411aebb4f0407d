"""Defaults that depend on the run: those of a method, and those of the testbed per world."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefopt.errors import ConfigError
from prefopt.method import Method
from prefopt.settings.groups import OptimConfig
from prefopt.settings.nested import flatten, lookup, merge
from prefopt.settings.schema import RunConfig, as_plain

# Defaults of runs on the testbed, whose model has 60k parameters.
TESTBED_DEFAULTS: dict[str, Any] = {
    "method": {"beta": 1.0},
    "optim": {"lr": 2e-3, "schedule": "cosine", "warmup_steps": 20},
    "train": {"global_batch": 512, "micro_batch": 512, "max_steps": 600},
    "eval": {"every": 50, "batch": 512},
}

# Defaults of rounds on the testbed, over those above.
TESTBED_ROUNDS_DEFAULTS: dict[str, Any] = {
    "method": {"beta": 0.2},
    "optim": {"lr": 3e-3, "schedule": "linear", "warmup_steps": 3},
    "train": {"global_batch": 256, "micro_batch": 256, "max_steps": None, "epochs": 6},
    "eval": {"every": 1000},
    "rounds": {"prompts": 1024, "eval_prompts": 256, "shard": 512},
    "generate": {"max_tokens": 4, "batch": 2560},
}

ROUNDS_WORLD = "cyclic"  # the testbed's world in rounds, unless the method declares one

# Defaults of rounds in one world, over those above.
WORLD_ROUNDS_DEFAULTS: dict[str, dict[str, Any]] = {
    "scratchpad": {
        "method": {"beta": 0.5, "thought_prompt": "scratchpad"},
        "optim": {"lr": 5e-4},
        "train": {"global_batch": 128, "micro_batch": 128, "epochs": 2},
        "rounds": {"prompts": 1000, "shard": 500},
        "generate": {"n": 8, "max_tokens": 20, "batch": 4000},
    },
}

# Setting of the user -> the testbed default that would silently override it, and is dropped.
_DROPPED_DEFAULTS = {
    "optim.warmup_ratio": "optim.warmup_steps",
    **{f"train.{name}": "train.max_steps" for name in ("epochs", "max_tokens", "max_seconds")},
}


def method_defaults(method_class: type[Method]) -> dict[str, Any]:
    """Defaults that a method declares for settings outside its own group."""
    return {} if method_class.default_lr is None else {"optim": {"lr": method_class.default_lr}}


def testbed_defaults(method_class: type[Method], given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of the testbed. Args: given: the settings that the user has given."""
    known = {f.name for f in dataclasses.fields(method_class)}
    dropped = {default for key, default in _DROPPED_DEFAULTS.items() if lookup(given, key) is not None}
    defaults = TESTBED_DEFAULTS
    if lookup(given, "rounds.count") not in (None, 0, "0"):
        world = lookup(given, "testbed.world") or getattr(method_class, "testbed_world", None) or ROUNDS_WORLD
        rounds = merge(TESTBED_ROUNDS_DEFAULTS, WORLD_ROUNDS_DEFAULTS.get(str(world), {}))
        defaults = merge(defaults, merge(rounds, {"testbed": {"world": world}}))
    defaults = {
        group: {k: v for k, v in settings.items() if f"{group}.{k}" not in dropped}
        for group, settings in defaults.items()
    }
    defaults["method"] = {k: v for k, v in defaults["method"].items() if k in known}
    return defaults


@dataclass(frozen=True)
class Override:
    """A setting whose value is not the default. `default` is None for a setting without one."""

    key: str
    value: Any
    default: Any
    on_testbed: bool  # the value is the testbed's default

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition(".")[2]


def overrides(config: RunConfig) -> list[Override]:
    """The settings of a run that differ from the defaults, in the order of `--help`."""
    plain = RunConfig(config.method, config.method_name).to_dict()
    plain["method"] = {f.name: as_plain(f.default) for f in dataclasses.fields(config.method) if f.init}
    with contextlib.suppress(TypeError, ConfigError):  # a method of a user may need settings, and has no defaults then
        plain["method"] |= as_plain(type(config.method)())  # a default may be derived, as beta is from the variant
    defaults = flatten(merge(plain, method_defaults(type(config.method))))
    given = {"rounds": {"count": config.rounds.count}, "testbed": {"world": config.testbed.world}}
    testbed = flatten(testbed_defaults(type(config.method), given)) if config.on_testbed else {}
    return [
        Override(key, value, None if (d := defaults.get(key)) is dataclasses.MISSING else d, testbed.get(key) == value)
        for key, value in flatten(config.to_dict()).items()
        if key not in ("method.name", "output", "dry_run") and value != defaults.get(key)
    ]


def rate_source(config: RunConfig) -> str:
    """Where the learning rate comes from, in a few words."""
    lr, own = config.optim.lr, type(config.method)
    named = {"rounds": {"count": config.rounds.count}, "testbed": {"world": config.testbed.world}}
    if config.on_testbed:
        if lr == testbed_defaults(own, named)["optim"]["lr"]:
            return "the testbed's default"
    elif own.default_lr is not None:
        if lr == own.default_lr:
            return f"the default of method {config.method_name}: {own.default_lr_source}"
    elif lr == OptimConfig.lr:
        return "prefopt's default for all methods without one of their own"
    return "given as optim.lr"
