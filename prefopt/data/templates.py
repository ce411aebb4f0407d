"""Running a chat template: its arguments, the date that it reads, its time limit.

A template is code of the tokenizer's author. An exception in it makes a bad row, its clock is fixed for the run, and an
endless loop in it is interrupted.
"""

from __future__ import annotations

import ctypes
import datetime
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from prefopt.data.bad_rows import RowProblem
from prefopt.data.rows import Messages
from prefopt.errors import DataError, PrefoptError, did_you_mean
from prefopt.settings import RESERVED_ARGS, TemplateSettings

SECONDS = 10.0
NO_TEMPLATE = (
    "the data has chat messages and the tokenizer has no chat template, expected one (--data.chat_template FILE)"
)
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


@dataclass(frozen=True)
class Rendering:
    """Arguments and limits of a chat template.

    Args:
        args: additional arguments, such as `enable_thinking`; an example's own arguments take precedence.
        date: the value of today's date in the template. None: today.
        seconds: limit of processor time of one rendering.
    """

    args: Mapping[str, Any] = field(default_factory=dict)
    date: datetime.date | None = None
    seconds: float = SECONDS

    @classmethod
    def of(cls, settings: TemplateSettings, tokenizer: Any = None, day: datetime.date | None = None) -> Rendering:
        """From the settings of a run. Args: day: of the run's start, for a template that reads the date."""
        named = settings.template_date
        if named is not None:
            day = datetime.date.fromisoformat(named)
        clock = tokenizer is None or reads_clock(tokenizer)
        return cls(settings.template_args, (day or datetime.date.today()) if clock else None, settings.template_timeout)

    def lines(self, tokenizer: Any) -> list[str]:
        """Lines that a run logs once."""
        lines = []
        if self.date is not None and reads_clock(tokenizer):
            lines += [f"the chat template reads today's date, which is {self.date} throughout this run"]
        for name in unread_args(tokenizer, self.args):
            near = did_you_mean(name, words_of(tokenizer))
            lines += [f"warning: data.template_args.{name}: the chat template does not read it{near}"]
        return lines

    def key(self, tokenizer: Any) -> list[Any]:
        """The parts that determine a rendering by this tokenizer's template; for cache keys."""
        clock = reads_clock(tokenizer)
        return [sorted(self.args.items(), key=str), str(self.date or datetime.date.today()) if clock else None]

    def render(
        self,
        tokenizer: Any,
        messages: Messages,
        args: Mapping[str, Any] | None = None,
        *,
        key: str = "prompt",
        generation_prompt: bool = False,
        continued: bool = False,
    ) -> str:
        """Chat messages as text.

        Args:
            args: of the example.
            key: for error lines.
            generation_prompt: whether to append the header of an assistant turn.
            continued: whether the last message is left open, as the beginning of an answer.
        Raises: RowProblem when the template refuses the messages or takes too long; DataError when there is none.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(NO_TEMPLATE)
        args = {**self.args, **(args or {})}
        reserved = next((name for name in args if name in RESERVED_ARGS), None)
        if reserved is not None:
            raise RowProblem("bad template argument", reserved, "an argument of the chat template", "another name")
        try:
            with _at_most(self.seconds):
                source = tokenizer.get_chat_template(None, args.get("tools"))
                if _CLOCK.search(source):
                    source = _dated(source, self.date or datetime.date.today())
                text: str = tokenizer.apply_chat_template(
                    messages,
                    chat_template=source,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    continue_final_message=continued,
                    **args,
                )
            return text
        except _TookTooLongError:
            raise RowProblem(
                TOO_SLOW,
                key,
                f"the chat template takes longer than {self.seconds:g} s",
                "one that terminates",
                "use another one: --data.chat_template FILE, or raise --data.template_timeout",
            ) from None
        except Exception as error:  # a template is a program and may raise anything
            if any("content" in turn and turn["content"] is None for turn in messages):
                # A tool call without text: some templates test content for None, others concatenate it.
                filled = [{**turn, "content": ""} if turn.get("content") is None else turn for turn in messages]
                return self.render(
                    tokenizer, filled, args, key=key, generation_prompt=generation_prompt, continued=continued
                )
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RowProblem(
                "template refuses the example", key, f"the chat template raised: {line}", "an example that it accepts"
            ) from None


TOO_SLOW = "template takes too long"


def read_template(path: str, setting: str, error: type[PrefoptError]) -> str:
    """Read a file with a chat template. Raises: `error`, naming the setting, for what is not a Jinja template."""
    try:
        file = Path(path)
        if file.exists() and not file.is_file():
            raise error(f"{setting}: '{path}': is not a file, expected a Jinja template")
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(
            f"{setting}: '{path}': byte {problem.start + 1} is not UTF-8, expected the text of a Jinja template"
        ) from None
    except OSError as problem:
        raise error(f"{setting}: '{path}': {problem.strerror}") from None
    except ValueError as problem:  # a name that no file can have
        raise error(f"{setting}: {path!r}: {problem}") from None
    if "\0" in text:
        raise error(f"{setting}: '{path}': contains NUL bytes, expected the text of a Jinja template")
    if not text.strip():
        raise error(f"{setting}: '{path}': is empty, expected a Jinja template")
    return text


def check_template(tokenizer: Any, setting: str, error: type[PrefoptError]) -> None:
    """Raises: `error`, naming the setting, where the chat template does not compile, or uses random values."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    sources = tokenizer.chat_template or {}
    for source in sources.values() if isinstance(sources, dict) else [sources]:
        try:
            _compile_jinja_template(source)
        except TemplateSyntaxError as problem:
            raise error(f"{setting}: line {problem.lineno}: {problem.message}, expected a Jinja template") from None
        if _RANDOM.search(_COMMENT.sub("", source)):
            raise error(f"{setting}: the template uses random values, expected one that is deterministic")


# The date -------------------------------------------------------------------------------------------------------------

_CLOCK = re.compile(r"\bstrftime_now\b")  # the only clock that transformers provides to a template
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\b")


def reads_clock(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template reads the date."""
    sources = getattr(tokenizer, "chat_template", None) or {}
    every = sources.values() if isinstance(sources, dict) else [sources]
    return any(_CLOCK.search(_COMMENT.sub("", source)) for source in every)


def unread_args(tokenizer: Any, args: Mapping[str, Any] | None) -> list[str]:
    """Names of arguments that do not occur in the tokenizer's chat template."""
    words = words_of(tokenizer) if args else frozenset()
    return [name for name in args or {} if words and name not in words]


def words_of(tokenizer: Any) -> frozenset[str]:
    """All names in the tokenizer's chat template, or in any of several."""
    sources = getattr(tokenizer, "chat_template", None) or {}
    return _words("\n".join(sources.values()) if isinstance(sources, dict) else sources)


@lru_cache(maxsize=16)
def _words(source: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", _COMMENT.sub("", source)))


@lru_cache(maxsize=16)
def _dated(source: str, day: datetime.date) -> str:
    """The template with `strftime_now` fixed at the beginning of a day.

    A macro before it defines the name, because functions cannot be passed as template arguments.
    """
    moment = datetime.datetime(day.year, day.month, day.day)
    letters = "aAbBcdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"
    values = {f"%{flag}{letter}": moment.strftime(f"%{flag}{letter}") for flag in ("-", "_", "") for letter in letters}
    pairs = [("%%", "\0"), *values.items(), ("\0", "%")]
    step = "{%- set said.text = said.text | replace(code, value) -%}"
    body = f"{{%- set said = namespace(text=format) -%}}{{%- for code, value in {pairs} -%}}{step}{{%- endfor -%}}"
    macro = f"{{%- macro strftime_now(format) -%}}{body}{{{{ said.text }}}}{{%- endmacro %}}"
    return f"{macro}\n{source}"  # Jinja does not render this line break


# The time -------------------------------------------------------------------------------------------------------------


class _TookTooLongError(BaseException):
    """Raised inside a rendering by the watch thread; no template and no library catches a BaseException."""


class _Watch:
    """Interrupts a thread after some processor time, without signals, so that it works in any thread.

    An asynchronous exception is raised at the next bytecode, and a compiled template is bytecode. One watch thread
    polls the renderings in progress.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[int, tuple[int, float]] = {}  # thread: (its CPU clock, the limit on it)
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()

    def begin(self, seconds: float) -> None:
        me = threading.get_ident()
        clock = time.pthread_getcpuclockid(me) if hasattr(time, "pthread_getcpuclockid") else time.CLOCK_MONOTONIC
        with self._lock:
            self._running[me] = (clock, time.clock_gettime(clock) + seconds)
            if self._thread is None or not self._thread.is_alive():  # initially, and in a forked process
                self._thread = threading.Thread(target=self._poll, name="chat template watch", daemon=True)
                self._thread.start()
        if not self._wake.is_set():
            self._wake.set()

    def end(self) -> None:
        me = threading.get_ident()
        with self._lock:
            if self._running.pop(me, None) is None:  # interrupted: cancel an exception that is still pending
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(me), None)

    def _poll(self) -> None:
        while True:
            self._wake.wait()
            time.sleep(0.05)
            with self._lock:
                for thread, (clock, limit) in list(self._running.items()):
                    try:
                        late = time.clock_gettime(clock) > limit
                    except OSError:  # the thread is gone
                        late = True
                    if late:
                        del self._running[thread]
                        error = ctypes.py_object(_TookTooLongError)
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error)
                if not self._running:
                    self._wake.clear()


_WATCH = _Watch()


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    _WATCH.begin(seconds)
    try:
        yield
    finally:
        _WATCH.end()
