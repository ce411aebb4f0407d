"""Rules that hold between settings of different groups. `check_run` applies all of them, before any model is loaded."""

from __future__ import annotations

from prefopt.errors import ConfigError
from prefopt.settings.groups import ReferenceConfig
from prefopt.settings.schema import RunConfig, sources

_FIXED_SET = "set the size of a fixed training set (--testbed.pairs 40000), or leave it out"
_LIMITS = ("max_steps", "max_tokens", "max_seconds")


def check_run(config: RunConfig) -> None:
    """Raises: ConfigError for the first rule that the settings of a run break."""
    if config.rounds.count and config.model.export_dtype is not None:
        raise ConfigError(
            f"model.export_dtype: found '{config.model.export_dtype}' with rounds, each of which starts from the "
            "previous round's export; leave it out"
        )
    check_layout(config)
    check_precision(config)
    check_reference(config)
    check_length(config)
    check_model_and_data(config)
    check_stream(config)
    check_batches(config)
    check_sources(config)
    check_evaluation(config)


def check_layout(config: RunConfig) -> None:
    layout = config.train.layout
    if "prefix_shared" not in layout:
        return
    expected = "expected auto, padded or packed"
    if config.lora.dropout:
        raise ConfigError(
            f"train.layout: found '{layout}' with lora.dropout, but a shared prompt would have the same dropout mask "
            f"for both completions; {expected}"
        )
    if config.method.needs.rows != "pairs":
        raise ConfigError(
            f"train.layout: found '{layout}', but method '{config.method_name}' reads no rejected completions that "
            f"could share a prompt; {expected}"
        )
    if config.model.attention == "flash_attention_2":
        raise ConfigError(
            f"train.layout: found '{layout}', but flash_attention_2 has no mask for shared prompts; {expected} (or "
            "--model.attention sdpa)"
        )


def check_precision(config: RunConfig) -> None:
    """Data types, quantisation, attention kernels and compilation."""
    model, mixed, dtype = config.model, config.train.mixed_precision, config.model.dtype
    if mixed != "no" and dtype != "float32" and (mixed, dtype) != ("bf16", "bfloat16"):
        raise ConfigError(
            f"train.mixed_precision: found '{mixed}' with model.dtype '{dtype}', which autocast does not apply to; "
            "expected model.dtype float32"
        )
    if model.attention == "flash_attention_2" and mixed == "no" and dtype != "bfloat16":
        raise ConfigError(
            f"model.attention: 'flash_attention_2' computes in 16 bits, found model.dtype '{dtype}' and "
            "train.mixed_precision 'no'; expected train.mixed_precision bf16 or fp16 (or --model.attention sdpa)"
        )
    if config.train.compile and model.attention == "flex_attention":
        raise ConfigError(
            "train.compile: found true with model.attention 'flex_attention', which compiles itself; leave one out"
        )
    if model.quantize is None:
        if model.compute_dtype is not None:
            raise ConfigError(
                f"model.compute_dtype: found '{model.compute_dtype}' without model.quantize; set it too "
                "(--model.quantize nf4), or leave it out"
            )
        return
    quantize = f"with model.quantize '{model.quantize}'"
    if dtype == "float64":
        raise ConfigError(f"model.dtype: found 'float64' {quantize}, expected float32 or bfloat16")
    if config.train.compile:
        raise ConfigError(
            f"train.compile: found true {quantize}, but quantised matrix products cannot be compiled; leave one out"
        )


def check_reference(config: RunConfig) -> None:
    reference, default, method = config.reference, ReferenceConfig(), config.method_name
    for key in ("cache", "sync_every"):
        found = getattr(reference, key)
        if found != getattr(default, key) and config.method.needs.reference == "none":
            raise ConfigError(
                f"reference.{key}: found {found!r}, but method '{method}' reads no reference; leave it out"
            )
    if reference.cache == "logps" and config.method.needs.reference == "token":
        raise ConfigError(
            f"reference.cache: found 'logps', but method '{method}' reads the reference's full distribution at every "
            "token; expected hidden, or none for a live reference"
        )
    if reference.cache != "none" and streams_pairs(config):
        raise ConfigError(
            f"reference.cache: found '{reference.cache}', but no pair of the testbed's stream repeats; {_FIXED_SET}"
        )
    if reference.cache != "none" and reference.sync_every is not None:
        raise ConfigError(
            "reference.cache: given with reference.sync_every, but a reference that changes cannot be cached; leave "
            "one out"
        )
    for key, needed in (("cache_dtype", "cache"), ("cache_dir", "cache"), ("sync_weight", "sync_every")):
        found = getattr(reference, key)
        if found != getattr(default, key) and getattr(reference, needed) == getattr(default, needed):
            raise ConfigError(
                f"reference.{key}: found {found!r} without reference.{needed}; set that too, or leave it out"
            )
    if reference.cache_dtype != default.cache_dtype and reference.cache == "logps":
        raise ConfigError(
            "reference.cache_dtype: applies to hidden states only, found reference.cache 'logps'; leave it out"
        )


def check_length(config: RunConfig) -> None:
    """What ends the run, and the length of its schedule."""
    train, limits = config.train, [name for name in _LIMITS if getattr(config.train, name) is not None]
    if len(limits) > 1:
        raise ConfigError(f"train.{limits[1]}: given with train.{limits[0]}, but only one can end a run; leave one out")
    if train.schedule_epochs is not None and train.schedule_epochs < train.epochs and not limits:
        raise ConfigError(
            f"train.schedule_epochs: found {train.schedule_epochs!r}, expected at least train.epochs ({train.epochs})"
        )


def check_model_and_data(config: RunConfig) -> None:
    """Model and data are given together, or neither for the testbed."""
    if config.data.train is not None and config.model.path is None:
        raise ConfigError(
            "data.train: given without model.path; name the model to train (--model.path DIR), or leave both out for "
            "the testbed"
        )
    if config.model.path is not None and config.data.train is None:
        raise ConfigError(
            "model.path: given without data.train; name the pairs to train on (--data.train FILE), or leave both out "
            "for the testbed"
        )
    if config.on_testbed and config.data.eval is not None:
        raise ConfigError("data.eval: given without data.train, but the testbed generates its own held-out pairs")
    if config.on_testbed and config.rounds.count == 0 and config.testbed.world == "scratchpad":
        raise ConfigError(
            "testbed.world: 'scratchpad' has no training pairs, its policy generates them in rounds; set their number "
            "(--rounds.count 3), or choose another world"
        )


def streams_pairs(config: RunConfig) -> bool:
    """Whether training pairs come from the testbed's endless stream."""
    return config.on_testbed and config.testbed.pairs is None and config.rounds.count == 0


def check_stream(config: RunConfig) -> None:
    """What an endless stream of pairs does not have: an end, epochs, known lengths."""
    if not streams_pairs(config):
        return
    train = config.train
    if all(getattr(train, name) is None for name in _LIMITS):
        raise ConfigError(
            "train.max_steps: found none, expected a number of steps, because the testbed's stream of pairs is endless "
            "(or set the size of a fixed training set, --testbed.pairs 40000)"
        )
    if train.schedule_epochs is not None:
        raise ConfigError(f"train.schedule_epochs: the testbed's stream of pairs has no epochs; {_FIXED_SET}")
    for name, given in (("group_by_length", train.group_by_length), ("tokens_per_batch", train.tokens_per_batch)):
        if given:
            raise ConfigError(f"train.{name}: the lengths of the testbed's stream of pairs are not known; {_FIXED_SET}")


def check_batches(config: RunConfig) -> None:
    """Methods that compare the pairs of a batch need batches of one size, made at random."""
    train = config.train
    if not (train.group_by_length or train.tokens_per_batch is not None) or not config.method.needs.batch_values:
        return
    compares = f"method '{config.method_name}' compares the pairs of a batch with each other"
    if train.group_by_length:
        raise ConfigError(
            f"train.group_by_length: {compares}, so grouping them by length would change the loss; leave it out"
        )
    raise ConfigError(
        f"train.tokens_per_batch: {compares}, and the number of pairs would vary between steps; leave it out"
    )


def check_sources(config: RunConfig) -> None:
    """Names of data sources and their weights."""
    weights, named = config.data.weights, {key: sources(getattr(config.data, key)) for key in ("train", "eval")}
    for key, names in named.items():
        for i, name in enumerate(names):
            if not name:
                raise ConfigError(f"data.{key}: found an empty name beside a comma, expected a source")
            if name in names[:i]:
                raise ConfigError(f"data.{key}: '{name}' is named twice; use data.weights to sample it more often")
    if config.data.weight_column is not None and (config.rounds.count or not named["train"]):
        where = "rounds, whose pairs are new" if config.rounds.count else "the testbed, whose pairs have no such column"
        raise ConfigError(f"data.weight_column: given with {where}; leave it out")
    if weights is None:
        return
    if config.rounds.count:
        raise ConfigError("data.weights: given with rounds, which use every prompt once; leave it out")
    if not named["train"]:
        raise ConfigError("data.weights: given without data.train, expected the sources that it weighs")
    if len(weights) != len(named["train"]):
        raise ConfigError(
            f"data.weights: found {len(weights)} numbers, expected one for each of the {len(named['train'])} sources "
            f"of data.train ({', '.join(named['train'])})"
        )
    for name, weight in zip(named["train"], weights, strict=True):
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"data.weights: found {weight:g} for '{name}', expected a number >= 0")
    if not any(weights):
        raise ConfigError("data.weights: all are 0, expected at least one number > 0")


def check_evaluation(config: RunConfig) -> None:
    """Model selection, early stopping, and samples at evaluations."""
    select, patience, samples = config.eval.select, config.eval.patience, config.eval.generate
    if patience is not None and select is None and not (config.rounds.count and config.rounds.select_prompts):
        fix = "eval.select, e.g. --eval.select loss" if config.rounds.count == 0 else "rounds.select_prompts"
        raise ConfigError(f"eval.patience: found {patience}, but no metric to improve is given; set {fix}")
    if samples == 0:
        return
    if config.rounds.count:
        raise ConfigError(
            f"eval.generate: found {samples} with rounds, which already sample answers to rounds.eval_prompts prompts "
            "after each round; leave it out"
        )
    if config.method.needs.output == "scores":
        raise ConfigError(
            f"eval.generate: found {samples}, but method '{config.method_name}' trains a judge, which generates no "
            "text; leave it out"
        )
    if not config.on_testbed and config.data.eval is None and config.data.eval_fraction == 0:
        raise ConfigError(
            f"eval.generate: found {samples}, but no prompts are held out; set data.eval or data.eval_fraction"
        )
