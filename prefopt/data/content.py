"""What a file holds, as a hash that is read once: remembered beside the cache for as long as the file is untouched."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from prefopt.errors import DataError
from prefopt.storage import write_whole

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
        note = memory / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"
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
            write_whole(note, [json.dumps({"path": str(path), "state": before, "sha256": digest})], flush=False)
    return digest


def _remembered(note: Path, path: Path) -> str | None:
    try:
        kept = json.loads(note.read_text())
        return str(kept["sha256"]) if kept["state"] == _state(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        path.stat()  # a file that is gone is said to be
        return None


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _one_at_a_time(note: Path) -> Iterator[None]:
    """While one process hashes, the others wait for what it finds; without a place for a lock each hashes alone."""
    import fcntl

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(note.with_suffix(".lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
