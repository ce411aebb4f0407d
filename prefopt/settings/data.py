"""The settings of the `data` command: the vocabulary of `config`, read by the same rules, for who looks at pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefopt import registry
from prefopt.errors import ConfigError
from prefopt.settings.groups import ModelConfig, check_template_settings
from prefopt.settings.help import Option, help_page, options_of
from prefopt.settings.nested import nest
from prefopt.settings.reader import build, split_flags, unknown_keys, unknown_setting
from prefopt.settings.schema import sources as split_sources
from prefopt.settings.schema import type_hints
from prefopt.settings.train import normalized


@dataclass(frozen=True)
class PreviewDataConfig:
    """How rows are read and cut, as in training."""

    columns: dict[str, str] = field(default_factory=dict)
    """Our key -> the file's key, e.g. `--data.columns.chosen good`."""
    on_bad_row: Literal["error", "skip"] = "skip"
    """Stop at a bad row, or count it in the report."""
    max_length: int = 1024
    """Tokens of prompt and completion together; a longer prompt loses its head first."""
    overlong: Literal["truncate_prompt", "drop", "truncate_completion"] = "truncate_prompt"
    """Of a longer pair, what goes: the beginning of the prompt first, all of it, or the end of completions."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens that the text of the data may hold, e.g. [THINK],[/THINK]; any other one makes a bad row."""
    chat_template: str | None = None
    """Jinja file that replaces the tokenizer's chat template."""
    dialogues: Literal["text", "messages"] = "text"
    """Read HH dialogues as the text that they are, or as the turns of the chat template."""
    template_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, e.g. `--data.template_args.enable_thinking false`; those of a row win."""
    template_date: str | None = None
    """The date, e.g. 2026-11-30, that a chat template which asks for today's is told. None: today."""
    template_timeout: float = 10.0
    """Processor time, in seconds, that the chat template may take to render a conversation."""


@dataclass(frozen=True)
class PreviewConfig:
    """What is looked at, and how."""

    method: str | None = None
    """Read the rows as this method does. None: as pairs, without further columns."""
    tokenizer: str | None = None
    """Folder or hub id of a tokenizer alone; model.path names one with its model, whose size is then checked too."""
    examples: int = 3
    """Rows shown, spread over the pairs that are kept, the first one among them; 0 shows none."""
    html: str | None = None
    """Write report and rows to this page instead, which needs nothing beside itself."""
    data: PreviewDataConfig = field(default_factory=PreviewDataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sources: tuple[str, ...] = ()


_UNREAD = tuple(f"model.{name}" for name in ("dtype", "attention", "gradient_checkpointing"))
_NOT_FLAGS = ("sources",)


def parse_data(argv: Sequence[str]) -> PreviewConfig:
    """The settings of the `data` command from its command line.

    Raises: ConfigError, one line that names the key, what was found, what was expected and the nearest mend.
    """
    words = list(argv)
    named = []
    while words and not words[0].startswith("--"):
        named.append(words.pop(0))
    flags = split_flags(words)
    if "method.name" in flags:
        flags["method"] = flags.pop("method.name")
    layer = nest(flags)
    known = _known_keys()
    for key in unknown_keys(layer, known, ""):
        raise unknown_setting(key, known, "")
    found: PreviewConfig = build(PreviewConfig, layer, "", {})
    sources = tuple(name for text in named for name in split_sources(text))
    found = dataclasses.replace(found, sources=sources, model=normalized(found.model, "path"))
    if not named:
        raise ConfigError(
            "no data is named, expected a file, folder or hub id: prefopt data pairs.jsonl --model.path DIR"
        )
    if not all(sources):
        raise ConfigError(f"found {' '.join(named)!r}, expected names of sources with a comma between two of them")
    if (found.tokenizer is None) == (found.model.path is None):
        both = "named by both --tokenizer and --model.path" if found.tokenizer else "not named"
        raise ConfigError(f"the tokenizer is {both}, expected one of --model.path DIR and --tokenizer DIR")
    if found.examples < 0:
        raise ConfigError(f"--examples: found {found.examples}, expected a number >= 0")
    check_template_settings(found.data, "data.")
    if found.data.max_length < 2:
        raise ConfigError(f"--data.max_length: found {found.data.max_length}, expected at least 2")
    if found.html is not None:
        if Path(found.html).suffix not in (".html", ".htm"):
            raise ConfigError(f"--html: found {found.html!r}, expected the name of a page such as page.html")
        if not Path(found.html).resolve().parent.is_dir():
            raise ConfigError(f"--html: the folder of '{found.html}' does not exist")
    if found.method is not None:
        registry.get(found.method)
    return found


def _known_keys() -> list[str]:
    keys = ["help"]
    for name, hint in type_hints(PreviewConfig).items():
        group = dataclasses.is_dataclass(hint)
        keys += [f"{name}.{leaf}" for leaf in type_hints(hint)] if group else [name]
    return [key for key in keys if key not in (*_UNREAD, *_NOT_FLAGS)]


def data_help() -> str:
    """The grouped `--help` of the command."""
    head = [
        "usage: prefopt data FILE[,FILE ...] --model.path DIR [--html PAGE] [--GROUP.SETTING VALUE ...]",
        "",
        "Prints what training would print of the data, and shows some rows as the model reads them: prompt, scored,",
        "unscored and special tokens in colours. FILE: a JSON, CSV or Parquet file, a folder, or a hub id.",
        "",
    ]
    hidden = {f"--{key}" for key in (*_UNREAD, *_NOT_FLAGS)}

    def rows(cls: Any, prefix: str) -> list[Option]:
        return [row for row in options_of(cls, prefix) if row[0] not in hidden]

    groups: list[tuple[str, str, list[Option]]] = [("look", "", rows(PreviewConfig, ""))]
    groups.append(("data", (PreviewDataConfig.__doc__ or "").strip(), rows(PreviewDataConfig, "data.")))
    groups.append(("model", "Whose tokenizer it is.", rows(ModelConfig, "model.")))
    return help_page(head, groups)
