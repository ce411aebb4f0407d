"""Finds methods, judges and inference engines by name: each is one file of its folder, or a dotted path.

A file in methods/ is a method and its name is the key. A file in judges/ or generation/ is a judge or an inference
engine where it holds a class that inherits from `JudgeKind` or `EngineKind`. Ways of answering that train nothing are
named by the files of inference/. Files are read for their names and declarations, and imported when they are used.
"""

from __future__ import annotations

import ast
import importlib
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from prefopt.errors import ConfigError, did_you_mean
from prefopt.method import Method
from prefopt.rounds_method import overlooked

_FOLDER = Path(__file__).parent / "methods"
_INFERENCE = Path(__file__).parent / "inference"
T = TypeVar("T")


def names() -> list[str]:
    """The built-in methods, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.py") if not path.stem.startswith("_"))


KINDS = {  # of methods, in the order in which they are listed
    "pairs": "read preference pairs, against a reference model",
    "reference-free": "read preference pairs, without a reference model",
    "unpaired": "read single completions with a label, or pairs as two of them",
    "completions": "read chosen completions alone",
    "rounds": "make their own pairs in rounds; every other method can train in rounds too",
    "judges": "train a model that judges completions",
}


def by_kind() -> dict[str, list[str]]:
    """The built-in methods by kind, see `KINDS`; each list is sorted."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name in names():
        found[_kind(get(name))].append(name)
    return found


def _kind(cls: type[Method]) -> str:
    needs = cls().needs
    if needs.output == "scores":
        return "judges"
    if "make_pairs" in vars(cls):
        return "rounds"
    if needs.rows != "pairs":
        return "unpaired" if needs.rows == "unpaired" else "completions"
    return "reference-free" if needs.reference == "none" else "pairs"


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


@dataclass(frozen=True)
class Kinds:
    """The files of a folder that each hold one class that inherits from `base`: judges, or inference engines.

    Args:
        folder: of the package.
        base: the class that a file's class inherits from.
        suffix: of file names, which is no part of the kind's name.
        key: the setting that names one.
        what: one of them, in a message.
    """

    folder: str
    base: str
    suffix: str
    key: str
    what: str

    def names(self) -> list[str]:
        """All kinds, sorted."""
        return sorted(_classes_by_base(self.folder, self.base, self.suffix))

    def about(self, name: str) -> str:
        """The first sentence of the file's docstring, for `--help`."""
        text = ast.get_docstring(ast.parse(self._path(name).read_text())) or ""
        return text.partition("\n")[0].rstrip(".")

    def declared(self, name: str, attribute: str, default: Any) -> Any:
        """What a kind's class declares, as a literal; the default where it declares nothing, or is a dotted path."""
        found = _declared(self._path(name), attribute) if name in self.names() else None
        return default if found is None else found

    def check(self, name: str) -> None:
        """Raises: ConfigError for a name that is neither a file of the folder nor a dotted path."""
        if name in self.names() or "." in name:
            return
        lacks = f"; {self._path(name)} has no class that inherits from {self.base}" if self._path(name).exists() else ""
        raise ConfigError(
            f"{self.key}: found {name!r}, expected one of {', '.join(self.names())} or a dotted module path"
            f"{did_you_mean(name, self.names())}{lacks}"
        )

    def load(self, name: str, base: type[T]) -> type[T]:
        """The class of a kind. Raises: ConfigError for a name that is unknown, or holds not exactly one such class."""
        self.check(name)
        if name in self.names():
            return _only_class(f"prefopt.{self.folder}.{name}{self.suffix}", name, base, self.what)
        return _dotted(name, base, self.what)

    def _path(self, name: str) -> Path:
        return Path(__file__).parent / self.folder / f"{name}{self.suffix}.py"


JUDGES = Kinds("judges", "JudgeKind", "", "judge.kind", "judge")
ENGINES = Kinds("generation", "EngineKind", "_engine", "generate.engine", "inference engine")


def testbed_judge() -> str:
    """The kind of the judge that a run on the testbed has of its own."""
    return next(name for name in JUDGES.names() if is_testbed_judge(name))


def is_testbed_judge(name: str | None) -> bool:
    """Whether the judge of this kind is the testbed's own."""
    return name is not None and bool(JUDGES.declared(name, "testbed", False))


def judges_of_files() -> list[str]:
    """The kinds of judges that runs without the testbed may name."""
    return [name for name in JUDGES.names() if not is_testbed_judge(name)]


@cache
def _classes_by_base(folder: str, base: str, suffix: str) -> list[str]:
    """Names of the files in a folder that hold a class which inherits from `base`."""
    paths = (Path(__file__).parent / folder).glob(f"*{suffix}.py")
    return [path.stem.removesuffix(suffix) for path in paths if base in _bases(path)]


def _bases(path: Path) -> set[str]:
    """The bases of the classes that a source file holds, by the names that it has for them."""
    classes = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef))
    return {base.id for node in classes for base in node.bases if isinstance(base, ast.Name)}


def get(name: str) -> type[Method]:
    """The Method class called `name`: a built-in method, or a dotted path to a module or to a class in it.

    Raises: ConfigError for a name that is unknown or ambiguous, cannot be imported, or has not exactly one Method.
    """
    if name in names():
        return _only_class(f"prefopt.methods.{name}", name, Method, "method")
    if "." in name:
        found = _dotted(name, Method, "method")
        if unread := overlooked(found):
            raise ConfigError(
                f"method '{name}': it defines {', '.join(unread)}, which only rounds read, expected a class that "
                f"inherits from both: class {found.__name__}(RoundsMethod, Method)"
            )
        return found
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


def _dotted(path: str, base: type[T], what: str) -> type[T]:
    """The one class that inherits from `base` in the module that a dotted path names, or the class that it names."""
    if "" not in sys.path:
        sys.path.insert(0, "")  # so that a user's file in the working directory is found
    try:
        return _only_class(path, path, base, what)
    except ModuleNotFoundError as error:
        head, _, attribute = path.rpartition(".")
        if error.name not in (path, path.partition(".")[0], head):
            raise ConfigError(f"{what} '{path}': importing it failed: no module named '{error.name}'") from error
        try:
            module = importlib.import_module(head)
        except ModuleNotFoundError as inner:
            raise _no_module(path, inner.name or head, what) from inner
        found = getattr(module, attribute, None)
        if found is None and hasattr(module, "__path__"):  # `head` is a package: a file is missing
            raise _no_module(path, path, what) from error
        if not (isinstance(found, type) and issubclass(found, base)):
            raise ConfigError(f"{what} '{path}': module '{head}' has no {base.__name__} class '{attribute}'") from error
        return found


def _no_module(path: str, missing: str, what: str) -> ConfigError:
    dotted = path.removesuffix(".py").replace("/", ".")
    hint = f"; did you mean '{dotted}'?" if dotted != path else ""
    return ConfigError(f"{what} '{path}': no module named '{missing}' (looked in {Path.cwd()} too){hint}")


def _only_class(module_name: str, shown: str, base: type[T], what: str) -> type[T]:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise ConfigError(f"{what} '{shown}': importing it failed: {type(error).__name__}: {error}") from error
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        classes = ", ".join(cls.__name__ for cls in found)
        found_here = f"{len(found)}: {classes} (name one: {shown}.{found[0].__name__})" if found else "none"
        raise ConfigError(
            f"{what} '{shown}': expected exactly one {base.__name__} class in the file, found {found_here}"
        )
    return found[0]


@cache
def ambiguous_names() -> dict[str, list[str]]:
    """Ambiguous short names -> the methods and strategies that they could mean, read from their source files."""
    claims: dict[str, list[str]] = {}
    for path in [*(_FOLDER / f"{name}.py" for name in names()), *sorted(_INFERENCE.glob("*.py"))]:
        for short in _declared(path, "ambiguous") or ():
            claims.setdefault(short, []).append(path.stem)
    return claims


@cache
def _declared(path: Path, name: str) -> Any:
    """The literal that a source file assigns to `name`, without importing the file; None where it does not."""
    for node in ast.walk(ast.parse(path.read_text())):
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        value = getattr(node, "value", None)
        if value is not None and any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return ast.literal_eval(value)
    return None
