"""A Python function as judge: for rewards that can be verified.

`module:name` is called as `f(prompt, response)`, with `answer=` too if it takes one, and gives a number. If it has a
parameter named `responses` it is called once for many, `f(prompts, responses)`, with `answers=` too if it takes them:
one prompt and one answer for each response.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import inspect
import math
import queue
import sys
import sysconfig
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prefopt import storage
from prefopt.errors import ConfigError, RoundError, did_you_mean
from prefopt.types import Judgement, Question


def find(path: str) -> Callable[..., Any]:
    """The function that `module:name` names; the module may lie in the folder that the command is typed in.

    Raises: ConfigError.
    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ConfigError(f"judge.path: found '{path}', expected module:function, such as my_lab.rewards:exact")
    if "" not in sys.path:
        sys.path.append("")  # at the end: what is installed is not hidden by a file beside the data
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(f"judge.path: no module named '{error.name}' (looked in {Path.cwd()} too)") from error
        raise ConfigError(f"judge.path: importing '{module_name}' failed: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if inspect.isroutine(value) and key[0] != "_"]
        what = "is no function" if hasattr(module, name) else "is not there"
        raise ConfigError(f"judge.path: '{name}' {what} in module '{module_name}'{did_you_mean(name, functions)}")
    return found


def source_of(path: str) -> str | None:
    """A hash of the module that `module:name` names and of all that it imports from its own folder, or None.

    Of an installed package that is the package alone. What is read at run time, or imported by a computed name, is not
    seen.

    Raises: ConfigError when there is no such function; Unreadable.
    """
    function = find(path)
    modules = {path.partition(":")[0], str(getattr(function, "__module__", ""))}  # it may be defined elsewhere
    files: dict[str, Path] = {}
    for name in sorted(modules):
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if file is not None:
            root = Path(file).resolve().parents[name.count(".") + (Path(file).name == "__init__.py")]
            _collect(name, root, files)
            files.setdefault(name, Path(file))
    if not files:
        return None
    whole = hashlib.sha256(path.encode())
    for name, found in sorted(files.items()):
        whole.update(f"{name} {storage.sha256(found)}\n".encode())
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


class FunctionJudge:
    """Scores responses by a function.

    A call that takes longer than `timeout` counts as lost, and so does a result that is no finite number. The thread
    that is stuck in such a call is left behind: a function should be quick.

    Args:
        path: `module:name`.
        timeout: seconds for a call of one response, or per response of a call of many.

    Raises: ConfigError when there is no such function.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self.path, self.timeout = path, timeout
        self.function = find(path)
        try:
            parameters = inspect.signature(self.function).parameters
        except ValueError:  # some functions of C show none
            parameters = {}  # type: ignore[assignment]
        self.takes_many = "responses" in parameters
        self.answer_key = "answers" if self.takes_many else "answer"
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self.takes_answer = anything or self.answer_key in parameters
        self._calls: queue.SimpleQueue[Any] | None = None

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """See `Judge`. Raises: RoundError when the function raises, or gives what is no number, or too few of them."""
        asked = [(q, response.text) for q in questions for response in q.responses]
        if self.takes_many:
            prompts, texts, answers = [q.prompt for q, _ in asked], [t for _, t in asked], [q.answer for q, _ in asked]
            values, late = self._many(prompts, texts, answers) if asked else ([], False)
            said = iter([(value, late) for value in values])
        else:
            said = iter([self._one(q, text) for q, text in asked])
        judgements = []
        for question in questions:
            problems: Counter[str] = Counter()
            scores = []
            for _ in question.responses:
                value, late = next(said)
                if late:
                    problems["timeout"] += 1
                elif not math.isfinite(value):
                    problems["nan"] += 1
                scores.append(value if math.isfinite(value) else math.nan)
            judgements.append(Judgement(scores=tuple(scores), problems=dict(problems)))
        return judgements

    def _one(self, question: Question, text: str) -> tuple[float, bool]:
        where = f"prompt {question.key or repr(question.prompt)}"
        value, late = self._call((question.prompt, text), question.answer, where, self.timeout)
        return (math.nan if late else self._number(value, where)), late

    def _many(self, prompts: list[Any], texts: list[str], answers: list[str | None]) -> tuple[list[float], bool]:
        where = f"{len(texts)} responses"
        values, late = self._call((prompts, texts), answers, where, self.timeout * len(texts))
        if late:
            return [math.nan] * len(texts), True
        try:
            numbers = list(values)
        except TypeError:
            numbers = []
        if len(numbers) != len(texts):
            found = f"{len(numbers)} numbers" if numbers else repr(values)
            raise RoundError(f"judge.path: {self.path} gave {found} for {len(texts)} responses, expected one each")
        return [self._number(value, where) for value in numbers], False

    def _number(self, value: Any, where: str) -> float:
        try:
            return float(value)
        except (TypeError, ValueError):
            raise RoundError(f"judge.path: {self.path} gave {value!r} for {where}, expected a number") from None

    def _call(self, arguments: tuple[Any, ...], answer: Any, where: str, timeout: float) -> tuple[Any, bool]:
        """(what the function gives, whether it took too long)."""
        if self._calls is None:
            self._calls = queue.SimpleQueue()
            threading.Thread(target=self._work, args=(self._calls,), daemon=True).start()
        result: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        keywords = {self.answer_key: answer} if self.takes_answer else {}
        self._calls.put((arguments, keywords, result))
        try:
            value, error = result.get(timeout=timeout)
        except queue.Empty:
            self._calls = None  # whoever is stuck is left alone
            return None, True
        if error is not None:
            said = f"{type(error).__name__}: {error}".rstrip(": ")
            raise RoundError(f"judge.path: {self.path} raised {said} for {where}") from error
        return value, False

    def _work(self, calls: queue.SimpleQueue[Any]) -> None:
        while (call := calls.get()) is not None:
            arguments, keywords, result = call
            try:
                result.put((self.function(*arguments, **keywords), None))
            except BaseException as error:
                result.put((None, error))

    def describe(self) -> dict[str, Any]:
        """See `Judge`. The function is known by its name and by its module's source, where that can be read."""
        return {"kind": "function", "path": self.path, "source": source_of(self.path), "timeout": self.timeout}

    def close(self) -> None:
        """Let the thread go that calls the function."""
        if self._calls is not None:
            self._calls.put(None)
            self._calls = None
