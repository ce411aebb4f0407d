"""The settings of the `data` command, read by the same rules as those of a training run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from prefopt import registry
from prefopt.errors import ConfigError
from prefopt.settings.groups import ExampleConfig, ModelConfig
from prefopt.settings.help import OptionGroup, about, help_page, options_of, program, split_topics
from prefopt.settings.nested import nest
from prefopt.settings.ranges import Group, ranged
from prefopt.settings.reader import build, split_flags, unknown_keys, unknown_setting
from prefopt.settings.schema import sources as split_sources
from prefopt.settings.schema import type_hints
from prefopt.settings.train import normalized


@dataclass(frozen=True)
class PreviewDataConfig(ExampleConfig):
    """Reading and truncation of the examples, as in training."""

    prefix = "--data."

    on_bad_row: Literal["error", "skip"] = "skip"
    """Invalid examples: stop with an error, or count them in the report."""


@dataclass(frozen=True)
class PreviewConfig(Group):
    """All settings of a preview of data."""

    prefix = "--"

    method: str | None = None
    """Read the examples as this method does. None: as pairs, without extra columns."""
    tokenizer: str | None = None
    """Folder or Hub id of a tokenizer. With --model.path, the model's tokenizer is used and its vocabulary size
    checked."""
    examples: int = ranged(3, at_least=0)
    """Number of examples to print, evenly spaced in the data, the first one included; 0 prints none."""
    html: str | None = None
    """Write the report and the examples to this self-contained HTML page instead."""
    data: PreviewDataConfig = field(default_factory=PreviewDataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sources: tuple[str, ...] = ()


_UNREAD = tuple(f"model.{name}" for name in ("dtype", "attention", "gradient_checkpointing"))
_NOT_FLAGS = ("sources",)


def parse_data(argv: Sequence[str]) -> PreviewConfig:
    """The settings of the `data` command from its command line.

    Raises: ConfigError, one line that names the setting, what was found, what was expected and a fix.
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
        raise ConfigError("no data given, expected a file, folder or Hub id: prefopt data pairs.jsonl --model.path DIR")
    if not all(sources):
        raise ConfigError(f"found {' '.join(named)!r}, expected names of sources separated by commas")
    if (found.tokenizer is None) == (found.model.path is None):
        both = "given by both --tokenizer and --model.path" if found.tokenizer else "not given"
        raise ConfigError(f"the tokenizer is {both}; expected either --model.path DIR or --tokenizer DIR")
    if found.html is not None:
        if Path(found.html).suffix not in (".html", ".htm"):
            raise ConfigError(f"--html: found {found.html!r}, expected a file name such as page.html")
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


def data_help(argv: Sequence[str] = ()) -> str:
    """The `--help` page of the command; `--help GROUP` prints that group alone."""
    head = (
        f"usage: {program('data')} FILE[,FILE ...] --model.path DIR [--html PAGE] [--GROUP.SETTING VALUE ...]\n\n"
        "Prints the data report of training and some examples as token sequences, with prompt, loss tokens, tokens "
        "without loss and special tokens in different colours. FILE: a JSON, CSV or Parquet file, a folder, or a Hub "
        "id.\n"
    )
    hidden = tuple(f"--{key}" for key in (*_UNREAD, *_NOT_FLAGS))
    groups = [
        OptionGroup("run", "", options_of(PreviewConfig, "", hidden)),
        OptionGroup("data", about(PreviewDataConfig), options_of(PreviewDataConfig, "data.", hidden)),
        OptionGroup("model", "The model whose tokenizer is used.", options_of(ModelConfig, "model.", hidden)),
    ]
    return help_page([head], groups, split_topics(argv)[0])
