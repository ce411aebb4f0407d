"""Readers that tell four things apart: as written, missing, damaged, and unreadable just now.

What is missing is None or FileNotFoundError; what is damaged is `Damaged`; what cannot be read just now (EIO, ESTALE,
EACCES, ...) is `Unreadable`. The last never counts as missing: it stops the program before anything is made again,
replaced or deleted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from prefopt.errors import PrefoptError


class Unreadable(PrefoptError):
    """A file cannot be read just now, so it may exist and be whole. Nothing may be deleted or made again for it."""


class Damaged(PrefoptError):
    """A file exists and can be read, and differs from what was written."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within the block an error of the disk, the mount or the permissions becomes `Unreadable`.

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
    """A regular file, open for reading. Raises: as `reading`, also for a pipe, which would block."""
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
    """The text of a regular file, without its byte order mark: a pipe without a writer would block, and a device has no
    end.

    Raises: OSError, also where the path is no regular file or no valid name; UnicodeDecodeError.
    """
    check_regular(path)
    return path.read_text(encoding="utf-8-sig")


def check_regular(path: Path) -> None:
    """Raises: OSError where the path is neither a regular file nor a folder, or is no valid name."""
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
    if value is None:  # null, which is never written, would look like a missing file
        raise Damaged(f"{path}: is not JSON: it was cut, edited or damaged")
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file that is appended to, without a last line that a killed process left incomplete.

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
    """Checksums of the complete lines of a file, as JSON values; `other_line` compares them later."""
    sums = [zlib.crc32(line) for line in content.split(b"\n")[:-1]]
    return {"lines": len(sums), "crc32": "".join(f"{one:08x}" for one in sums)}


def other_line(path: Path, content: bytes, sums: Mapping[str, Any], since: str) -> Damaged | None:
    """The error that names the first line that differs from the checksums of `sums_of`; None where none does.

    Args: since: the name of what stores the checksums, such as a checkpoint.
    """
    lines = content.split(b"\n")[:-1]
    hint = "put the file back from a copy, or choose another --output"
    for number in range(sums["lines"]):
        if number == len(lines):
            found = f"ends after {number} lines" if content else "is missing"
            return Damaged(f"{path}: {found}, {since} was saved after {sums['lines']}; {hint}")
        if f"{zlib.crc32(lines[number]):08x}" != sums["crc32"][8 * number : 8 * number + 8]:
            return Damaged(f"{path}:{number + 1}: is not as it was written before {since} was saved; {hint}")
    return None


def is_there(path: Path) -> bool:
    """Whether a file or a folder exists. Raises: Unreadable where that cannot be determined."""
    with contextlib.suppress(FileNotFoundError), reading(path):
        path.stat()
        return True
    return False


def listing(folder: Path) -> list[Path]:
    """Paths of a folder's entries, sorted by name; empty where the folder is missing. Raises: Unreadable."""
    with contextlib.suppress(FileNotFoundError), reading(folder):
        return sorted(folder / name for name in os.listdir(folder))
    return []
