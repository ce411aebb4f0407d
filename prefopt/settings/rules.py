"""Rules that hold between the settings of different groups."""

from __future__ import annotations

import re
from typing import Any

from prefopt.errors import ConfigError, did_you_mean
from prefopt.settings.groups import OPTIMIZERS, ReferenceConfig, check_template_settings
from prefopt.settings.nested import flatten
from prefopt.settings.round_rules import check_sampling
from prefopt.settings.schema import RunConfig, sources


def check_run(config: RunConfig) -> None:
    def need(holds: bool, key: str, value: Any, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{key}: found {value!r}, expected {expected}")

    positive = (
        "train.global_batch",
        "train.micro_batch",
        "train.save_every",
        "train.keep_last",
        "train.max_shard_mb",
        "train.rendezvous_timeout",
        "eval.every",
        "eval.batch",
        "testbed.eval_pairs",
        "optim.lr",
        "train.epochs",
    )
    optional = (
        *("train.schedule_epochs", "train.max_steps", "train.max_tokens", "train.max_seconds"),
        *("train.threads", "train.tokens_per_batch", "testbed.pairs"),
        *("kernel.token_tile", "kernel.vocab_tile", "lora.r", "lora.alpha", "reference.sync_every", "eval.patience"),
        *("eval.max_pairs",),
    )
    seeds = ("seed", "testbed.seed")
    values = flatten(config.to_dict())
    for key in positive:
        need(0 < values[key] < float("inf"), key, values[key], "a number > 0")
    for key in optional:
        need(values[key] is None or 0 < values[key] < float("inf"), key, values[key], "a number > 0, or none")
    for key in seeds:
        need(0 <= values[key] < 2**31, key, values[key], "a whole number from 0 to 2147483647")
    if config.rounds.count and config.model.export_dtype is not None:
        raise ConfigError(
            f"model.export_dtype: found '{config.model.export_dtype}', with rounds, each of which starts from what the "
            "one before has exported, expected none"
        )
    layout = config.train.layout
    if "prefix_shared" in layout:
        if config.lora.dropout:
            raise ConfigError(
                f"train.layout: found '{layout}' with lora.dropout, which would drop the same of a shared prompt for "
                "both sides of a pair; expected auto, padded or packed"
            )
        if config.method.needs.rows == "chosen_only":
            raise ConfigError(
                f"train.layout: found '{layout}', but this method reads no rejected side that could share a prompt; "
                "expected auto, padded or packed"
            )
        if config.model.attention == "flash_attention_2":
            raise ConfigError(
                f"train.layout: found '{layout}', but flash_attention_2 cannot share prompts; "
                "expected auto, padded or packed (or --model.attention sdpa)"
            )
    check_template_settings(config.data, "data.")
    need(config.data.max_length >= 2, "data.max_length", config.data.max_length, "at least 2")
    need(
        0 <= config.data.eval_fraction < 1, "data.eval_fraction", config.data.eval_fraction, "a share from 0 to below 1"
    )
    need(0 <= config.optim.warmup_ratio <= 1, "optim.warmup_ratio", config.optim.warmup_ratio, "a share from 0 to 1")
    need(
        config.optim.warmup_steps is None or config.optim.warmup_steps >= 0,
        "optim.warmup_steps",
        config.optim.warmup_steps,
        "a number >= 0, or none",
    )
    router = config.model.router_aux_weight
    need(
        router is None or 0 <= router < float("inf"),
        "model.router_aux_weight",
        router,
        "a number >= 0 (0: the loss is left out), or none",
    )
    need(config.kernel.cache_mb >= 0, "kernel.cache_mb", config.kernel.cache_mb, "a number >= 0 (0: none is kept)")
    need(config.optim.clip >= 0, "optim.clip", config.optim.clip, "a number >= 0 (0: no clipping)")
    need(config.optim.weight_decay >= 0, "optim.weight_decay", config.optim.weight_decay, "a number >= 0")
    need(0 <= config.lora.dropout < 1, "lora.dropout", config.lora.dropout, "a share from 0 to below 1")
    both = sorted({*config.lora.target_modules} & {*config.lora.modules_to_save})
    if both:
        raise ConfigError(
            f"lora.modules_to_save: '{both[0]}' is in lora.target_modules too, expected it in one of them"
        )
    mixed, dtype = config.train.mixed_precision, config.model.dtype
    if mixed != "no" and dtype != "float32" and (mixed, dtype) != ("bf16", "bfloat16"):
        raise ConfigError(
            f"train.mixed_precision: found '{mixed}' with model.dtype '{dtype}', which it would not autocast, expected "
            "float32 weights"
        )
    if config.model.attention == "flash_attention_2" and mixed == "no" and dtype != "bfloat16":
        raise ConfigError(
            f"model.attention: 'flash_attention_2' computes in 16 bits, found {dtype} weights and "
            "train.mixed_precision 'no'; expected train.mixed_precision bf16 or fp16 (or --model.attention sdpa)"
        )
    check_reference(config)
    schedule = config.train.schedule_epochs
    ends = [name for name in ("max_steps", "max_tokens", "max_seconds") if getattr(config.train, name) is not None]
    if len(ends) > 1:
        raise ConfigError(f"train.{ends[1]}: given with train.{ends[0]}, and one thing ends a run; leave one out")
    need(
        schedule is None or schedule >= config.train.epochs or bool(ends),
        "train.schedule_epochs",
        schedule,
        f"at least train.epochs ({config.train.epochs})",
    )
    if config.optim.name not in OPTIMIZERS and not re.fullmatch(r"\w+(\.\w+)+", config.optim.name):
        raise ConfigError(
            f"optim.name: found '{config.optim.name}', expected one of {', '.join(OPTIMIZERS)} or a dotted path"
            f"{did_you_mean(config.optim.name, OPTIMIZERS)}"
        )
    check_precision(config)
    if config.data.train is not None and config.model.path is None:
        raise ConfigError(
            "data.train is given without model.path; name the model to train (--model.path DIR), "
            "or neither for the testbed"
        )
    if config.model.path is not None and config.data.train is None:
        raise ConfigError(
            "model.path is given without data.train; name the pairs to train on (--data.train FILE), "
            "or neither for the testbed"
        )
    if config.on_testbed and config.rounds.count == 0 and config.testbed.world == "scratchpad":
        raise ConfigError(
            "testbed.world: 'scratchpad' has no pairs of its own, the policy makes them in rounds; name how many "
            "(--rounds.count 3), or another world"
        )
    streamed = config.on_testbed and config.testbed.pairs is None and config.rounds.count == 0
    if streamed and not ends:
        raise ConfigError(
            "train.max_steps: found none, expected a number of steps: the testbed's stream of pairs has no end "
            "(or name the size of a fixed set, testbed.pairs)"
        )
    if streamed and schedule is not None:
        raise ConfigError(
            "train.schedule_epochs: the testbed's stream of pairs has no epochs (name the size of a fixed set, "
            "testbed.pairs, or leave it out)"
        )
    if config.train.group_by_length and streamed:
        raise ConfigError(
            "train.group_by_length: the testbed's stream of pairs has no lengths to group by (name the size of a fixed "
            "set, testbed.pairs, or leave it out)"
        )
    if config.train.group_by_length and config.method.needs.coupled:
        raise ConfigError(
            f"train.group_by_length: method '{config.method_name}' compares the pairs of a batch with each other, so "
            "which pairs meet there changes what is learned (leave it out)"
        )
    if config.train.tokens_per_batch is not None and streamed:
        raise ConfigError(
            "train.tokens_per_batch: the testbed's stream of pairs has no lengths to plan by (name the size of a fixed "
            "set, testbed.pairs, or leave it out)"
        )
    if config.train.tokens_per_batch is not None and config.method.needs.coupled:
        raise ConfigError(
            f"train.tokens_per_batch: method '{config.method_name}' compares the pairs of a batch with each other, and "
            "such steps have now more of them, now fewer (leave it out)"
        )
    check_sources(config)
    if config.on_testbed and config.data.eval is not None:
        raise ConfigError("data.eval is given without data.train; the testbed makes its own held-out pairs")
    check_evaluation(config)


def check_evaluation(config: RunConfig) -> None:
    """What is chosen by, and what is sampled. Raises: ConfigError."""
    select, patience, samples = config.eval.select, config.eval.patience, config.eval.generate
    metric, colon, direction = (select or "loss").partition(":")
    if not metric or (colon and direction not in ("min", "max")):
        raise ConfigError(
            f"eval.select: found '{select}', expected a metric's name, or it with a direction, such as "
            f"{metric or 'kl/chosen'}:min or {metric or 'kl/chosen'}:max"
        )
    if patience is not None and select is None and not (config.rounds.count and config.rounds.select_prompts):
        mend = "eval.select, e.g. --eval.select loss" if config.rounds.count == 0 else "rounds.select_prompts"
        raise ConfigError(f"eval.patience: found {patience}, but nothing says what better means; name {mend}")
    if samples < 0:
        raise ConfigError(f"eval.generate: found {samples}, expected a number >= 0")
    if samples == 0:
        return
    if config.rounds.count:
        raise ConfigError(
            f"eval.generate: found {samples}, with rounds, which answer rounds.eval_prompts prompts after each; "
            "leave it out"
        )
    if config.method.needs.output == "scores":
        raise ConfigError(
            f"eval.generate: found {samples}, but method '{config.method_name}' trains a judge, which answers no "
            "prompts; leave it out"
        )
    if not config.on_testbed and config.data.eval is None and config.data.eval_fraction == 0:
        raise ConfigError(
            f"eval.generate: found {samples}, but nothing is held out to ask; name data.eval or data.eval_fraction"
        )
    check_sampling(config.to_dict())


def check_reference(config: RunConfig) -> None:
    reference, plain = config.reference, ReferenceConfig()
    for key in ("cache", "sync_every"):
        found = getattr(reference, key)
        if found != getattr(plain, key) and config.method.needs.reference == "none":
            raise ConfigError(
                f"reference.{key}: found {found!r}, but method '{config.method_name}' reads no reference; leave it out"
            )
    if reference.cache == "logps" and config.method.needs.reference == "token":
        raise ConfigError(
            f"reference.cache: found 'logps', but method '{config.method_name}' reads the reference's whole "
            "distribution at each token; expected hidden, or none for a live reference"
        )
    streamed = config.on_testbed and config.testbed.pairs is None and config.rounds.count == 0
    if reference.cache != "none" and streamed:
        raise ConfigError(
            f"reference.cache: found '{reference.cache}', but no pair of the testbed's stream comes twice; name the "
            "size of a fixed set (--testbed.pairs 40000), or leave it out"
        )
    if reference.cache != "none" and reference.sync_every is not None:
        raise ConfigError(
            "reference.cache: given with reference.sync_every, but what moves cannot be kept; leave one out"
        )
    for key, needed in (("cache_dtype", "cache"), ("cache_dir", "cache"), ("sync_weight", "sync_every")):
        found = getattr(reference, key)
        if found != getattr(plain, key) and getattr(reference, needed) == getattr(plain, needed):
            raise ConfigError(
                f"reference.{key}: found {found!r} without reference.{needed}; name that too, or leave it out"
            )
    if reference.cache_dtype != plain.cache_dtype and reference.cache == "logps":
        raise ConfigError("reference.cache_dtype: is of hidden states, found reference.cache 'logps'; leave it out")
    if not 0 < reference.sync_weight <= 1:
        raise ConfigError(f"reference.sync_weight: found {reference.sync_weight!r}, expected above 0, up to 1")


def check_precision(config: RunConfig) -> None:
    """What quantised weights and compiled layers go together with."""
    model = config.model
    if config.train.compile and model.attention == "flex_attention":
        raise ConfigError(
            "train.compile: found true with model.attention 'flex_attention', which compiles itself; leave one out"
        )
    if model.quantize is None:
        if model.compute_dtype is not None:
            raise ConfigError(
                f"model.compute_dtype: found '{model.compute_dtype}' without model.quantize; name how weights are held "
                "(--model.quantize nf4), or leave it out"
            )
        return
    if model.dtype == "float64":
        raise ConfigError(
            f"model.dtype: found 'float64' with model.quantize '{model.quantize}', expected float32 or bfloat16"
        )
    if config.train.compile:
        raise ConfigError(
            f"train.compile: found true with model.quantize '{model.quantize}', whose products are not compiled; leave "
            "one out"
        )


def check_sources(config: RunConfig) -> None:
    weights, named = config.data.weights, {key: sources(getattr(config.data, key)) for key in ("train", "eval")}
    for key, names in named.items():
        for i, name in enumerate(names):
            if not name:
                raise ConfigError(f"data.{key}: found a comma with nothing before or behind it, expected a source")
            if name in names[:i]:
                raise ConfigError(f"data.{key}: '{name}' is named twice (a larger share is for data.weights to give)")
    if weights is None:
        return
    if config.rounds.count:
        raise ConfigError("data.weights: given with rounds, which ask each prompt once; leave it out")
    if not named["train"]:
        raise ConfigError("data.weights: given without data.train, expected the sources that they are of")
    if len(weights) != len(named["train"]):
        raise ConfigError(
            f"data.weights: found {len(weights)} numbers, expected one for each of the {len(named['train'])} sources "
            f"of data.train ({', '.join(named['train'])})"
        )
    for name, weight in zip(named["train"], weights, strict=True):
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"data.weights: found {weight:g} for '{name}', expected a finite number >= 0")
    if not any(weights):
        raise ConfigError("data.weights: all are 0, expected one above it at least")
