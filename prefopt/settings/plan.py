"""The settings of the `plan` command: all of a training run's, and what there is to run it on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.errors import ConfigError
from prefopt.settings.help import help_page, options_of
from prefopt.settings.nested import flatten
from prefopt.settings.reader import build, read_config_file, split_flags, unknown_setting
from prefopt.settings.schema import RunConfig
from prefopt.settings.train import parse


@dataclass(frozen=True)
class PlanConfig:
    """What there is to run on, and what is known of the data."""

    gpus: int = 8
    """Ranks: GPUs of all nodes together."""
    gpus_per_node: int = 8
    """Most ranks of one node, which share its host's memory."""
    gpu_memory: float = 80.0
    """GB of one GPU; a plan fits when it needs no more than nine tenths of it."""
    tflops: tuple[float, ...] | None = None
    """Lowest and highest speed of one GPU in such a run, e.g. 200,450. None: 200,450 in 16 bits, 20,45 in 32."""
    bandwidth: float = 200.0
    """GB/s that a GPU sends to the others and gets from them: some 200 in one node, 25 to 50 between nodes."""
    prompt_tokens: int | None = None
    """Mean tokens of a prompt. None: what is left of data.max_length, the longest that a row can be."""
    completion_tokens: int | None = None
    """Mean tokens of a completion. None: half of data.max_length."""
    pairs: int | None = None
    """Pairs of data.train, for hours per epoch and the size of a reference's cache. None: lines of a JSONL file, else
    not known."""


NO_DATA = "data that a plan does not read"


def parse_plan(argv: Sequence[str]) -> tuple[PlanConfig, RunConfig]:
    """What there is to run on, and the run.

    Raises: ConfigError, one line that names the key, what was found, what was expected and the nearest mend.
    """
    names = {field.name for field in dataclasses.fields(PlanConfig)}
    flags = split_flags(argv)
    own = {name: flags.pop(name) for name in list(flags) if name in names}
    plan: PlanConfig = build(PlanConfig, own, "", {})
    for name in ("gpus", "gpus_per_node", "prompt_tokens", "completion_tokens", "pairs"):
        value = getattr(plan, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: found {value}, expected a number >= 1")
    for name in ("gpu_memory", "bandwidth"):
        if not 0 < getattr(plan, name) < float("inf"):
            raise ConfigError(f"--{name}: found {getattr(plan, name)}, expected GB above 0")
    if plan.tflops is not None and (len(plan.tflops) != 2 or not 0 < plan.tflops[0] <= plan.tflops[1]):
        shown = ",".join(f"{value:g}" for value in plan.tflops)
        raise ConfigError(f"--tflops: found {shown}, expected the lowest and the highest, e.g. 200,450")
    for name in flags:
        if "." not in name and name not in ("config", "seed", "output", "dry_run", "help"):
            raise unknown_setting(name, [*names, "config", "method"], "")
    file: dict[str, Any] = {}
    if isinstance(flags.get("config"), str):
        file = flatten(read_config_file(Path(flags["config"])))
    if "model.path" not in flags and file.get("model.path") is None:
        raise ConfigError("--model.path: not given, expected the model that is to be trained (its config is enough)")
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
            f"--prompt_tokens: found {prompt} with {response} of a completion, expected no more than data.max_length "
            f"({run.data.max_length}) together"
        )
    return dataclasses.replace(plan, prompt_tokens=prompt, completion_tokens=response), run


def plan_help() -> str:
    """The grouped `--help` of the command."""
    head = [
        "usage: plan.py --method NAME --model.path DIR [--gpus N] [--gpu_memory GB] [--GROUP.SETTING VALUE ...]",
        "",
        "What a run will hold on each GPU and how long a step will take, under each backend, from the settings that",
        "train.py takes (train.py --help lists them) and the model's config alone: no weights, no data, no GPU.",
        "",
    ]
    rows = options_of(PlanConfig, "")
    return help_page(head, [("plan", (PlanConfig.__doc__ or "").strip(), rows)])
