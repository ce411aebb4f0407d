"""One atomic write: a file is written aside, flushed to the disk, then renamed, so it is whole or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from prefopt.storage.readers import check_regular

_SCRATCH = re.compile(r"\..+\.\d+\.\d+\.tmp")  # names of the scratch files of `write_by`
_FOLDERS_WITHOUT_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)


def write_whole(path: Path, texts: Iterable[str], *, only_new: bool = False, flush: bool = True) -> None:
    """Write texts to a scratch file, then rename it. Processes and threads may write the same file at the same time.

    Half of a surrogate pair, which a server may send, becomes a question mark.

    Args:
        only_new: whether a file that another process has written meanwhile stays.
        flush: whether the file is flushed to the disk before it is renamed, so that not even a power cut leaves less
            than the whole.
    Raises: OSError; the scratch file is removed.
    """

    def write(scratch: Path) -> None:
        with scratch.open("wb") as file:
            file.writelines(text.encode("utf-8", "replace") for text in texts)

    write_by(path, write, only_new=only_new, flush=flush)


def write_by(path: Path, write: Callable[[Path], Any], *, only_new: bool = False, flush: bool = True) -> None:
    """`write_whole` for a file that a library writes. Args: write: creates the file at the path that it receives."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    with contextlib.suppress(FileNotFoundError):
        check_regular(path)  # a device must not be replaced by a file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(scratch)
        if flush:
            flush_file(scratch)
        if only_new:
            with contextlib.suppress(FileExistsError):
                os.link(scratch, path)
            scratch.unlink()
        else:
            scratch.replace(path)
        if flush:
            flush_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


def flush_file(path: Path) -> None:
    """Wait until a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where its file system can."""
    try:
        flush_file(folder)
    except OSError as error:
        if error.errno not in _FOLDERS_WITHOUT_FSYNC:
            raise


def sweep(folder: Path) -> None:
    """Remove scratch files that killed processes have left in a folder and those below, and nothing else."""
    for left in folder.rglob(".*.tmp"):
        if _SCRATCH.fullmatch(left.name) and left.is_file():
            left.unlink(missing_ok=True)
