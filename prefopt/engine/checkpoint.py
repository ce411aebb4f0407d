"""Checkpoints that are whole or absent: written aside, hashed, flushed, renamed; a damaged one is seen and passed over.

A checkpoint is a folder `step_00000100/` that `from_pretrained` opens, with the optimizer in safetensors, the rest of
the state in JSON, and a manifest with the size and SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prefopt.errors import TrainError

_MANIFEST = "manifest.json"
_PREFIX = "step_"
_TEMPORARY = ".writing-"


def save(root: Path, step: int, write: Callable[[Path], None], state: dict[str, Any], keep_last: int) -> Path:
    """Write checkpoint `step` under `root` and drop all but the last `keep_last`.

    Args:
        write: fills an empty folder with the model, the tokenizer and the optimizer.
        state: JSON values: the step, the random generators, what the data was.
    Raises: TrainError if the disk is full or unwritable; checkpoints that were there before are untouched.
    """

    def write_all(folder: Path) -> None:
        write(folder)
        (folder / "state.json").write_text(json.dumps(state))

    root.mkdir(parents=True, exist_ok=True)
    final = root / f"{_PREFIX}{step:08d}"
    _write_folder(final, write_all, root)
    for old in _steps(root)[:-keep_last]:
        shutil.rmtree(old)
    return final


def export(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a finished model's folder, with a manifest, whole or not at all; replaces what was there."""
    _write_folder(folder, write, folder.parent / "checkpoints")


def copy(folder: Path, into: Path, without: tuple[str, ...] = ()) -> None:
    """Copy the files of an exported model, but for its manifest and those that are named."""
    for file in folder.iterdir():
        if file.name not in (_MANIFEST, *without):
            shutil.copy2(file, into / file.name)


def _write_folder(final: Path, write: Callable[[Path], None], checkpoints: Path) -> None:
    temporary = final.with_name(_TEMPORARY + final.name)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        write(temporary)
        _seal(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(final.parent)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_about_space(error):
            kept = latest(checkpoints)
            last = f"the last good checkpoint is {kept}" if kept else "there is no earlier checkpoint"
            raise TrainError(f"{final}: not written: {error}; {last} (free space and run again)") from error
        raise


def _is_about_space(error: Exception) -> bool:
    """Whether a write failed for want of room; safetensors reports it in words of its own."""
    text = str(error).lower()
    return isinstance(error, OSError) or any(
        word in text for word in ("no space", "file too large", "i/o error", "os error")
    )


def _seal(folder: Path) -> None:
    """Flush every file and write the manifest."""
    entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        entries[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        _flush(path)
    manifest = folder / _MANIFEST
    manifest.write_text(json.dumps(entries, indent=1))
    _flush(manifest)
    _flush(folder)


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


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file is as its manifest says."""
    try:
        entries = json.loads((folder / _MANIFEST).read_text())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        expected = {}
    if not expected:
        return f"{_MANIFEST} is missing or unreadable"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
        if _sha256(path) != digest:
            return f"{name} does not match its hash"
    return None


def latest(root: Path, report: Callable[[str], None] = lambda line: None) -> Path | None:
    """The newest undamaged checkpoint, or None; damaged ones are reported, one line each, and left where they are."""
    for folder in reversed(_steps(root)):
        found = damage(folder)
        if found is None:
            return folder
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

    def pack(value: Any, name: str) -> Any:
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
            return {"members": {key: pack(member, f"{name}.{key}") for key, member in value.items()}}
        if isinstance(value, (list, tuple)):
            return [pack(member, f"{name}.{i}") for i, member in enumerate(value)]
        return value

    return tensors, json.dumps({str(index): pack(entries, str(index)) for index, entries in kept.items()})


def save_optimizer(kept: State, path: Path) -> None:
    """An optimizer's state as safetensors, bit by bit; hyper-parameters are not kept, the config has them.

    Args:
        kept: of each parameter, by its number.
        path: the safetensors file.
    """
    from safetensors.torch import save_file

    tensors, state = pack_state(kept)
    save_file(tensors, path, metadata={"state": state})


def load_optimizer(path: Path) -> State:
    """Undo `save_optimizer`."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:

        def unpack(value: Any) -> Any:
            if isinstance(value, dict):
                members = value.get("members")
                if members is None:
                    return file.get_tensor(value["tensor"])
                return {key: unpack(member) for key, member in members.items()}
            return [unpack(member) for member in value] if isinstance(value, list) else value

        return {int(i): unpack(entries) for i, entries in json.loads(file.metadata()["state"]).items()}


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
