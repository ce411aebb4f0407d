"""The process that a judge's function is called in, so that it can be ended. It imports nothing of prefopt.

Its first argument is the file descriptor of a connection. It receives the search path and `module:name`, answers
`("ready", None)`, then `("numbers", [...])`, `("odd", text)` or `("raised", text)` to each call.
"""

import importlib
import os
import pickle
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def _number(value: Any) -> float:
    """A result as a float; an integer that none can hold is infinite."""
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def _answer(function: Callable[..., Any], arguments: Any, keywords: Any, many: bool) -> tuple[str, Any]:
    try:
        value = function(*arguments, **keywords)
    except BaseException as error:
        return "raised", f"{type(error).__name__}: {error}".rstrip(": ")
    try:
        results = list(value) if many else [value]
    except Exception:
        return "odd", repr(value)[:1000]
    for result in results:
        if isinstance(result, (str, bytes)):
            return "odd", repr(result)[:1000]
    try:
        return "numbers", [_number(result) for result in results]
    except Exception:
        bad = next(result for result in results if not _is_number(result))
        return "odd", repr(bad)[:1000]


def _is_number(value: Any) -> bool:
    try:
        _number(value)
        return True
    except Exception:
        return False


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process decides
    connection = Connection(int(sys.argv[1]))
    path, name = pickle.loads(connection.recv_bytes())
    sys.path[:] = path
    module, _, function = name.partition(":")
    function = getattr(importlib.import_module(module), function)
    connection.send(("ready", None))
    while True:
        try:
            *call, timeout = connection.recv()
        except EOFError:
            return
        # the parent ends this process if a call takes too long; the kernel does if the parent is gone
        signal.setitimer(signal.ITIMER_PROF, (timeout + 60) * (os.cpu_count() or 1))
        answer = _answer(function, *call)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send(answer)
        sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)
