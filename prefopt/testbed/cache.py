"""Folders that are built once and found again by their content's hash. Knows nothing of what is built."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from prefopt import storage
from prefopt.errors import TrainError


def cache_root() -> Path:
    """Where built folders live: PREFOPT_CACHE, else `prefopt` under XDG_CACHE_HOME, else `~/.cache/prefopt`."""
    if own := os.environ.get("PREFOPT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prefopt"


def built(root: Path, key: str, build: Callable[[Path], None]) -> Path:
    """The folder `root/key`, filled by `build` if it is not there yet.

    The folder appears by one rename, complete or not at all, with a manifest of its files. A damaged one is built
    again, and said to be. Processes that build the same key at once do the work twice and keep the first result, so a
    builder must be deterministic.

    Args: root: parent folder, made if missing. key: the content's hash. build: fills the empty folder it is given.
    Returns: the folder.
    Raises: TrainError when the folder cannot be written; Unreadable when one that is there cannot be read just now.
    """
    final = root / key
    wrong = storage.damage(final) if storage.is_there(final) else "is missing"
    if wrong is None:
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        stack = contextlib.ExitStack()
        scratch = stack.enter_context(storage.built_beside(final))
    except OSError as error:
        raise TrainError(f"{root}: cannot write the cache: {error.strerror} (set PREFOPT_CACHE)") from None
    with stack:
        build(scratch)
        storage.seal(scratch)
        scratch.chmod(0o755)  # mkdtemp's folders are private
        with storage.locked(root / f".{key}.lock"):
            if storage.is_there(final):
                wrong = storage.damage(final)
                if wrong is None:  # another process was first: its folder holds the same bytes
                    return final
                print(f"warning: {final}: {wrong}; it has been built again", file=sys.stderr)
                storage.remove_ours(final)
            storage.put_in_place(scratch, final)
    return final
