"""Checkpoints that are whole or absent: written aside, hashed, flushed, renamed; a damaged one is seen and passed over.

A checkpoint is a folder `step_00000100/` that `from_pretrained` opens, with the optimizer in safetensors, the rest of
the state in JSON, and a manifest with the size and SHA-256 of every file. All processes write it, each its own files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from prefopt.errors import TrainError

_MANIFEST = "manifest.json"
_PREFIX = "step_"
_TEMPORARY = ".writing-"


class Processes(Protocol):
    """Who writes: all processes of a run, which make the same calls, or one."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    def gather_objects(self, mine: list[Any]) -> list[Any]:
        """The lists of all processes, joined in order of rank, on every process."""


class _One:
    rank, world = 0, 1

    def gather_objects(self, mine: list[Any]) -> list[Any]:
        return mine


ONE = _One()
Write = Callable[[Path], list[Path] | None]  # fills a folder; the files that this process wrote, where there are others


def save(
    root: Path, step: int, write: Write, state: dict[str, Any], keep_last: int, processes: Processes = ONE
) -> Path:
    """Write checkpoint `step` under `root` and drop all but the last `keep_last`.

    Args:
        write: fills an empty folder with the model, the tokenizer and the optimizer; called on every process.
        state: JSON values: the step, the random generators, what the data was.
    Raises: TrainError if the disk is full or unwritable; checkpoints that were there before are untouched.
    """
    final = root / f"{_PREFIX}{step:08d}"

    def write_all(folder: Path) -> list[Path] | None:
        mine = write(folder)
        if processes.rank == 0:
            (folder / "state.json").write_text(json.dumps(state))
        return mine

    _write_folder(final, write_all, root, processes)
    if processes.rank == 0:
        for old in _steps(root)[:-keep_last]:
            shutil.rmtree(old)
    return final


def export(folder: Path, write: Write, processes: Processes = ONE) -> None:
    """Write a finished model's folder, with a manifest, whole or not at all; replaces what was there."""
    _write_folder(folder, write, folder.parent / "checkpoints", processes)


def copy(folder: Path, into: Path, without: tuple[str, ...] = ()) -> None:
    """Copy the files of an exported model, but for its manifest and those that are named."""
    for file in folder.iterdir():
        if file.name not in (_MANIFEST, *without):
            shutil.copy2(file, into / file.name)


def _write_folder(final: Path, write: Write, checkpoints: Path, processes: Processes = ONE) -> None:
    temporary, first = final.with_name(_TEMPORARY + final.name), processes.rank == 0
    try:
        with together(processes):
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        with together(processes):
            mine = write(temporary)
            entries = {} if first else {str(path.relative_to(temporary)): _flushed(path) for path in mine or ()}
        others = dict(processes.gather_objects([*entries.items()]))
        with together(processes):
            if first:
                _seal(temporary, others)
                if final.exists():
                    shutil.rmtree(final)
                temporary.rename(final)
                _flush(final.parent)
    except Exception as error:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        if _is_about_space(error):
            kept = latest(checkpoints) if first else None  # the others' words are not printed
            last = f"the last good checkpoint is {kept}" if kept else "there is no earlier checkpoint"
            raise TrainError(f"{final}: not written: {error}; {last} (free space and run again)") from error
        raise


class _FailedElsewhere(TrainError):
    """Another process could not do its part. Args: about_space: whether for want of room."""

    def __init__(self, text: str, about_space: bool) -> None:
        super().__init__(text)
        self.about_space = about_space


@contextlib.contextmanager
def together(processes: Processes) -> Iterator[None]:
    """At its end all processes wait for each other; what failed on one of them raises on all."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    mine = [] if failure is None else [(f"process {processes.rank}: {failure}", _is_about_space(failure))]
    failures = processes.gather_objects(mine)
    if failure is not None:
        raise failure
    if failures:
        raise _FailedElsewhere(*failures[0])


def _is_about_space(error: Exception) -> bool:
    """Whether a write failed for want of room; safetensors reports it in words of its own."""
    if isinstance(error, _FailedElsewhere):
        return error.about_space
    text = str(error).lower()
    return isinstance(error, OSError) or any(
        word in text for word in ("no space", "file too large", "i/o error", "os error")
    )


def _seal(folder: Path, others: dict[str, Any]) -> None:
    """Flush every file and write the manifest. Args: others: entries of files that other processes have flushed."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    # a file of another node may not be seen here yet
    entries = others | {name: _flushed(path) for name, path in files.items() if name not in others}
    manifest = folder / _MANIFEST
    manifest.write_text(json.dumps(entries, indent=1, sort_keys=True))
    _flush(manifest)
    _flush(folder)


def _flushed(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest, once it is on the disk."""
    entry = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    _flush(path)
    return entry


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _steps(root: Path) -> list[Path]:
    return sorted(root.glob(f"{_PREFIX}*")) if root.is_dir() else []


def damage(folder: Path, processes: Processes = ONE) -> str | None:
    """What is wrong with a checkpoint, or None if every file is as its manifest says. Processes share the files."""
    try:
        entries = json.loads((folder / _MANIFEST).read_text())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        expected = {}
    mine = [_wrong(folder / name, *expected[name]) for name in [*expected][processes.rank :: processes.world]]
    if not expected:
        mine = [f"{_MANIFEST} is missing or unreadable"]
    return next((found for found in processes.gather_objects(mine) if found is not None), None)


def _wrong(path: Path, size: int, digest: str) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != size:
        return f"{path.name} has {path.stat().st_size} bytes, expected {size}"
    return None if _sha256(path) == digest else f"{path.name} does not match its hash"


def latest(root: Path, report: Callable[[str], None] = lambda line: None, processes: Processes = ONE) -> Path | None:
    """The newest undamaged checkpoint, or None; damaged ones are reported, one line each, and left where they are."""
    folders = processes.gather_objects([_steps(root)] if processes.rank == 0 else [])[0]  # all look at the same ones
    for folder in reversed(folders):
        found = damage(folder, processes)
        if found is None:
            return Path(folder)
        report(f"{folder}: damaged checkpoint passed over: {found}")
    return None


def clean(root: Path, after: Path | None) -> None:
    """Remove half-written checkpoints, and those newer than `after`, which a resumed run will write again."""
    for half in root.glob(f"{_TEMPORARY}*") if root.is_dir() else ():
        shutil.rmtree(half)
    for folder in _steps(root):
        if after is None or folder.name > after.name:
            shutil.rmtree(folder)


def load_state(folder: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint."""
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return state


# The optimizer --------------------------------------------------------------------------------------------------------

State = dict[int, dict[str, Any]]  # what an optimizer keeps of each parameter, by the parameter's number


def pack_state(kept: State) -> tuple[dict[str, torch.Tensor], str]:
    """(the tensors of an optimizer's state by name, all else as JSON in which a name stands for its tensor).

    Raises: TypeError for a state that is no tensor, number, text, list or mapping of names to such.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    packed = {str(index): _pack(entries, str(index), tensors, seen) for index, entries in kept.items()}
    return tensors, json.dumps(packed)


def _pack(value: Any, name: str, tensors: dict[str, torch.Tensor], seen: set[int]) -> Any:
    if isinstance(value, torch.Tensor):
        kept = value.detach().cpu().contiguous()
        if kept.numel() and kept.untyped_storage().data_ptr() in seen:
            kept = kept.clone()  # parameters may share a table; a file holds one of each
        seen.add(kept.untyped_storage().data_ptr())
        tensors[name] = kept
        return {"tensor": name}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"{name} has keys that are no names")
        return {"members": {key: _pack(member, f"{name}.{key}", tensors, seen) for key, member in value.items()}}
    if isinstance(value, (list, tuple)):
        return [_pack(member, f"{name}.{i}", tensors, seen) for i, member in enumerate(value)]
    return value


def save_optimizer(kept: State, path: Path) -> None:
    """An optimizer's state as safetensors, bit by bit; hyper-parameters are not kept, the config has them.

    Args:
        kept: of each parameter, by its number.
        path: the safetensors file.
    """
    from safetensors.torch import save_file

    tensors, state = pack_state(kept)
    save_file(tensors, path, metadata={"state": state})


def load_optimizer(folder: Path) -> State:
    """Undo `save_optimizer`, of all its files. Raises: TrainError for one that another version of prefopt wrote."""
    found: State = {}
    for path in sorted(folder.glob("optimizer*.safetensors")):
        found |= _load_optimizer(path)
    return found


def _load_optimizer(path: Path) -> State:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:

        def unpack(value: Any) -> Any:
            if isinstance(value, dict):
                members = value.get("members")
                if members is None:
                    return file.get_tensor(value["tensor"])
                return {key: unpack(member) for key, member in members.items()}
            return [unpack(member) for member in value] if isinstance(value, list) else value

        written = (file.metadata() or {}).get("state")
        if written is None:
            raise TrainError(
                f"{path}: written by an older version of prefopt, which cannot be continued; choose another --output"
            )
        return {int(i): unpack(entries) for i, entries in json.loads(written).items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, kept: State) -> None:
    """Give an optimizer the state of another one over the same parameters in the same order."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": kept, "param_groups": groups})
    # torch gives a floating state the dtype of its parameter, whatever it was saved in
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            saved = kept[index][name]
            if isinstance(value, torch.Tensor) and value.dtype != saved.dtype:
                entries[name] = saved.to(value.device)
