"""Checkpoints that are complete or absent: written aside, hashed, flushed, renamed; a damaged one is skipped.

A checkpoint is a folder `step_00000100/` that `from_pretrained` opens, with the optimizer in safetensors, the rest of
the state in JSON, and a manifest with the size and SHA-256 of every file. All ranks write it, each its own files.
Folders of any other name are not touched: a copy that a user made is neither resumed from nor removed.
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


class Ranks(Protocol):
    """The ranks that write, which all make the same calls; see `Runtime`."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    def gather_objects(self, mine: list[Any]) -> list[Any]:
        """The lists of all ranks, joined in order of rank, on every rank."""


class _SingleRank:
    rank, world = 0, 1

    def gather_objects(self, mine: list[Any]) -> list[Any]:
        return mine


SINGLE_RANK = _SingleRank()
Write = Callable[[Path], list[Path] | None]  # fills a folder; returns the files that this rank wrote


def save(
    root: Path, step: int, write: Write, state: dict[str, Any], keep_last: int, ranks: Ranks = SINGLE_RANK
) -> Path:
    """Write checkpoint `step` under `root` and drop all but the last `keep_last`.

    Those of later steps, which a resumed run skipped, are dropped too, because this one replaces them.

    Args:
        write: fills an empty folder with the model, the tokenizer and the optimizer; called on all ranks.
        state: JSON values: the step, the random generators, a hash of the data.
    Raises: TrainError if the disk is full or unwritable; checkpoints that were there before are untouched.
    """
    final = root / name_of(step)

    def write_all(folder: Path) -> list[Path] | None:
        mine = write(folder)
        if ranks.rank == 0:
            (folder / _STATE).write_text(json.dumps(state))
        return mine

    _write_folder(final, write_all, root, ranks)
    with raise_on_all_ranks(ranks):
        if ranks.rank == 0:
            before = [folder for folder in steps(root) if step_of(folder) <= step]
            for old in {*steps(root)} - {*before[-keep_last:]}:
                drop(old)
    return final


def export(folder: Path, write: Write, ranks: Ranks = SINGLE_RANK, checkpoints: Path | None = None) -> Path | None:
    """Write the folder of a finished model, with a manifest, completely or not at all; it replaces what was there.

    Args: checkpoints: the folder of the run's checkpoints, if not beside `folder`.
    Returns: where files were moved to that were there before and that no manifest lists.
    """
    return _write_folder(folder, write, checkpoints or folder.parent / "checkpoints", ranks)


def copy(folder: Path, into: Path, without: tuple[str, ...] = ()) -> None:
    """Copy the files of an exported model, without its manifest and without those that are named.

    Raises: Damaged when a file differs from what was exported; the new manifest of a copy would hide that.
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


def _write_folder(final: Path, write: Write, checkpoints: Path, ranks: Ranks = SINGLE_RANK) -> Path | None:
    temporary, first = final.with_name(_TEMPORARY + final.name), ranks.rank == 0
    aside: Path | None = None
    try:
        with raise_on_all_ranks(ranks):
            if first:
                storage.empty_folder(temporary)
        with raise_on_all_ranks(ranks):
            mine = write(temporary)
            entries = {} if first else {str(path.relative_to(temporary)): storage.flushed(path) for path in mine or ()}
        others = dict(ranks.gather_objects([*entries.items()]))
        with raise_on_all_ranks(ranks):
            if first:
                storage.seal(temporary, others)
                aside = storage.make_room(final)
                storage.put_in_place(temporary, final)
    except Exception as error:
        if first:
            storage.remove_ours(temporary)
        if _is_about_space(error):
            earlier = last_good(checkpoints) if first else None  # only rank 0 prints
            last = f"the last good checkpoint is {earlier}" if earlier else "there is no earlier checkpoint"
            raise TrainError(f"{final}: not written: {error}; {last} (free space and run again)") from error
        raise
    return aside


class _FailedElsewhere(TrainError):
    """Another rank failed. Args: about_space: whether because the disk is full."""

    def __init__(self, text: str, about_space: bool) -> None:
        super().__init__(text)
        self.about_space = about_space


@contextlib.contextmanager
def raise_on_all_ranks(ranks: Ranks) -> Iterator[None]:
    """At its end all ranks wait for each other; an exception on one of them is raised on all."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    mine = [] if failure is None else [(f"rank {ranks.rank}: {failure}", _is_about_space(failure))]
    failures = ranks.gather_objects(mine)
    if failure is not None:
        raise failure
    if failures:
        raise _FailedElsewhere(*failures[0])


def _is_about_space(error: Exception) -> bool:
    """Whether a write failed because the disk is full; safetensors reports that as an error of its own."""
    if isinstance(error, _FailedElsewhere):
        return error.about_space
    if isinstance(error, PrefoptError):
        return False
    text = str(error).lower()
    return isinstance(error, OSError) or any(
        part in text for part in ("no space", "file too large", "i/o error", "os error")
    )


def name_of(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


def steps(root: Path) -> list[Path]:
    """The folders of checkpoints, in the order of their steps. Raises: Unreadable."""
    found = [path for path in storage.listing(root) if _STEP.fullmatch(path.name)]
    return sorted((path for path in found if path.name == name_of(step_of(path)) and path.is_dir()), key=step_of)


def drop(folder: Path) -> None:
    """Remove a checkpoint, except files that its manifest does not list; all of it if its manifest is damaged."""
    damaged = storage.entries_of(folder) is None
    if damaged and storage.is_there(folder / _STATE):
        storage.remove_ours(folder)
    elif not damaged:
        storage.discard(folder)


def drop_all(root: Path) -> None:
    """Remove all checkpoints under `root`, incomplete ones, and `root` itself if nothing else is in it."""
    clean(root)
    for folder in steps(root):
        drop(folder)
    with contextlib.suppress(OSError):
        root.rmdir()


def damage(folder: Path, ranks: Ranks = SINGLE_RANK) -> str | None:
    """What is wrong with a checkpoint, or None if every file matches its manifest. Each rank hashes some of the files.

    Raises: Unreadable, on all ranks, when any of them cannot read a file at the moment.
    """
    expected: dict[str, tuple[int, str]] | None = None
    mine: list[str | None] = []
    with raise_on_all_ranks(ranks):
        expected = storage.entries_of(folder)
        names = [*(expected or {})][ranks.rank :: ranks.world]
        mine = [storage.difference(folder / name, *(expected or {})[name]) for name in names]
    if not expected:
        mine = [f"{storage.MANIFEST} is missing or damaged"]
    return next((found for found in ranks.gather_objects(mine) if found is not None), None)


def latest(root: Path, report: Callable[[str], None] = lambda line: None, ranks: Ranks = SINGLE_RANK) -> Path | None:
    """The newest undamaged checkpoint, or None; damaged ones are reported, one line each, and stay.

    Raises: Unreadable, on all ranks: a checkpoint that cannot be read at the moment may be the newest good one.
    """
    found: list[Path] = []
    with raise_on_all_ranks(ranks):
        if ranks.rank == 0:
            found = steps(root)
    folders = ranks.gather_objects([found] if ranks.rank == 0 else [])[0]  # the same list on all ranks
    for folder in reversed(folders):
        wrong = damage(folder, ranks)
        if wrong is None:
            return Path(folder)
        report(f"{folder}: damaged checkpoint skipped: {wrong}")
    return None


def last_good(root: Path) -> Path | None:
    """As `latest`, for an error message: it returns None where it cannot read."""
    with contextlib.suppress(storage.Unreadable):
        return latest(root)
    return None


def clean(root: Path) -> None:
    """Remove incomplete checkpoints."""
    for incomplete in storage.listing(root):
        if incomplete.name.startswith(_TEMPORARY) and _STEP.fullmatch(incomplete.name.removeprefix(_TEMPORARY)):
            storage.remove_ours(incomplete)


def load_state(folder: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint."""
    state: dict[str, Any] | None = storage.read_json(folder / _STATE)
    if state is None:
        raise storage.Damaged(f"{folder}: {_STATE} is missing")
    return state


# The optimizer --------------------------------------------------------------------------------------------------------

State = dict[int, dict[str, Any]]  # the optimizer state of each parameter, by the parameter's index


def pack_state(optimizer_state: State) -> tuple[dict[str, torch.Tensor], str]:
    """(the tensors of an optimizer state by name, everything else as JSON that refers to tensors by name).

    Raises: TypeError for a state that is not made of tensors, numbers, strings, lists and mappings with string keys.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    packed = {str(index): _pack(entries, str(index), tensors, seen) for index, entries in optimizer_state.items()}
    return tensors, json.dumps(packed)


def _pack(value: Any, name: str, tensors: dict[str, torch.Tensor], seen: set[int]) -> Any:
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        if tensor.numel() and tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()  # parameters may share a tensor, but safetensors stores each one separately
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
        return {"tensor": name}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"{name} has keys that are no strings")
        return {"members": {key: _pack(member, f"{name}.{key}", tensors, seen) for key, member in value.items()}}
    if isinstance(value, (list, tuple)):
        return [_pack(member, f"{name}.{i}", tensors, seen) for i, member in enumerate(value)]
    return value


def save_optimizer(optimizer_state: State, path: Path) -> None:
    """Write an optimizer state as safetensors, bit for bit, without hyper-parameters, which the config has.

    Args: optimizer_state: of each parameter, by its index. path: the safetensors file.
    """
    from safetensors.torch import save_file

    tensors, state = pack_state(optimizer_state)
    save_file(tensors, path, metadata={"state": state})


def load_optimizer(folder: Path) -> State:
    """Read what `save_optimizer` wrote, all files of it. Raises: TrainError for one that an older version wrote."""
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
                f"{path}: written by an older version of prefopt, which this one cannot resume; choose another --output"
            )
        return {int(i): unpack(entries) for i, entries in json.loads(written).items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, saved_state: State) -> None:
    """Load the state of another optimizer over the same parameters in the same order."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved_state, "param_groups": groups})
    # torch casts floating-point state to the dtype of its parameter; keep the dtype that was saved
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            saved = saved_state[index][name]
            if isinstance(value, torch.Tensor) and value.dtype != saved.dtype:
                entries[name] = saved.to(value.device)
