"""A hash of the source of Python modules, so that a resumed run notices that a judge's code has changed."""

from __future__ import annotations

import ast
import contextlib
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from prefopt import storage


def source_hash(name: str, modules: Sequence[str]) -> str | None:
    """A hash of some imported modules and of all that they import from their own folders; None where none has a file.

    Of an installed package that is the package alone. What is read at run time, or imported by a computed name, is not
    seen.

    Args: name: hashed too. modules: by their names.
    Raises: Unreadable.
    """
    files: dict[str, Path] = {}
    for each in sorted({*modules}):
        module = sys.modules.get(each)
        file = getattr(module, "__file__", None)
        if file is not None:
            root = Path(file).resolve().parents[each.count(".") + (Path(file).name == "__init__.py")]
            _collect(each, root, files)
            files.setdefault(each, Path(file))
    if not files:
        return None
    whole = storage.running_hash(name.encode())
    for each, found in sorted(files.items()):
        whole.update(f"{each} {storage.sha256(found)}\n".encode())
    return whole.hexdigest()[:16]


def _collect(name: str, root: Path, files: dict[str, Path]) -> None:
    """Add a module, the packages that it is in, and what these import, as far as they lie under `root`.

    Args: root: the folder that `import` found the first name in. files: of modules that are known, by their names.
    """
    installed = {Path(sysconfig.get_path(key)).resolve() for key in ("purelib", "platlib", "stdlib")}
    top = name.partition(".")[0]
    waiting = [name]
    while waiting:
        wanted = waiting.pop()
        parent = wanted.rpartition(".")[0]
        if parent and parent not in files:
            waiting.append(parent)
        first = wanted.partition(".")[0]
        if wanted in files or (first != top and (root in installed or first == "prefopt")):
            continue
        place = root.joinpath(*wanted.split("."))
        file = next((f for f in (place.with_suffix(".py"), place / "__init__.py") if storage.is_there(f)), None)
        if file is None:
            continue
        files[wanted] = file
        package = wanted if file.name == "__init__.py" else parent
        with contextlib.suppress(SyntaxError, ValueError):
            waiting += _imports(ast.parse(storage.read_bytes(file) or b""), package)


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Names of modules that may be imported anywhere in a module. Args: package: which relative imports start from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".") if package else []
            base = ".".join([*parts[: len(parts) - node.level + 1], node.module or ""]) if node.level else node.module
            base = (base or "").strip(".")
            yield from filter(None, [base, *(f"{base}.{alias.name}".strip(".") for alias in node.names)])
