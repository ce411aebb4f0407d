"""The `--help` pages, made from the dataclasses and the strings under their fields."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from prefopt import registry
from prefopt.errors import ConfigError, did_you_mean
from prefopt.method import Method
from prefopt.settings.defaults import TESTBED_DEFAULTS, method_defaults
from prefopt.settings.nested import flatten
from prefopt.settings.reader import pop_method_name, read_config_file, split_flags
from prefopt.settings.sampling_groups import ROUND_GROUPS
from prefopt.settings.schema import NOT_SETTINGS, RunConfig, as_plain, type_hints

FOLDED = (*ROUND_GROUPS, "lora", "kernel", "track", "testbed")  # one line each in a `--help` that does not ask for them


def help_text(argv: Sequence[str]) -> str:
    """The grouped `--help`, with the settings of the method that `argv` names if it names one.

    The groups in `FOLDED` are one line each, but for those that `argv` asks for (`--help lora`, `--help all`) or names
    a setting of.
    """
    words, topics = [], set()
    for before, word in zip(["", *argv], argv, strict=False):
        if before in ("--help", "-h") and not word.startswith("--"):
            topics.add(word)
        elif word not in ("--help", "-h"):
            words.append(word)
    hints = {key: hint for key, hint in type_hints(RunConfig).items() if key not in NOT_SETTINGS}
    known = [key for key, hint in hints.items() if dataclasses.is_dataclass(hint)]
    for topic in topics - {"all", *known}:
        raise ConfigError(f"--help: found '{topic}', expected {', '.join(known)} or all{did_you_mean(topic, known)}")
    flags = split_flags(words)
    open_groups = topics | {key.partition(".")[0] for key in flags}
    if open_groups & {*ROUND_GROUPS}:
        open_groups |= {*ROUND_GROUPS}
    name = flags.get("method.name")
    if name is None and "config" in flags:
        name = pop_method_name(read_config_file(Path(str(flags["config"]))), str(flags["config"]))
    general = [("--config", "FILE", "", "YAML file of settings; flags take precedence over it.")]
    groups: list[tuple[str, str, list[Option]]] = []
    for key, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            asked = open_groups & {key, "all"} or (key == "generate" and "eval.generate" in flags)
            folded = key in FOLDED and not asked
            rows = [] if folded else options_of(hint, f"{key}.")
            more = f" (--help {key} lists its settings)" if folded else ""
            groups.append((key, (hint.__doc__ or "").strip() + more, rows))
    general += [row for row in options_of(RunConfig, "") if row[0] != "--method_name"]
    if name is not None:
        method_class = registry.get(str(name))
        title = (method_class.__doc__ or "").strip().partition("\n")[0]
        groups.insert(0, (f"method {name}", title, options_of(method_class, "method.")))
        own = {f"--{key}": f"{value:g}" for key, value in flatten(method_defaults(method_class)).items()}
        groups = [
            (group, about, [(row[0], row[1], own.get(row[0], row[2]), row[3]) for row in rows])
            for group, about, rows in groups
        ]
    methods = f"methods: {', '.join(registry.names())}, or a dotted module path"
    more = "" if name else " (--method NAME --help lists its own settings)"
    here = ", ".join(f"{key} {value}" for key, value in flatten(TESTBED_DEFAULTS).items())
    groups = [(t, f"{about} Its own defaults: {here}." if t == "testbed" else about, rows) for t, about, rows in groups]
    head = ["usage: train.py --method NAME [--config FILE] [--GROUP.SETTING VALUE ...]", "", methods + more, ""]
    return help_page(head, [("run", "", general), *groups])


Option = tuple[str, str, str, str]  # flag, kind, default, help


def help_page(head: Sequence[str], groups: Sequence[tuple[str, str, Sequence[Option]]]) -> str:
    """The text of `--help`: its first lines, then a block per group."""
    lines = [*head]
    for (title, about, rows), after in itertools.zip_longest(groups, groups[1:]):
        lines.append(f"{title}: {about}" if about else title)
        lines += [
            f"  {flag + ' ' + kind:<42} {text}{f' [{default}]' if default else ''}"
            for flag, kind, default, text in rows
        ]
        if rows or (after and after[2]):  # those without settings of their own here stand together
            lines.append("")
    return "\n".join(lines).rstrip()


def options_of(cls: Any, prefix: str) -> list[Option]:
    """(flag, kind, default, help) of each setting; the help is the string under the field."""
    kinds = {int: "INT", float: "FLOAT", str: "TEXT", bool: "BOOL"}

    def kind(hint: Any) -> str:
        args = [a for a in typing.get_args(hint) if a is not type(None)]
        if typing.get_origin(hint) is Literal:
            return "|".join(map(str, args))
        if typing.get_origin(hint) is dict:
            return "TEXT"
        if args and typing.get_origin(hint) in (types.UnionType, typing.Union):
            return "|".join(dict.fromkeys(map(kind, args)))
        return kinds.get(hint) or (kind(args[0]) if args else "TEXT")

    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base) and base is not Method:
            body = ast.parse(textwrap.dedent(inspect.getsource(typing.cast(type, base)))).body[0]
            nodes = getattr(body, "body", [])
            for node, after in itertools.pairwise(nodes):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and documented:
                    texts[node.target.id] = " ".join(str(after.value.value).split())
    rows = []
    hints = type_hints(cls)
    for f in dataclasses.fields(cls):
        if f.init and not dataclasses.is_dataclass(hints[f.name]) and hints[f.name] is not Method:
            default = "" if f.default in (dataclasses.MISSING, "") else as_plain(f.default)
            shown = (
                "none"
                if default is None
                else str(default).lower()
                if isinstance(default, bool)
                else str(default or ("" if default != 0 else 0))
            )
            key = f"{f.name}.KEY" if typing.get_origin(hints[f.name]) is dict else f.name
            kinds_of: registry.Kinds | None = f.metadata.get("kinds")
            names = [] if kinds_of is None else kinds_of.names()
            choices = [f"{name}: {kinds_of.about(name)}." for name in names if kinds_of is not None]
            text = " ".join([texts.get(f.name, ""), *choices])
            rows.append((f"--{prefix}{key}", "|".join(names) or kind(hints[f.name]), shown, text))
    return rows
