"""YAML files read strictly: keys that are unique, bounded size, no aliases that grow without bound."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from prefopt.errors import ConfigError
from prefopt.storage import read_text


class UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys and keys that are not strings, and reads 1e-6 as a number."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._checked: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Check a mapping's own keys before `<<` merges others into it, which may repeat them."""
        if id(node) not in self._checked:
            self._checked.add(id(node))
            seen = set()
            for key_node, _ in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge":
                    continue
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str):
                    found = f"found {key!r}, expected text as a key (put it in quotes)"
                    raise yaml.constructor.ConstructorError(None, None, found, key_node.start_mark)
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key '{key}' given twice", key_node.start_mark)
                seen.add(key)
        super().flatten_mapping(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep=deep)
            if isinstance(value, int) and value.bit_length() > 4096:
                raise ValueError("integer too large")
            return value
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:  # such as !!int x, 2020-99-99
            found = f"cannot be read as {node.tag.rpartition(':')[2]} ({type(error).__name__})"
            raise yaml.constructor.ConstructorError(None, None, found, node.start_mark) from None


_MOST_TEXT, DEEPEST, _MOST_NODES = 4_000_000, 100, 200_000  # characters, levels, values of a YAML text


def parse_yaml(text: str) -> Any:
    """Parse a YAML text to plain values. The limit on their number counts aliases as the values they expand to.

    Raises: yaml.YAMLError, also for a text that is too long, nested too deeply, or that expands to too many values.
    """

    def refuse(found: str, mark: Any) -> yaml.YAMLError:
        return yaml.constructor.ConstructorError(None, None, found, mark)

    if len(text) > _MOST_TEXT:
        raise yaml.YAMLError(f"found {len(text):,} characters, expected at most {_MOST_TEXT:,}")
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []  # (anchor, values before it) of each open collection
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in opened):
                raise refuse(f"alias '*{event.anchor}' refers to a value that contains it", event.start_mark)
            count += sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if len(opened) > DEEPEST:
            raise refuse(f"nested more than {DEEPEST} levels deep", event.start_mark)
        if count > _MOST_NODES:
            raise refuse(f"more than {_MOST_NODES:,} values after expanding aliases", event.start_mark)
    return yaml.load(text, Loader=UniqueKeyLoader)


UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_yaml(path: Path, flag: str, expected: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises: ConfigError, one line.

    Args:
        flag: printed before the path of a file that cannot be read, such as `--config `.
        expected: what the error for a file without a mapping names.
    """
    try:
        text = read_text(path)
    except OSError as error:
        near = difflib.get_close_matches(
            path.name,
            [p.name for p in path.parent.glob("*") if p != path] if path.parent.is_dir() else [],
            1,
        )
        hint = f"; did you mean '{path.parent / near[0]}'?" if near else ""
        raise ConfigError(f"{flag}{path}: {error.strerror}{hint}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flag}{path}: not a text file (byte {error.start + 1} is not UTF-8)") from error
    try:
        loaded = parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not readable as YAML: {getattr(error, 'problem', error)}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: found a {type(loaded).__name__}, expected {expected}")
    return loaded
