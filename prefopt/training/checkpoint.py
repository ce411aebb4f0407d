"""Checkpoints that are whole or absent: written aside, hashed, flushed, renamed; a damaged one is seen and passed over.

A checkpoint is a folder `step_00000100/` that `from_pretrained` opens, with the optimizer in safetensors, the rest of
the state in JSON, and a manifest with the size and SHA-256 of every file. All processes write it, each its own files.
Folders of any other name are not this module's: a copy that a user made is neither continued from nor removed.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from prefopt import storage
from prefopt.errors import PrefoptError, TrainError

_STEP = re.compile(r"step_(\d{8,})")
_TEMPORARY = ".writing-"
_STATE = "state.json"


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

    Those of later steps, which a resumed run passed over, are dropped too: this one takes their place.

    Args:
        write: fills an empty folder with the model, the tokenizer and the optimizer; called on every process.
        state: JSON values: the step, the random generators, what the data was.
    Raises: TrainError if the disk is full or unwritable; checkpoints that were there before are untouched.
    """
    final = root / name_of(step)

    def write_all(folder: Path) -> list[Path] | None:
        mine = write(folder)
        if processes.rank == 0:
            (folder / _STATE).write_text(json.dumps(state))
        return mine

    _write_folder(final, write_all, root, processes)
    with together(processes):
        if processes.rank == 0:
            before = [folder for folder in steps(root) if step_of(folder) <= step]
            for old in {*steps(root)} - {*before[-keep_last:]}:
                drop(old)
    return final


def export(folder: Path, write: Write, processes: Processes = ONE, checkpoints: Path | None = None) -> Path | None:
    """Write a finished model's folder, with a manifest, whole or not at all; replaces what was there.

    Args: checkpoints: where the run's checkpoints are, if not beside the folder.
    Returns: where files are now that were there before and that no manifest names as this program's.
    """
    return _write_folder(folder, write, checkpoints or folder.parent / "checkpoints", processes)


def copy(folder: Path, into: Path, without: tuple[str, ...] = ()) -> None:
    """Copy the files of an exported model, but for its manifest and those that are named.

    Raises: Damaged when one of them is not as it was exported: a copy that is sealed anew would hide it.
    """
    entries = storage.entries_of(folder)
    if entries is None:
        raise storage.Damaged(f"{folder}: {storage.MANIFEST} is missing or damaged; put it back from a copy")
    for name, entry in entries.items():
        if name not in without:
            wrong = storage.difference(folder / name, *entry)
            if wrong is not None:
                raise storage.Damaged(f"{folder}: {wrong}; put it back from a copy")
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, into / name)


def _write_folder(final: Path, write: Write, checkpoints: Path, processes: Processes = ONE) -> Path | None:
    temporary, first = final.with_name(_TEMPORARY + final.name), processes.rank == 0
    aside: Path | None = None
    try:
        with together(processes):
            if first:
                storage.empty_folder(temporary)
        with together(processes):
            mine = write(temporary)
            entries = {} if first else {str(path.relative_to(temporary)): storage.flushed(path) for path in mine or ()}
        others = dict(processes.gather_objects([*entries.items()]))
        with together(processes):
            if first:
                storage.seal(temporary, others)
                aside = storage.make_room(final)
                storage.put_in_place(temporary, final)
    except Exception as error:
        if first:
            storage.remove_ours(temporary)
        if _is_about_space(error):
            kept = last_good(checkpoints) if first else None  # the others' words are not printed
            last = f"the last good checkpoint is {kept}" if kept else "there is no earlier checkpoint"
            raise TrainError(f"{final}: not written: {error}; {last} (free space and run again)") from error
        raise
    return aside


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
    if isinstance(error, PrefoptError):
        return False
    text = str(error).lower()
    return isinstance(error, OSError) or any(
        word in text for word in ("no space", "file too large", "i/o error", "os error")
    )


def name_of(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named by."""
    return int(folder.name.removeprefix("step_"))


def steps(root: Path) -> list[Path]:
    """The folders of checkpoints, in the order of their steps. Raises: Unreadable."""
    found = [path for path in storage.listing(root) if _STEP.fullmatch(path.name)]
    return sorted((path for path in found if path.name == name_of(step_of(path)) and path.is_dir()), key=step_of)


def drop(folder: Path) -> None:
    """Remove a checkpoint; what somebody else has put into it stays. One whose manifest is damaged goes as it is."""
    damaged = storage.entries_of(folder) is None
    if damaged and storage.is_there(folder / _STATE):
        storage.remove_ours(folder)
    elif not damaged:
        storage.discard(folder)


def drop_all(root: Path) -> None:
    """Remove all checkpoints under `root`, what is half-written, and `root` itself where nothing else is in it."""
    clean(root)
    for folder in steps(root):
        drop(folder)
    with contextlib.suppress(OSError):
        root.rmdir()


def damage(folder: Path, processes: Processes = ONE) -> str | None:
    """What is wrong with a checkpoint, or None if every file is as its manifest says. Processes share the files.

    Raises: Unreadable, on all processes, when any of them cannot read a file just now.
    """
    expected: dict[str, tuple[int, str]] | None = None
    mine: list[str | None] = []
    with together(processes):
        expected = storage.entries_of(folder)
        names = [*(expected or {})][processes.rank :: processes.world]
        mine = [storage.difference(folder / name, *(expected or {})[name]) for name in names]
    if not expected:
        mine = [f"{storage.MANIFEST} is missing or damaged"]
    return next((found for found in processes.gather_objects(mine) if found is not None), None)


def latest(root: Path, report: Callable[[str], None] = lambda line: None, processes: Processes = ONE) -> Path | None:
    """The newest undamaged checkpoint, or None; damaged ones are reported, one line each, and left where they are.

    Raises: Unreadable, on all processes: a checkpoint that cannot be read just now may be the newest good one.
    """
    found: list[Path] = []
    with together(processes):
        if processes.rank == 0:
            found = steps(root)
    folders = processes.gather_objects([found] if processes.rank == 0 else [])[0]  # all look at the same ones
    for folder in reversed(folders):
        wrong = damage(folder, processes)
        if wrong is None:
            return Path(folder)
        report(f"{folder}: damaged checkpoint passed over: {wrong}")
    return None


def last_good(root: Path) -> Path | None:
    """The same for the end of an error's line, which must not become another error."""
    with contextlib.suppress(storage.Unreadable):
        return latest(root)
    return None


def clean(root: Path) -> None:
    """Remove half-written checkpoints."""
    for half in storage.listing(root):
        if half.name.startswith(_TEMPORARY) and _STEP.fullmatch(half.name.removeprefix(_TEMPORARY)):
            storage.remove_ours(half)


def load_state(folder: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint."""
    state: dict[str, Any] | None = storage.read_json(folder / _STATE)
    if state is None:
        raise storage.Damaged(f"{folder}: {_STATE} is missing")
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
