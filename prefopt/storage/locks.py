"""One lock: a file that the kernel unlocks when its owner dies, whichever way it dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from prefopt.errors import PrefoptError
from prefopt.storage.readers import read_bytes, reading

_OWNER = re.compile(r"process (\d+) on (\S+)")


class Lock:
    """A lock file, which the kernel unlocks when its owner dies. Never a symbolic link, and nobody else's file.

    What is locked is the file that has the name at that moment: after the file was deleted and created anew, the new
    one is locked. The folder that contains it can be locked too, so that deleting the file lets nobody in; where the
    file system cannot lock folders (NFS), only the file is locked.

    Args:
        path: of the lock file.
        shared: whether several owners may hold the lock at once; each of them must ask for a shared lock.
        folder: whether the folder of the file is locked too.
    """

    def __init__(self, path: Path, *, shared: bool = False, folder: bool = False) -> None:
        self.path, self._folder = path, folder
        self._how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._held: list[int] = []

    def take(self) -> bool:
        """Try to lock, without waiting.

        Returns: whether the lock is held now.
        Raises: PrefoptError where something else than a lock file has the name.
        """
        held: list[int] = []
        try:
            if self._folder:
                held.append(os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
                with _folder_locks_optional():
                    fcntl.flock(held[-1], self._how | fcntl.LOCK_NB)
            while True:
                held.append(_open_lock(self.path))
                fcntl.flock(held[-1], self._how | fcntl.LOCK_NB)
                if _is_at(held[-1], self.path):
                    break
                os.close(held.pop())  # deleted between open and flock: lock the file that has the name now
            os.ftruncate(held[-1], 0)
            os.pwrite(held[-1], f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        except BlockingIOError:
            _close(held)
            return False
        except OSError as error:
            _close(held)
            raise PrefoptError(f"{self.path}: cannot be opened: {error.strerror}; choose another --output") from error
        except BaseException:
            _close(held)
            raise
        self._held = held
        return True

    def wait(self) -> None:
        """Wait until no other process holds the lock, then take it. Raises: as `take`."""
        while not self._held:
            descriptor = _open_lock(self.path)
            fcntl.flock(descriptor, self._how)
            if _is_at(descriptor, self.path):
                self._held = [descriptor]
            else:
                os.close(descriptor)

    def release(self) -> None:
        _close(self._held)
        self._held = []


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time runs the block; the others wait. Raises: PrefoptError where `path` cannot be a lock."""
    lock = Lock(path)
    lock.wait()
    try:
        yield
    finally:
        lock.release()


def owner_of(path: Path) -> tuple[int, str] | None:
    """(process id, host) in a lock file: its last owner, whether or not it still holds the lock."""
    found = _OWNER.fullmatch((read_bytes(path) or b"").decode("utf-8", "replace").strip())
    return (int(found[1]), found[2]) if found else None


def is_held(path: Path) -> bool:
    """Whether any process holds the lock at `path`, or its folder. Raises: Unreadable."""
    for place in (path, path.parent):
        try:
            with reading(place):
                descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            with _folder_locks_optional():
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False


@contextlib.contextmanager
def _folder_locks_optional() -> Iterator[None]:
    """Suppress the error of a file system that cannot lock folders."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.ENOLCK):
            raise


def _open_lock(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise PrefoptError(f"{path}: cannot be opened: {error.strerror}; choose another --output") from error
        raise PrefoptError(
            f"{path}: cannot be a lock: is a symbolic link, which is not written through; remove it"
        ) from error
    about = os.fstat(descriptor)
    content = os.pread(descriptor, 200, 0).decode("utf-8", "replace") if stat.S_ISREG(about.st_mode) else "no file"
    if content.strip() and not _OWNER.fullmatch(content.strip()):
        os.close(descriptor)
        raise PrefoptError(f"{path}: is not a lock of prefopt; move it away, or choose another place")
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    mine = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
