"""The settings of the `plan` command: those of a training run, the hardware, and the lengths of the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.errors import ConfigError
from prefopt.settings.help import OptionGroup, about, help_page, options_of, program, split_topics
from prefopt.settings.nested import flatten
from prefopt.settings.ranges import Group, ranged
from prefopt.settings.reader import build, read_config_file, split_flags, unknown_setting
from prefopt.settings.schema import RunConfig
from prefopt.settings.train import parse
from prefopt.settings.train_help import help_text


@dataclass(frozen=True)
class PlanConfig(Group):
    """The hardware, and the lengths of the data."""

    prefix = "--"

    gpus: int = ranged(8, at_least=1)
    """World size: number of GPUs over all nodes."""
    gpus_per_node: int = ranged(8, at_least=1)
    """Maximum number of GPUs per node; they share the node's host memory."""
    gpu_memory: float = ranged(80.0, above=0)
    """Memory of a GPU in GB; a plan fits if it needs at most 90% of it."""
    tflops: tuple[float, ...] | None = None
    """Lowest and highest achieved TFLOP/s of a GPU, e.g. 200,450. None: 200,450 in 16-bit and 20,45 in 32-bit runs."""
    bandwidth: float = ranged(200.0, above=0)
    """Bandwidth of a GPU to the others in GB/s: about 200 within a node, 25 to 50 between nodes."""
    prompt_tokens: int | None = ranged(None, at_least=1)
    """Mean tokens of a prompt. None: data.max_length minus the completion, the longest possible prompt."""
    completion_tokens: int | None = ranged(None, at_least=1)
    """Mean tokens of a completion. None: half of data.max_length."""
    pairs: int | None = ranged(None, at_least=1)
    """Number of pairs in data.train, for hours per epoch and the size of a reference cache. None: the lines of a JSONL
    file, otherwise unknown."""


NO_DATA = "data that a plan does not read"


def parse_plan(argv: Sequence[str]) -> tuple[PlanConfig, RunConfig]:
    """The hardware, and the settings of the run.

    Raises: ConfigError, one line that names the setting, what was found, what was expected and a fix.
    """
    names = {field.name for field in dataclasses.fields(PlanConfig)}
    flags = split_flags(argv)
    own = {name: flags.pop(name) for name in list(flags) if name in names}
    plan: PlanConfig = build(PlanConfig, own, "", {})
    if plan.tflops is not None and (len(plan.tflops) != 2 or not 0 < plan.tflops[0] <= plan.tflops[1]):
        shown = ",".join(f"{value:g}" for value in plan.tflops)
        raise ConfigError(f"--tflops: found {shown}, expected the lowest and the highest TFLOP/s, e.g. 200,450")
    for name in flags:
        if "." not in name and name not in ("config", "seed", "output", "dry_run", "help"):
            raise unknown_setting(name, [*names, "config", "method"], "")
    file: dict[str, Any] = {}
    if isinstance(flags.get("config"), str):
        file = flatten(read_config_file(Path(flags["config"])))
    if "model.path" not in flags and file.get("model.path") is None:
        raise ConfigError("--model.path: not given, expected the model to train (its config is enough)")
    if "data.train" not in flags and file.get("data.train") is None:
        flags["data.train"] = NO_DATA
    words = [part for key, value in flags.items() for part in ((f"--{key}",) if value is True else (f"--{key}", value))]
    words = ["--method" if word == "--method.name" else word for word in words]
    run = parse(words)
    for name in ("prompt_tokens", "completion_tokens"):
        value = getattr(plan, name)
        if value is not None and value >= run.data.max_length:
            raise ConfigError(f"--{name}: found {value}, expected less than data.max_length ({run.data.max_length})")
    response = plan.completion_tokens or run.data.max_length // 2
    prompt = plan.prompt_tokens or run.data.max_length - response
    if prompt + response > run.data.max_length:
        raise ConfigError(
            f"--prompt_tokens: found {prompt}, with {response} completion tokens, expected a sum of at most "
            f"data.max_length ({run.data.max_length})"
        )
    return dataclasses.replace(plan, prompt_tokens=prompt, completion_tokens=response), run


def plan_help(argv: Sequence[str] = ()) -> str:
    """The `--help` page of the command; `--help GROUP` prints a group of a training run's settings."""
    topics, _ = split_topics(argv)
    if topics - {"plan", "all"}:
        return help_text(argv)
    head = (
        f"usage: {program('plan')} --method NAME --model.path DIR [--gpus N] [--gpu_memory GB] "
        "[--GROUP.SETTING VALUE ...]\n\n"
        "Estimates the memory of each GPU and the time of a step under every parallel backend, from the settings of "
        f"{program('train')} ({program('train')} --help lists them) and the model's config. It needs no weights, no "
        "data and no GPU.\n"
    )
    return help_page([head], [OptionGroup("plan", about(PlanConfig), options_of(PlanConfig, ""))], topics)
