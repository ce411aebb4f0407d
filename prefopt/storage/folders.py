"""Folders that are whole or absent: built aside, given a manifest of their files' hashes, renamed into place."""

from __future__ import annotations

import contextlib
import json
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefopt.storage.hashing import sha256
from prefopt.storage.readers import Damaged, is_there, read_json, reading
from prefopt.storage.writers import flush_file, flush_folder

MANIFEST = "manifest.json"  # of a folder: size and SHA-256 of each of its files

Entries = dict[str, dict[str, Any]]  # by a file's path in the folder: its bytes and sha256


# Building aside -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def built_beside(final: Path, *, alone: bool = False) -> Iterator[Path]:
    """A new empty folder beside `final`, to be filled and given to `put_in_place`; without that it is removed.

    Args: alone: whether no other process may be building the same folder (the caller holds a lock), so that what killed
        processes have left can be removed.
    """
    if alone:
        for left in final.parent.glob(f".{final.name}.*.tmp"):
            remove_ours(left)
    scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def empty_folder(scratch: Path) -> None:
    """Create a folder of this program, empty also where a killed process has left one half-written.

    Where several ranks fill one folder its name is fixed, so `built_beside` is of no use.
    """
    remove_ours(scratch)
    scratch.mkdir(parents=True)


def put_in_place(scratch: Path, final: Path) -> None:
    """Rename a folder, and wait until its new name is on the disk. The place must be free."""
    scratch.rename(final)
    flush_folder(final.parent)


# Manifests ------------------------------------------------------------------------------------------------------------


def flushed(path: Path) -> dict[str, Any]:
    """Flush a file to the disk. Returns: its entry in a manifest."""
    entry = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    flush_file(path)
    return entry


def seal(folder: Path, others: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Flush every file of a folder and write its manifest.

    Args: others: entries of files that other ranks have flushed.
    """
    entries = dict(others or {})
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    # a file that another node has written may not be visible here yet
    entries |= {name: flushed(path) for name, path in files.items() if name not in entries}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(entries, indent=1, sort_keys=True))
    flush_file(manifest)
    flush_folder(folder)


def entries_of(folder: Path) -> dict[str, tuple[int, str]] | None:
    """What a folder's manifest lists, (bytes, sha256) of each file; None where it is missing or damaged.

    Raises: Unreadable.
    """
    try:
        entries = read_json(folder / MANIFEST)
        return {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()} or None
    except (Damaged, AttributeError, KeyError, TypeError):
        return None


def damage(folder: Path) -> str | None:
    """How a folder differs from its manifest, or None where every file matches. Raises: Unreadable."""
    entries = entries_of(folder)
    if entries is None:
        return f"{MANIFEST} is missing or damaged"
    return next((found for name, entry in entries.items() if (found := difference(folder / name, *entry))), None)


def difference(path: Path, size: int, sha: str) -> str | None:
    """How a file differs from its manifest entry, or None. Raises: Unreadable."""
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


# Removing -------------------------------------------------------------------------------------------------------------


def discard(folder: Path) -> bool:
    """Remove the files that a folder's manifest names, the manifest, and the folder where nothing is left in it.

    Files that no manifest lists stay, since a user may have put them there, and so does a folder without a readable
    manifest; of a symbolic link only the link is removed. Returns: whether the place is free now.
    """
    if folder.is_symlink():
        folder.unlink()
        return True
    if not is_there(folder):
        return True
    entries = entries_of(folder)
    if entries is None:
        return False
    (folder / MANIFEST).unlink()  # first: a folder that is half removed must not look whole
    for name in entries:
        (folder / name).unlink(missing_ok=True)
    for below in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            below.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not is_there(folder)


def make_room(folder: Path) -> Path | None:
    """Free the place of a folder that is about to be written.

    Returns: where files that are not this program's were moved to; None where there were none.
    """
    if discard(folder):
        return None
    number = 1
    while is_there(aside := folder.with_name(f"{folder.name}.before-{number}")):
        number += 1
    folder.rename(aside)
    return aside


def remove_ours(folder: Path) -> None:
    """Remove a folder with everything in it: its name shows that only this program writes to it."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)
