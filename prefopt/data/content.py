"""What a file holds, as a hash that is read once: remembered beside the cache for as long as the file is untouched.

A disk that loses bits changes no times, so a remembered hash may be of what the file held when it was read: what was
made of it then is used again, which is what the run began with.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from prefopt import storage
from prefopt.errors import DataError, PrefoptError
from prefopt.storage import Damaged, Unreadable, locked, stream_hash, text_hash, write_sealed

SETTLED = 2.0  # seconds since a file's last change after which another one would show in its times


def file_hash(path: Path, memory: Path | None = None) -> str:
    """SHA-256 of a file's bytes.

    It is remembered together with the file's device, inode, size and times. The kernel moves the time of the last
    change (ctime) with every write, and no program can set it back. A file that was changed within the last seconds is
    hashed and not remembered: one more change might leave the same times. Of several processes one reads the file.

    Args: memory: folder for what is remembered; None: nothing is.
    Raises: DataError when the file cannot be read.
    """
    try:
        if memory is None:
            return _read(path)
        note = memory / f"{text_hash(os.fsencode(path.resolve()))[:32]}.json"
        known = _remembered(note, path)
        if known is not None:
            return known
        with _one_at_a_time(note):
            return _remembered(note, path) or _hashed(note, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _hashed(note: Path, path: Path) -> str:
    before, began = _state(path), time.time()
    digest = _read(path)
    if _state(path) == before and max(before[-2:]) / 1e9 < began - SETTLED:
        with contextlib.suppress(OSError):  # a full disk costs time, not the run
            write_sealed(note, {"path": str(path), "state": before, "content": digest}, flush=False)
    return digest


def _remembered(note: Path, path: Path) -> str | None:
    state = _state(path)  # a file that is gone is said to be
    with contextlib.suppress(Damaged, Unreadable, KeyError):  # to hash it again costs time alone
        kept = storage.read_sealed(note)
        return str(kept["content"]) if kept is not None and kept["state"] == state else None
    return None


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return stream_hash(file)


@contextlib.contextmanager
def _one_at_a_time(note: Path) -> Iterator[None]:
    """While one process hashes, the others wait for what it finds; without a place for a lock each hashes alone."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, PrefoptError):
            note.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(note.with_suffix(".lock")))
        yield
