"""Folders that are built once and found again by their content's hash. Knows nothing of what is built."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from prefopt.errors import TrainError


def cache_root() -> Path:
    """Where built folders live: PREFOPT_CACHE, else `prefopt` under XDG_CACHE_HOME, else `~/.cache/prefopt`."""
    if own := os.environ.get("PREFOPT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prefopt"


def built(root: Path, key: str, build: Callable[[Path], None]) -> Path:
    """The folder `root/key`, filled by `build` if it is not there yet.

    The folder appears by one rename, complete or not at all. Processes that build the same key at once do the work
    twice and keep the first result, so a builder must be deterministic.

    Args: root: parent folder, made if missing. key: the content's hash. build: fills the empty folder it is given.
    Returns: the folder.
    Raises: TrainError when the folder cannot be written.
    """
    final = root / key
    if final.is_dir():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=root))
    except OSError as error:
        raise TrainError(f"{root}: cannot write the cache: {error.strerror} (set PREFOPT_CACHE)") from None
    try:
        build(scratch)
        scratch.chmod(0o755)  # mkdtemp's folders are private
        try:
            scratch.rename(final)
        except OSError:
            if not final.is_dir():  # another process was first: its folder holds the same bytes
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final
