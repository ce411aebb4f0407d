"""Finds methods by name: a file in methods/ is a method of that name; a dotted path is imported.

Strategies, which answer prompts without training, are declared in the files of inference/, which are parsed here
without importing them.
"""

from __future__ import annotations

import ast
import importlib
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from prefopt.errors import ConfigError, did_you_mean
from prefopt.method import Method

_FOLDER = Path(__file__).parent / "methods"
_INFERENCE = Path(__file__).parent / "inference"


def names() -> list[str]:
    """The built-in methods, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.py") if not path.stem.startswith("_"))


@dataclass(frozen=True)
class Strategy:
    """A way to answer a prompt with a policy without training it.

    Args:
        about: one line for `--help`.
        n: default samples per step; 1 cannot be changed.
        depth: default number of steps after the first samples; 0 cannot be changed.
    """

    about: str
    n: int
    depth: int


@cache
def strategies() -> dict[str, Strategy]:
    """All strategies by name, in the order of `--help`."""
    declared = (_declared(path, "STRATEGIES") for path in sorted(_INFERENCE.glob("*.py")))
    return {name: Strategy(*what) for strategies in declared for name, what in (strategies or {}).items()}


def check_strategy(name: str, where: str = "--strategy") -> None:
    """Raises: ConfigError for a strategy that is unknown or whose name is ambiguous."""
    if name in strategies():
        return
    claimed = ambiguous_names().get(name)
    if claimed:
        raise ConfigError(
            f"{where}: '{name}' is ambiguous; it could mean {' or '.join(claimed)}: name one of them"
            + "".join(f" ({own} is trained: scripts/train.py --method {own})" for own in claimed if own in names())
        )
    if name in names():
        raise ConfigError(f"{where}: '{name}' is a method, which is trained: scripts/train.py --method {name}")
    near = did_you_mean(name, strategies()) or ";"
    raise ConfigError(f"{where}: unknown strategy '{name}'{near} known: {', '.join(strategies())}")


def get(name: str) -> type[Method]:
    """The Method class called `name`: a built-in method, or a dotted path to a module or to a class in it.

    Raises: ConfigError for a name that is unknown or ambiguous, cannot be imported, or has not exactly one Method.
    """
    if name in names():
        return _only_method(f"prefopt.methods.{name}", name)
    if "." in name:
        return _dotted(name)
    claimed = ambiguous_names().get(name)
    if claimed:
        raise ConfigError(f"method '{name}' is ambiguous; it could mean {' or '.join(claimed)}: name one of them")
    if name in strategies():
        raise ConfigError(
            f"'{name}' is not a method: it is a strategy that answers prompts without training; use "
            f"scripts/infer.py --strategy {name}"
        )
    near = did_you_mean(name, names()) or ";"
    raise ConfigError(f"unknown method '{name}'{near} known: {', '.join(names())} (or a dotted module path)")


def _dotted(path: str) -> type[Method]:
    if "" not in sys.path:
        sys.path.insert(0, "")  # so that a user's file in the working directory is found
    try:
        return _only_method(path, path)
    except ModuleNotFoundError as error:
        head, _, attribute = path.rpartition(".")
        if error.name not in (path, path.partition(".")[0], head):
            raise ConfigError(f"method '{path}': importing it failed: no module named '{error.name}'") from error
        try:
            module = importlib.import_module(head)
        except ModuleNotFoundError as inner:
            raise _no_module(path, inner.name or head) from inner
        found = getattr(module, attribute, None)
        if found is None and hasattr(
            module, "__path__"
        ):  # `head` is a package, so a missing file was meant, not a class
            raise _no_module(path, path) from error
        if not (isinstance(found, type) and issubclass(found, Method)):
            raise ConfigError(f"method '{path}': module '{head}' has no Method class '{attribute}'") from error
        return found


def _no_module(path: str, missing: str) -> ConfigError:
    dotted = path.removesuffix(".py").replace("/", ".")
    hint = f"; did you mean '{dotted}'?" if dotted != path else ""
    return ConfigError(f"method '{path}': no module named '{missing}' (looked in {Path.cwd()} too){hint}")


def _only_method(module_name: str, shown: str) -> type[Method]:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise ConfigError(f"method '{shown}': importing it failed: {type(error).__name__}: {error}") from error
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        classes = ", ".join(cls.__name__ for cls in found)
        found_here = f"{len(found)}: {classes} (name one: {shown}.{found[0].__name__})" if found else "none"
        raise ConfigError(f"method '{shown}': expected exactly one Method class in the file, found {found_here}")
    return found[0]


@cache
def ambiguous_names() -> dict[str, list[str]]:
    """Ambiguous short names -> the methods and strategies that they could mean, read from their source files."""
    claims: dict[str, list[str]] = {}
    for path in [*(_FOLDER / f"{name}.py" for name in names()), *sorted(_INFERENCE.glob("*.py"))]:
        for short in _declared(path, "ambiguous") or ():
            claims.setdefault(short, []).append(path.stem)
    return claims


def _declared(path: Path, name: str) -> Any:
    """The literal that a source file assigns to `name`, without importing the file; None where it does not."""
    for node in ast.walk(ast.parse(path.read_text())):
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        value = getattr(node, "value", None)
        if value is not None and any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return ast.literal_eval(value)
    return None
