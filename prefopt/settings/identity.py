"""Which settings identify a run: what may change between attempts at it, and where it is saved by default."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefopt.settings.nested import flatten, lookup
from prefopt.settings.schema import RunConfig, all_defaults, sources
from prefopt.storage import text_hash

# Settings of a run's length; raising one extends a finished run.
LENGTHS = ("train.max_steps", "train.epochs", "train.max_tokens", "train.max_seconds")


# Settings that may change when a run is resumed: they change its trajectory by no more than rounding.
FREE_TO_CHANGE = (
    *("dry_run", "output", "track", "kernel", "eval.batch", "reference.cache_dir"),
    *("model.gradient_checkpointing", "model.offload_activations"),
    *("train.compile", "train.check_memory", "train.rendezvous_timeout", "train.show_batch", "train.keep_last"),
    *("train.max_shard_mb", "train.save_every", "train.micro_batch", "train.threads", "train.layout"),
    *("rounds.launcher", "rounds.compare", "rounds.candidates"),
    *("generate.python", "generate.url", "generate.api_key_env"),
    *("generate.concurrency", "generate.retries", "generate.timeout"),
    *("judge.url", "judge.api_key_env", "judge.concurrency", "judge.retries", "judge.timeout"),
)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for each setting that differs between two runs and must not change when a run is resumed.

    A setting that did not exist when the old run started has its default there.
    """
    before, after = flatten(old), flatten(new)
    for key, value in flatten(all_defaults()).items():
        if key in after and lookup(old, key, before) is before:
            before[key] = value
    # dropout masks, and the number of tokens processed, depend on micro-batches and layout
    depends = before.get("lora.dropout") or before.get("train.max_tokens")
    held = ("train.micro_batch", "train.layout", "train.compile") if depends else ()
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and (key in held or not any(key == free or key.startswith(free + ".") for free in FREE_TO_CHANGE))
    ]


def default_output(config: RunConfig) -> str:
    """An output folder named by a hash of the settings, so that the same command resumes the same run."""
    settings = {
        k: v
        for k, v in flatten(config.to_dict()).items()
        if not any(k == free or k.startswith(free + ".") for free in FREE_TO_CHANGE)
    }
    digest = text_hash(json.dumps(settings, sort_keys=True, default=str))[:8]
    task = "testbed" if config.on_testbed else "-".join(Path(name).stem for name in sources(config.data.train)[:3])
    return f"{task}-{config.method_name.rpartition('.')[2]}-{digest}"
