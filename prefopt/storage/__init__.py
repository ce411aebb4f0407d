"""Files that can be damaged, stale or out of reach: one writer, one reader.

What is written is whole or absent, is on the disk before it has its name, and carries a checksum. What is read is one
of four: as it was written; missing (None, or FileNotFoundError); damaged (`Damaged`, or a sentence that says how); or
unreadable just now (`Unreadable`: EIO, ESTALE, EACCES, ...), which never counts as missing: it stops the program before
anything is made again, replaced or deleted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from prefopt.errors import PrefoptError

MANIFEST = "manifest.json"  # of a folder: size and SHA-256 of each of its files
_SEAL = "sha256"  # the member of a sealed object that holds the hash of all others
_SCRATCH = re.compile(r"\..+\.\d+\.\d+\.tmp")  # what `_scratch` names
_FOLDERS_WITHOUT_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)


class Unreadable(PrefoptError):
    """A file cannot be read just now; whether it is there, and whole, is not known. Nothing may be deleted for it."""


class Damaged(PrefoptError):
    """A file is there, can be read, and is not as it was written."""


# Reading --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """While it lasts, an error of the disk, the mount or the permissions is `Unreadable`.

    Raises: Unreadable; FileNotFoundError where the file is missing.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    except OSError as error:
        raise Unreadable(
            f"{path}: cannot be read just now: {error.strerror or error}; nothing was deleted or made again: check the "
            "disk, the mount and the permissions, then run the same command again"
        ) from error


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """A regular file, open for reading. Raises: as `reading`, also for a pipe, which would be waited for."""
    with reading(path):
        check_regular(path)
        with path.open("rb") as file:
            yield file


def read_bytes(path: Path) -> bytes | None:
    """A file's bytes; None where it is missing. Raises: Unreadable."""
    with contextlib.suppress(FileNotFoundError), opened(path) as file:
        return file.read()
    return None


def read_text(path: Path) -> str:
    """The text of a regular file, without its byte order mark: a pipe that nobody writes to would be waited for, and a
    device has no end.

    Raises: OSError, also for what is no regular file and for a name that can be none; UnicodeDecodeError.
    """
    check_regular(path)
    return path.read_text(encoding="utf-8-sig")


def check_regular(path: Path) -> None:
    """Raises: OSError where there is something that is neither a regular file nor a folder, or nothing can be."""
    try:
        mode = path.stat().st_mode
    except ValueError:
        raise OSError(errno.EINVAL, "its name holds a NUL character", str(path)) from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "named pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
        raise OSError(errno.ENXIO, f"is a {kind}, expected a regular file", str(path))


def read_json(path: Path) -> Any:
    """The JSON value of a file without a checksum; None where it is missing. Raises: Unreadable; Damaged."""
    content = read_bytes(path)
    if content is None:
        return None
    value = None
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(content.decode("utf-8"))
    if value is None:  # null, which nobody writes, would look like a file that is missing
        raise Damaged(f"{path}: is not JSON: it was cut, edited or damaged")
    return value


def read_sealed(path: Path, *, unsealed: bool = False) -> dict[str, Any] | None:
    """The object that `write_sealed` wrote; None where the file is missing.

    Args: unsealed: whether an object without a checksum is taken too, which older versions wrote.
    Raises: Unreadable; Damaged when it does not match its own hash.
    """
    value = read_json(path)
    if value is None:
        return None
    return unseal(value, str(path), unsealed=unsealed)


def unseal(value: Any, where: str, *, unsealed: bool = False) -> dict[str, Any]:
    """An object without its hash. Args: where: it was read, for the error. Raises: Damaged when they do not match."""
    seal = value.pop(_SEAL, None) if isinstance(value, dict) else None
    if not isinstance(value, dict) or (seal != digest(value) and not (unsealed and seal is None)):
        raise Damaged(f"{where}: does not match its own hash: it was edited or damaged")
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file that lines are added to, without one that a kill has cut in half.

    Returns: none where the file is missing.
    Raises: Damaged naming a line that is no JSON object; Unreadable.
    """
    lines: list[dict[str, Any]] = []
    texts = (read_bytes(path) or b"").split(b"\n")
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise ValueError
        except (ValueError, RecursionError):
            if number == len(texts):
                break  # empty, or the last line of a killed process
            raise Damaged(
                f"{path}:{number}: is not as it was written: no JSON object; put the file back from a copy"
            ) from None
        lines.append(line)
    return lines


def sums_of(content: bytes) -> dict[str, Any]:
    """What the whole lines of a file are known by later, as JSON values; see `other_line`."""
    sums = [zlib.crc32(line) for line in content.split(b"\n")[:-1]]
    return {"lines": len(sums), "crc32": "".join(f"{one:08x}" for one in sums)}


def other_line(path: Path, content: bytes, sums: Mapping[str, Any], since: str) -> Damaged | None:
    """The error that names the first line that is not as it was at `sums_of`; None where all are.

    Args: since: what knows them by their sums.
    """
    lines = content.split(b"\n")[:-1]
    mend = "put the file back from a copy, or choose another --output"
    for number in range(sums["lines"]):
        if number == len(lines):
            found = f"ends after {number} lines" if content else "is missing"
            return Damaged(f"{path}: {found}, {since} was saved after {sums['lines']}; {mend}")
        if f"{zlib.crc32(lines[number]):08x}" != sums["crc32"][8 * number : 8 * number + 8]:
            return Damaged(f"{path}:{number + 1}: is not as it was written before {since} was saved; {mend}")
    return None


def is_there(path: Path) -> bool:
    """Whether there is a file or a folder. Raises: Unreadable where that cannot be seen."""
    with contextlib.suppress(FileNotFoundError), reading(path):
        path.stat()
        return True
    return False


def listing(folder: Path) -> list[Path]:
    """What a folder holds, by name; nothing where it is missing. Raises: Unreadable."""
    with contextlib.suppress(FileNotFoundError), reading(folder):
        return sorted(folder / name for name in os.listdir(folder))
    return []


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises: Unreadable; FileNotFoundError."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# Writing --------------------------------------------------------------------------------------------------------------


def write_whole(path: Path, texts: Iterable[str], *, only_new: bool = False, flush: bool = True) -> None:
    """Write a file aside, then rename it. Processes and threads may write the same one at the same time.

    Half of a surrogate pair, which a server may send, becomes a question mark.

    Args: only_new: leave the file that another has written meanwhile. flush: to the disk before the renaming, so that
        not even a power cut leaves less than the whole.
    Raises: OSError; nothing is left of what was begun.
    """

    def write(scratch: Path) -> None:
        with scratch.open("wb") as file:
            file.writelines(text.encode("utf-8", "replace") for text in texts)

    write_by(path, write, only_new=only_new, flush=flush)


def write_by(path: Path, write: Callable[[Path], Any], *, only_new: bool = False, flush: bool = True) -> None:
    """The same for what a library writes. Args: write: makes the file at the path that it is given."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    with contextlib.suppress(FileNotFoundError):
        check_regular(path)  # a device's name is not to be taken
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


def write_sealed(path: Path, value: Mapping[str, Any], *, only_new: bool = False, flush: bool = True) -> None:
    """Write a JSON object with its own hash in it, see `write_whole`; what JSON lacks becomes text."""
    write_whole(path, [json.dumps(sealed(value), indent=1)], only_new=only_new, flush=flush)


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own hash in it, see `unseal`."""
    plain = json.loads(json.dumps(dict(value), default=str))
    return plain | {_SEAL: digest(plain)}


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
    """Remove what killed writers have left half-written in a folder and those below; nothing of anybody else's."""
    for left in folder.rglob(".*.tmp"):
        if _SCRATCH.fullmatch(left.name) and left.is_file():
            left.unlink(missing_ok=True)


# Folders with a manifest ----------------------------------------------------------------------------------------------

Entries = dict[str, dict[str, Any]]  # by a file's path in the folder: its bytes and sha256


def flushed(path: Path) -> dict[str, Any]:
    """A file's entry in a manifest, once it is on the disk."""
    entry = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    flush_file(path)
    return entry


def seal(folder: Path, others: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Flush every file of a folder and write its manifest.

    Args: others: entries of files that other processes have flushed.
    """
    entries = dict(others or {})
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    # a file of another node may not be seen here yet
    entries |= {name: flushed(path) for name, path in files.items() if name not in entries}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(entries, indent=1, sort_keys=True))
    flush_file(manifest)
    flush_folder(folder)


def entries_of(folder: Path) -> dict[str, tuple[int, str]] | None:
    """What a folder's manifest promises, (bytes, sha256) of each file; None where it is missing or damaged.

    Raises: Unreadable.
    """
    try:
        entries = read_json(folder / MANIFEST)
        return {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()} or None
    except (Damaged, AttributeError, KeyError, TypeError):
        return None


def damage(folder: Path) -> str | None:
    """What is wrong with a folder, or None if every file is as its manifest promises. Raises: Unreadable."""
    entries = entries_of(folder)
    if entries is None:
        return f"{MANIFEST} is missing or damaged"
    return next((found for name, entry in entries.items() if (found := difference(folder / name, *entry))), None)


def difference(path: Path, size: int, sha: str) -> str | None:
    """How a file differs from its entry, or None. Raises: Unreadable."""
    try:
        with reading(path):
            found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return f"{path.name} is no file"
        if found.st_size != size:
            return f"{path.name} has {found.st_size} bytes, expected {size}"
        return None if sha256(path) == sha else f"{path.name} does not match its hash"
    except FileNotFoundError:
        return f"{path.name} is missing"


def discard(folder: Path) -> bool:
    """Remove the files that a folder's manifest names, the manifest, and the folder where nothing is left in it.

    What somebody else has put there stays, and so does a folder whose manifest does not tell what is ours; of a
    symbolic link the link alone is removed. Returns: whether the place is free now.
    """
    if folder.is_symlink():
        folder.unlink()
        return True
    if not is_there(folder):
        return True
    entries = entries_of(folder)
    if entries is None:
        return False
    (folder / MANIFEST).unlink()  # first: half removed it must not look whole
    for name in entries:
        (folder / name).unlink(missing_ok=True)
    for below in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            below.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not is_there(folder)


def make_room(folder: Path) -> Path | None:
    """Free the place of a folder that is about to be written. Returns: where what was not ours to delete is now."""
    if discard(folder):
        return None
    number = 1
    while is_there(aside := folder.with_name(f"{folder.name}.before-{number}")):
        number += 1
    folder.rename(aside)
    return aside


def remove_ours(folder: Path) -> None:
    """Remove a folder that nobody else has a reason to write to: its name says that it is this program's."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


# Locks ----------------------------------------------------------------------------------------------------------------

_OWNER = re.compile(r"process (\d+) on (\S+)")


class Lock:
    """A lock file, which the kernel frees when its owner dies. Never a symbolic link, and nobody else's file.

    It is the file that is found under the name while it is locked: one that was deleted and made anew is locked anew.
    The folder that holds it can be locked too, so that deleting the file lets nobody in; where the file system locks
    no folders (NFS), the file alone is locked.

    Args: path: of the file. shared: whether others may hold it too, who all say so. folder: lock that of the file too.
    """

    def __init__(self, path: Path, *, shared: bool = False, folder: bool = False) -> None:
        self.path, self._folder = path, folder
        self._how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._held: list[int] = []

    def take(self) -> bool:
        """Try to, without waiting. Returns: whether it is held now. Raises: PrefoptError for what is no lock file."""
        held: list[int] = []
        try:
            if self._folder:
                held.append(os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
                with _not_where_unknown():
                    fcntl.flock(held[-1], self._how | fcntl.LOCK_NB)
            while True:
                held.append(_open_lock(self.path))
                fcntl.flock(held[-1], self._how | fcntl.LOCK_NB)
                if _is_at(held[-1], self.path):
                    break
                os.close(held.pop())  # deleted between the two: lock the one that is there now
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
        """Take it as soon as whoever holds it lets go. Raises: as `take`."""
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


def owner_of(path: Path) -> tuple[int, str] | None:
    """(process, host) that a lock file names, whether or not it still holds it."""
    found = _OWNER.fullmatch((read_bytes(path) or b"").decode("utf-8", "replace").strip())
    return (int(found[1]), found[2]) if found else None


def is_held(path: Path) -> bool:
    """Whether anybody holds the lock at `path`, or the folder that it lies in. Raises: Unreadable."""
    for place in (path, path.parent):
        try:
            with reading(place):
                descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            with _not_where_unknown():
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False


@contextlib.contextmanager
def _not_where_unknown() -> Iterator[None]:
    """Pass over that a file system locks no folders."""
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


# Values ---------------------------------------------------------------------------------------------------------------


def finite(value: Any) -> Any:
    """Nested values with lists for sequences, and None for NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
