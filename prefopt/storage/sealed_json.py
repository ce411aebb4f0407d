"""JSON objects that carry their own hash, so that an edit or a flipped bit is seen when they are read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefopt.storage.hashing import digest
from prefopt.storage.readers import Damaged, read_json
from prefopt.storage.writers import write_whole

_SEAL = "sha256"  # the member of a sealed object that holds the hash of all others


def write_sealed(path: Path, value: Mapping[str, Any], *, only_new: bool = False, flush: bool = True) -> None:
    """Write a JSON object with its own hash in it, see `write_whole`; values that JSON lacks become text."""
    write_whole(path, [json.dumps(sealed(value), indent=1)], only_new=only_new, flush=flush)


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own hash in it, see `unseal`."""
    plain = json.loads(json.dumps(dict(value), default=str))
    return plain | {_SEAL: digest(plain)}


def read_sealed(path: Path, *, unsealed: bool = False) -> dict[str, Any] | None:
    """The object that `write_sealed` wrote; None where the file is missing.

    Args: unsealed: whether an object without a hash, which older versions wrote, is accepted too.
    Raises: Unreadable; Damaged when it does not match its own hash.
    """
    value = read_json(path)
    if value is None:
        return None
    return unseal(value, str(path), unsealed=unsealed)


def unseal(value: Any, where: str, *, unsealed: bool = False) -> dict[str, Any]:
    """An object without its hash. Args: where: its file, for the error. Raises: Damaged where the hash differs."""
    seal = value.pop(_SEAL, None) if isinstance(value, dict) else None
    if not isinstance(value, dict) or (seal != digest(value) and not (unsealed and seal is None)):
        raise Damaged(f"{where}: does not match its own hash: it was edited or damaged")
    return value


def finite(value: Any) -> Any:
    """Nested values with lists for sequences, and None for NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
