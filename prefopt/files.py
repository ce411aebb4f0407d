"""Files that are whole or absent, and values as every reader of JSON takes them."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_whole(path: Path, texts: Iterable[str], *, only_new: bool = False, flush: bool = True) -> None:
    """Write a file aside, then rename it. Processes and threads may write the same one at the same time.

    Half of a surrogate pair, which a server may send, becomes a question mark.

    Args: only_new: leave the file that another has written meanwhile. flush: to the disk before the renaming, so that
        not even a power cut leaves less than the whole.
    Raises: OSError; nothing is left of what was begun.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            file.writelines(text.encode("utf-8", "replace") for text in texts)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        if only_new:
            with contextlib.suppress(FileExistsError):
                os.link(scratch, path)
            scratch.unlink()
        else:
            scratch.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


def finite(value: Any) -> Any:
    """Nested values with lists for sequences, and None for NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
