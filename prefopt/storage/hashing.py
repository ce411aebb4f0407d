"""One hash: SHA-256 of files, texts, JSON values and of what arrives in parts. Values never change between versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from prefopt.storage.readers import opened

if TYPE_CHECKING:
    from array import array
    from hashlib import _Hash


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises: Unreadable; FileNotFoundError."""
    with opened(path) as file:
        return stream_hash(file)


def stream_hash(file: BinaryIO) -> str:
    """SHA-256 of what is left to read of an open file."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def text_hash(text: str | bytes) -> str:
    """SHA-256 of a text in UTF-8, or of bytes, as 64 hexadecimal digits; names of files use the first few of them."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def text_number(text: str, size: int = 8) -> int:
    """The first `size` bytes of a text's SHA-256 as a number, such as the seed of a random generator."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:size], "big")


def running_hash(first: bytes = b"") -> _Hash:
    """A SHA-256 that is fed with `update`, of what is too large for memory or arrives in parts."""
    return hashlib.sha256(first)


def sequence_hash(parts: Iterable[bytes | bytearray | array[int]]) -> bytes:
    """16 bytes that name a token sequence: BLAKE2b, which is faster for many short inputs."""
    running = hashlib.blake2b(digest_size=16)
    for part in parts:
        running.update(part)
    return running.digest()
