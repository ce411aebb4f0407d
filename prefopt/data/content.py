"""Content hash of a file, stored beside the cache for as long as the file is unchanged.

Bit rot changes no times, so a stored hash may be that of the original content; the cache of the original is then used,
which is what the run began with.
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

SETTLED = 2.0  # seconds since the last change of a file after which a further change is visible in its times


def file_hash(path: Path, memory: Path | None = None) -> str:
    """SHA-256 of a file's bytes.

    It is stored together with the file's device, inode, size and times. The kernel moves the time of the last
    change (ctime) with every write, and no program can set it back. The hash of
    a file that was changed within the last seconds is not stored: a further change might leave the same times. Of
    several processes one reads the file.

    Args: memory: folder of stored hashes; None: nothing is stored.
    Raises: DataError when the file cannot be read.
    """
    try:
        if memory is None:
            return _read(path)
        note = memory / f"{text_hash(os.fsencode(path.resolve()))[:32]}.json"
        known = _stored_hash(note, path)
        if known is not None:
            return known
        with _one_at_a_time(note):
            return _stored_hash(note, path) or _compute(note, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _compute(note: Path, path: Path) -> str:
    before, began = _state(path), time.time()
    digest = _read(path)
    if _state(path) == before and max(before[-2:]) / 1e9 < began - SETTLED:
        with contextlib.suppress(OSError):  # without it the file is hashed again next time
            write_sealed(note, {"path": str(path), "state": before, "content": digest}, flush=False)
    return digest


def _stored_hash(note: Path, path: Path) -> str | None:
    state = _state(path)  # raises where the file is gone
    with contextlib.suppress(Damaged, Unreadable, KeyError):  # the file is hashed again
        stored = storage.read_sealed(note)
        return str(stored["content"]) if stored is not None and stored["state"] == state else None
    return None


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return stream_hash(file)


@contextlib.contextmanager
def _one_at_a_time(note: Path) -> Iterator[None]:
    """One process hashes while the others wait for its result; where no lock can be made, each hashes."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, PrefoptError):
            note.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(note.with_suffix(".lock")))
        yield
