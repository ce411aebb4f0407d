"""A Python function: for rewards that can be verified.

`module:name` is called as `f(prompt, response)`, with `answer=` too if it takes one, and gives a number. If it has a
parameter named `responses` it is called once for many, `f(prompts, responses)`, with `answers=` too if it takes them:
one prompt and one answer for each response.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from prefopt.errors import ConfigError, RoundError, did_you_mean
from prefopt.judges.base import Judge, JudgeContext, JudgeKind
from prefopt.judges.source_hash import source_hash
from prefopt.settings import JudgeConfig
from prefopt.types import Judgement, Question

_IMPORTS_WITHIN = 600.0  # seconds for the function's module, which may load a model


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
    except (Exception, SystemExit) as error:
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
    """A hash of the source of the function that `module:name` names, see `source_hash`.

    Raises: ConfigError when there is no such function; Unreadable.
    """
    return source_hash(path, [path.partition(":")[0], str(getattr(find(path), "__module__", ""))])  # both: an alias


class FunctionJudge(JudgeKind):
    """Scores responses by a function, which is called in a process of its own.

    A call that takes longer than `timeout` counts as lost, and so does a result that is no finite number. The process
    is ended then, and another one started: what the function holds in memory is lost with it.

    Args:
        path: `module:name`.
        timeout: seconds for a call of one response, or per response of a call of many.

    Raises: ConfigError when there is no such function.
    """

    reads: ClassVar[tuple[str, ...]] = ("path", "reward_scale", "timeout")

    @classmethod
    def check(cls, settings: JudgeConfig) -> None:
        """See `JudgeKind`."""
        if settings.path is None:
            raise ConfigError("judge.path: found none, expected module:function")
        find(settings.path)

    @classmethod
    def content(cls, settings: JudgeConfig) -> list[Any]:
        """See `JudgeKind`: the function's source."""
        return [] if settings.path is None else [source_of(settings.path)]

    @classmethod
    def open(cls, settings: JudgeConfig, context: JudgeContext) -> Judge:
        """See `JudgeKind`."""
        assert settings.path is not None
        return cls(settings.path, settings.timeout)

    def __init__(self, path: str, timeout: float) -> None:
        self.path, self.timeout = path, timeout
        try:
            parameters = inspect.signature(find(path)).parameters
        except ValueError:  # some functions of C show none
            parameters = {}  # type: ignore[assignment]
        self.takes_many = "responses" in parameters
        self.answer_key = "answers" if self.takes_many else "answer"
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self.takes_answer = anything or self.answer_key in parameters
        self._worker: _Worker | None = None

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """See `Judge`.

        Raises: RoundError when the function raises, ends its process, or gives what is no number, or too few of them.
        """
        asked = [(q, response.text) for q in questions for response in q.responses]
        if self.takes_many:
            prompts, texts, answers = [q.prompt for q, _ in asked], [t for _, t in asked], [q.answer for q, _ in asked]
            values = iter(self._call((prompts, texts), answers, f"{len(texts)} responses", len(texts)) if asked else [])
        else:
            values = iter(
                [
                    value
                    for q, text in asked
                    for value in self._call((q.prompt, text), q.answer, f"prompt {q.key or repr(q.prompt)}", 1)
                ]
            )
        judgements = []
        for question in questions:
            problems: Counter[str] = Counter()
            scores = []
            for _ in question.responses:
                value = next(values)
                if value is None:
                    problems["timeout"] += 1
                elif not math.isfinite(value):
                    problems["nan"] += 1
                scores.append(value if value is not None and math.isfinite(value) else math.nan)
            judgements.append(Judgement(scores=tuple(scores), problems=dict(problems)))
        return judgements

    def _call(self, arguments: tuple[Any, ...], answer: Any, where: str, count: int) -> Sequence[float | None]:
        """What the function gives for `count` responses; None for each where it took too long."""
        if self._worker is None:
            self._worker = _Worker(self.path)
        keywords = {self.answer_key: answer} if self.takes_answer else {}
        try:
            kind, found = self._worker.call((arguments, keywords, self.takes_many), self.timeout * count)
        except _Ended as ended:
            self._worker = None
            raise RoundError(f"judge.path: {self.path} ended its process ({ended}) for {where}") from None
        if kind == "late":
            self.close()
            return [None] * count
        if kind == "raised":
            raise RoundError(f"judge.path: {self.path} raised {found} for {where}")
        expected = "one number each" if self.takes_many else "a number"
        if kind == "odd":
            raise RoundError(f"judge.path: {self.path} gave {found} for {where}, expected {expected}")
        if len(found) != count:
            raise RoundError(f"judge.path: {self.path} gave {len(found)} numbers for {where}, expected one each")
        numbers: list[float | None] = found
        return numbers

    def describe(self) -> dict[str, Any]:
        """See `Judge`. The function is known by its name and its source, where that can be read."""
        return {"kind": "function", "path": self.path, "source": source_of(self.path), "timeout": self.timeout}

    def close(self) -> None:
        """End the process that calls the function."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None


class _Ended(Exception):
    """The process of a function is gone."""


class _Worker:
    """A process that calls a function, see worker.py: one that hangs or ends takes nothing else with it."""

    def __init__(self, path: str) -> None:
        mine, theirs = multiprocessing.Pipe()
        with theirs:
            program = [sys.executable, str(Path(__file__).with_name("worker.py")), str(theirs.fileno())]
            self._process = subprocess.Popen(
                program, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._connection = mine
        try:
            self._connection.send_bytes(pickle.dumps((sys.path, path)))
            kind, _ = self._receive(_IMPORTS_WITHIN)
        except _Ended as ended:
            raise RoundError(f"judge.path: importing {path} in a process of its own ended that ({ended})") from None
        if kind == "late":
            self.end()
            raise RoundError(f"judge.path: importing {path} takes longer than {_IMPORTS_WITHIN:.0f} s")

    def call(self, call: tuple[Any, ...], timeout: float) -> tuple[str, Any]:
        """The worker's answer, or ("late", None). Raises: _Ended with how it ended."""
        try:
            self._connection.send((*call, timeout))
        except OSError:
            raise self._ended() from None
        return self._receive(timeout)

    def _receive(self, timeout: float) -> tuple[str, Any]:
        try:
            if not self._connection.poll(timeout):
                return "late", None
            answer: tuple[str, Any] = self._connection.recv()
            return answer
        except (EOFError, OSError):
            raise self._ended() from None

    def _ended(self) -> _Ended:
        status = self._process.wait()
        self._connection.close()
        return _Ended(f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}")

    def end(self) -> None:
        """End it, with what it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
