"""The settings of the `train` command: defaults, testbed defaults, YAML file, flags, each over the one before."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt import registry
from prefopt.errors import ConfigError
from prefopt.method import Method
from prefopt.settings.defaults import method_defaults, testbed_defaults
from prefopt.settings.groups import DataConfig, ModelConfig
from prefopt.settings.identity import default_output
from prefopt.settings.nested import flatten, lookup, merge, nest
from prefopt.settings.reader import build, check_keys, join_sources, pop_method_name, read_config_file, split_flags
from prefopt.settings.round_rules import check_rounds
from prefopt.settings.rules import check_run
from prefopt.settings.sampling_groups import JudgeConfig
from prefopt.settings.schema import RunConfig, sources


def parse(argv: Sequence[str]) -> RunConfig:
    """The settings of a training run from its command line.

    Args:
        argv: flags without the program's name, e.g. `["--method", "dpo", "--optim.lr", "1e-6"]`.
    Raises: ConfigError, one line that names the setting, what was found, what was expected and a fix.
    """
    flags = split_flags(argv)
    file = flags.pop("config", None)
    if file is True:
        raise ConfigError("--config: found no value, expected a YAML file")
    layers = [(str(file), read_config_file(Path(str(file))))] if file is not None else []
    layers.append(("", nest(flags)))
    named = [pop_method_name(layer, where) for where, layer in layers]
    name = next((n for n in reversed(named) if n), None)
    if name is None:
        for where, layer in layers:
            check_keys(layer, "", Method, where)  # a mistyped --method is an unknown setting
        raise ConfigError(
            f"--method: not given, expected one of {', '.join(registry.names())} (or a dotted module path)"
        )
    method_class = registry.get(name)
    merged: dict[str, Any] = method_defaults(method_class)
    for where, layer in layers:
        check_keys(layer, name, method_class, where)
        merged = merge(merged, join_sources(layer, where))
    if lookup(merged, "model.path") is None and lookup(merged, "data.train") is None:
        given = merged
        merged = merge(method_defaults(method_class), testbed_defaults(method_class, given))
        for where, layer in layers:
            merged = merge(merged, join_sources(layer, where))
    sources = {key: where for where, layer in layers for key in flatten(layer)}
    config = build(
        RunConfig,
        {k: v for k, v in merged.items() if k != "method"},
        "",
        sources,
        given={
            "method": build(method_class, merged.get("method", {}), "method.", sources),
            "method_name": name,
        },
    )
    config = dataclasses.replace(config, judge=with_judge_kind(config), model=with_compute_dtype(config))
    check_run(config)
    check_rounds(config)
    config = dataclasses.replace(
        config,
        model=normalized(config.model, "path"),
        reference=normalized(config.reference, "path"),
        data=normalized(normalized_sources(config.data), "chat_template"),
        rounds=normalized(config.rounds, "compare", "candidates"),
    )
    if not config.output:
        config = dataclasses.replace(config, output=f"runs/{default_output(config)}")
    return config


def from_dict(settings: Mapping[str, Any]) -> RunConfig:
    """The inverse of `RunConfig.to_dict`."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    name = plain["method"].pop("name")
    method = build(registry.get(name), plain.pop("method"), "method.", {})
    return build(RunConfig, plain, "", {}, given={"method": method, "method_name": name})


def with_compute_dtype(config: RunConfig) -> ModelConfig:
    """The model's settings, with the default of compute_dtype filled in where weights are quantised."""
    model = config.model
    if model.quantize is None or model.compute_dtype is not None or model.dtype == "float64":
        return model
    mixed: dict[str, Any] = {"bf16": "bfloat16", "fp16": "float16"}
    return dataclasses.replace(model, compute_dtype=mixed.get(config.train.mixed_precision, model.dtype))


def with_judge_kind(config: RunConfig) -> JudgeConfig:
    """The judge's settings, with the default of its kind filled in. Raises: ConfigError where rounds need a judge."""
    if config.judge.kind is not None or config.rounds.count < 1:
        return config.judge
    if config.rounds.pairs == "data_sampled":
        return dataclasses.replace(config.judge, kind="none")
    if config.on_testbed:
        return dataclasses.replace(config.judge, kind=registry.testbed_judge())
    raise ConfigError(
        "judge.kind: not given, expected the judge that ranks the completions, one of "
        f"{', '.join(registry.judges_of_files())}"
    )


def normalized(group: Any, *names: str) -> Any:
    """The group with local paths in their normal form: `./pairs.jsonl` and `pairs.jsonl` give the same run."""
    paths = {name: getattr(group, name) for name in names}
    local = {name: str(Path(path)) for name, path in paths.items() if path is not None and Path(path).exists()}
    return dataclasses.replace(group, **local)


def normalized_sources(data: DataConfig) -> DataConfig:
    """The data settings with the local paths in data.train and data.eval in their normal form."""
    normal: dict[str, Any] = {
        key: ",".join(str(Path(name)) if Path(name).exists() else name for name in sources(getattr(data, key))) or None
        for key in ("train", "eval")
    }
    return dataclasses.replace(data, **normal)
