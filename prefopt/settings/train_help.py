"""The `--help` page of training: the groups of all settings, and those of the method that is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from prefopt import registry
from prefopt.settings.defaults import TESTBED_DEFAULTS, method_defaults
from prefopt.settings.help import (
    Option,
    OptionGroup,
    about,
    check_topics,
    help_page,
    options_of,
    program,
    split_topics,
)
from prefopt.settings.nested import flatten
from prefopt.settings.reader import pop_method_name, read_config_file, split_flags
from prefopt.settings.sampling_groups import ROUND_GROUPS
from prefopt.settings.schema import NOT_SETTINGS, RunConfig, type_hints

# Groups that are one line each, unless their help is asked for.
FOLDED = (*ROUND_GROUPS, "lora", "kernel", "track", "testbed")


def help_text(argv: Sequence[str], usage: str | None = None) -> str:
    """The `--help` page, with the settings of the method that `argv` names.

    The groups in `FOLDED` are one line each, except in `--help all` and for groups of which `argv` gives a setting.
    `--help GROUP` prints that group alone, also `--help run` and `--help method`.

    Args: usage: the lines above the groups, of another command with these settings. None: those of `train`.
    """
    topics, words = split_topics(argv)
    hints = {key: hint for key, hint in type_hints(RunConfig).items() if key not in NOT_SETTINGS}
    hints = {key: hint for key, hint in hints.items() if dataclasses.is_dataclass(hint)}
    check_topics(topics, ["run", "method", *hints])
    flags = split_flags(words)
    unfolded = topics | {key.partition(".")[0] for key in flags}
    if unfolded & {*ROUND_GROUPS}:
        unfolded |= {*ROUND_GROUPS}
    if "eval.generate" in flags:
        unfolded.add("generate")
    method = _method_name(flags)
    groups = [_run_group(), *_method_groups(method)]
    for key, hint in hints.items():
        folded = key in FOLDED and not unfolded & {key, "all"}
        text = about(hint) + (f" (--help {key} lists its settings)" if folded else "")
        if key == "testbed":
            text += f" Defaults on the testbed: {', '.join(f'{k} {v}' for k, v in flatten(TESTBED_DEFAULTS).items())}."
        groups.append(OptionGroup(key, text, () if folded else options_of(hint, f"{key}.")))
    if method is not None:
        groups = _with_defaults_of(method, groups)
    head = usage or (
        f"usage: {program('train')} --method NAME [--config FILE] [--GROUP.SETTING VALUE ...]\n"
        f"       {program('train')} --help [GROUP]\n\n"
        "Every setting is a flag and a key of YAML files. In brackets: its default. --help GROUP prints one group, "
        "--help all prints every group in full.\n"
    )
    return help_page([head], groups, topics)


def _method_name(flags: dict[str, object]) -> str | None:
    if "method.name" in flags:
        return str(flags["method.name"])
    if "config" in flags:
        file = str(flags["config"])
        return pop_method_name(read_config_file(Path(file)), file)
    return None


def _run_group() -> OptionGroup:
    config = Option("--config", "FILE", "", "YAML file of settings; flags take precedence over it.")
    method = Option("--method", "NAME", "", "Training method: one of those below, or a dotted module path.")
    return OptionGroup("run", "", [method, config, *options_of(RunConfig, "", hidden=("--method_name",))])


def _method_groups(method: str | None) -> list[OptionGroup]:
    """The settings of one method, or the lists of all methods by kind."""
    if method is not None:
        cls = registry.get(method)
        return [OptionGroup(f"method {method}", _title(method), options_of(cls, "method."))]
    about = "The methods by kind. --method NAME --help method lists the settings of one."
    listed = [OptionGroup("method", about)]
    for kind, names in registry.by_kind().items():
        options = [Option(name, "", "", _title(name)) for name in names]
        listed.append(OptionGroup(f"method ({kind})", f"They {registry.KINDS[kind]}.", options))
    return listed


def _title(method: str) -> str:
    return (registry.get(method).__doc__ or "").strip().partition("\n")[0]


def _with_defaults_of(method: str, groups: Sequence[OptionGroup]) -> list[OptionGroup]:
    """The groups with the defaults that the method declares."""
    own = {f"--{key}": f"{value:g}" for key, value in flatten(method_defaults(registry.get(method))).items()}
    return [
        group._replace(
            options=[option._replace(default=own.get(option.flag, option.default)) for option in group.options]
        )
        for group in groups
    ]
