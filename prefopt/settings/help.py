"""The `--help` pages, made from the dataclasses of the settings and the strings under their fields.

Lines wrap to the terminal's width. `--help GROUP` prints one group, `--help all` every group in full.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from prefopt import registry
from prefopt.errors import ConfigError, did_you_mean
from prefopt.method import Method
from prefopt.settings.schema import as_plain, type_hints

HELP = ("--help", "-h")
_TEXT_COLUMN = (38, 56)  # where help texts begin: at a third of the width, within these bounds
_NARROW = 80  # columns below which a text begins on the line after its flag
_NO_TERMINAL = (100, 24)  # columns and lines where the output is no terminal and COLUMNS is not set
_KINDS = {int: "INT", float: "FLOAT", str: "TEXT", bool: "BOOL"}


class Option(NamedTuple):
    """One setting on a help page."""

    flag: str
    kind: str
    default: str
    text: str


class OptionGroup(NamedTuple):
    """The settings under one title. A group without options is one line that describes it."""

    title: str
    about: str
    options: Sequence[Option] = ()


def program(command: str) -> str:
    """How the user started a command: `python scripts/train.py` or `prefopt train`."""
    return f"python scripts/{command}.py" if Path(sys.argv[0]).name == f"{command}.py" else f"prefopt {command}"


def split_topics(argv: Sequence[str]) -> tuple[set[str], list[str]]:
    """(the groups that `--help GROUP` names, all other command-line arguments)."""
    topics, others = set(), []
    for before, word in zip(["", *argv], argv, strict=False):
        if before in HELP and not word.startswith("--"):
            topics.add(word)
        elif word not in HELP:
            others.append(word)
    return topics, others


def check_topics(topics: Collection[str], known: Sequence[str]) -> None:
    """Raises: ConfigError for a topic that is not the name of a group."""
    for topic in topics:
        if topic not in (*known, "all"):
            raise ConfigError(
                f"--help: found '{topic}', expected {', '.join(known)} or all{did_you_mean(topic, known)}"
            )


def help_page(
    head: Sequence[str], groups: Sequence[OptionGroup], topics: Collection[str] = (), width: int | None = None
) -> str:
    """The text of a `--help` page.

    Args:
        head: paragraphs above the groups; not printed where topics select groups.
        groups: in the order of the page.
        topics: titles of the groups to print alone; none, or `all`: every group.
        width: columns of the page. None: those of the terminal.
    Raises: ConfigError for a topic that is no group.
    """
    width = width or shutil.get_terminal_size(_NO_TERMINAL).columns
    check_topics(topics, [group.title.partition(" ")[0] for group in groups])
    lines = []
    if topics and "all" not in topics:
        groups = [group for group in groups if group.title.partition(" ")[0] in topics]
    else:
        lines = [line for text in head for line in _paragraph(text, width)]
    for group, following in itertools.zip_longest(groups, groups[1:]):
        about = f"{group.title}: {_one_line(group.about)}" if group.about else group.title
        lines += _wrapped(about, width, "", "  ")
        for option in group.options:
            lines += _option_lines(option, width)
        if group.options or (following and following.options):  # groups without options stand together
            lines.append("")
    return "\n".join(lines).rstrip()


def _paragraph(text: str, width: int) -> list[str]:
    """Each line of a text wrapped; a usage line continues under its first argument."""
    lines = []
    for line in text.split("\n"):
        lead = " " * (len(line) - len(line.lstrip()))
        lines += _wrapped(line.strip(), width, lead, lead + (" " * 7 if line.startswith("usage:") else "")) or [""]
    return lines


def _option_lines(option: Option, width: int) -> list[str]:
    """An option: its flag and kind, then the text in a column of its own, or below where there is no room beside it."""
    name = f"{option.flag} {option.kind}".strip()
    text = option.text + (f" [{option.default}]" if option.default else "")
    low, high = _TEXT_COLUMN
    column = min(high, max(low, width // 3)) if width >= _NARROW else 6
    indent = " " * column
    if len(name) + 4 > column:  # two spaces before the name, two after it
        choices = [part.replace("| ", "|") for part in _wrapped(name.replace("|", "| "), width, "  ", "    ")]
        return [*choices, *_wrapped(text, width, indent, indent)]
    return _wrapped(text, width, f"  {name}".ljust(column), indent) or [f"  {name}"]


def _wrapped(text: str, width: int, first: str, following: str) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=following,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def about(cls: Any) -> str:
    """The docstring of a settings group as one line."""
    return _one_line(cls.__doc__)


def options_of(cls: Any, prefix: str, hidden: Collection[str] = ()) -> list[Option]:
    """An option for each field of a dataclass. Args: prefix: of its flags, such as `train.`; hidden: flags to omit."""
    texts, hints = _field_texts(cls), type_hints(cls)
    options = []
    for f in dataclasses.fields(cls):
        hint = hints.get(f.name)
        if not f.init or dataclasses.is_dataclass(hint) or hint is Method:
            continue
        flag = f"--{prefix}{f.name}"
        if flag not in hidden:
            key = ".KEY" if typing.get_origin(hint) is dict else ""
            kinds: registry.Kinds | None = f.metadata.get("kinds")
            names = [] if kinds is None else kinds.names()
            text = " ".join([texts.get(f.name, ""), *(f"{name}: {kinds.about(name)}." for name in names if kinds)])
            default = "" if f.default is None and "None:" in text else _default(f)
            options.append(Option(flag + key, "|".join(names) or _kind(hint), default, text))
    return options


def _default(f: dataclasses.Field[Any]) -> str:
    value = "" if f.default in (dataclasses.MISSING, "") else as_plain(f.default)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(_item, value))
    return str(value)


def _item(value: Any) -> str:
    """An item of a list as a flag gives it."""
    return f"{{{', '.join(f'{k}: {v}' for k, v in value.items())}}}" if isinstance(value, dict) else str(value)


def _kind(hint: Any) -> str:
    """What a value may be, such as INT or auto|padded."""
    args = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) is Literal:
        return "|".join(map(str, args))
    if typing.get_origin(hint) is dict:
        return "VALUE"
    if typing.get_origin(hint) is tuple:
        return f"{_kind(args[0])},..."
    if args and typing.get_origin(hint) in (types.UnionType, typing.Union):
        return "|".join(dict.fromkeys(map(_kind, args)))
    return getattr(hint, "form", _KINDS.get(hint, "TEXT"))


@functools.cache
def _field_texts(cls: Any) -> dict[str, str]:
    """The string under each field of a dataclass and its bases, as one line."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base) and base is not Method:
            body = ast.parse(textwrap.dedent(inspect.getsource(typing.cast(type, base)))).body[0]
            texts |= _documented(getattr(body, "body", []))
    return texts


def _documented(statements: Iterable[ast.stmt]) -> dict[str, str]:
    return {
        node.target.id: _one_line(str(following.value.value))
        for node, following in itertools.pairwise(statements)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
    }
