"""Errors of a disk or a mount, where the system would give them: in the calls that every reader makes."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def refuse(name: str, number: int, put: Callable[[Any, str, Any], None] = setattr, times: int | None = None) -> None:
    """From now on a file or folder of this name, or whose path ends with it, can be neither opened nor looked at.

    Args: number: of the error. put: sets an attribute. times: for so many calls only; None: for good.
    """
    left = times

    def broken(path: Any, flags: int = os.O_RDONLY) -> bool:
        nonlocal left
        if isinstance(path, int) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or left == 0:
            return False
        hit = Path(os.fsdecode(path)).name == name or os.fsdecode(path).endswith(f"/{name}")
        left = left - 1 if hit and left is not None else left
        return hit

    def fails(path: Any) -> OSError:
        return OSError(number, os.strerror(number), os.fsdecode(path))

    def guarded(call: Callable[..., Any], reads: Callable[..., bool]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            path = args[0] if args else kwargs.get("path", kwargs.get("file", "."))
            if reads(*args, **kwargs) and broken(path):
                raise fails(path)
            return call(*args, **kwargs)

        return wrapped

    def opens(file: Any = None, mode: str = "r", *args: Any, **kwargs: Any) -> bool:
        return not set(mode) & {"w", "a", "x", "+"}

    def opens_raw(path: Any, flags: int, *args: Any, **kwargs: Any) -> bool:
        return not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)

    put(io, "open", guarded(io.open, opens))
    put(builtins, "open", io.open)
    put(os, "open", guarded(os.open, opens_raw))
    for call in ("listdir", "scandir", "stat"):
        put(os, call, guarded(getattr(os, call), lambda *args, **kwargs: True))
