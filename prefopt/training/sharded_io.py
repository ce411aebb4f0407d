"""Weights and the optimizer's state in files that all processes write side by side.

Every file holds whole tensors. They are gathered one after the other; a process keeps those of its own file, and as
many files as there are processes are filled before they are written. So no process ever holds more than one file,
however large the model is, and the files are the same whatever joins the processes and however many there are.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from prefopt.errors import TrainError
from prefopt.training import adapter_saving, adapters, checkpoint, sharding, weight_files
from prefopt.training.checkpoint import Processes

if TYPE_CHECKING:
    from prefopt.training.backends import Backend

_Name = TypeVar("_Name", bound=Hashable)
_STATE_BYTES = 8  # what AdamW keeps of a parameter's entry; other optimizers' files are smaller


def save_model(
    backend: Backend, folder: Path, max_shard_mb: float, dtype: str | None = None, original: bool = False
) -> list[Path]:
    """Write what `from_pretrained` of transformers or peft opens. On all processes together.

    Args:
        dtype: of the weights in the files; None: as they are trained.
        original: with the names that the architecture's published checkpoints have, where transformers knows others; a
            file then holds whole layers.
    Returns: the files of weights that this process wrote.
    Raises: on all processes what failed on one of them.
    """
    lm, runtime = backend.policy.lm, backend.runtime
    tensors = adapter_saving.tensors(lm)

    def gather(name: str) -> torch.Tensor:
        value = backend.full_tensor(tensors[name])
        return value.to(getattr(torch, dtype)) if dtype is not None and value.is_floating_point() else value

    if adapters.has_adapter(lm):  # small, and written by peft
        weights = {}
        for name in tensors:
            value = gather(name)
            if runtime.is_main:
                weights[name] = _in_host(value)
        with checkpoint.together(runtime):
            if runtime.is_main:
                adapter_saving.save(lm, folder, weights)
        return []
    held = dtype or backend.config.model.dtype
    with checkpoint.together(runtime):
        if runtime.is_main:  # all but the weights; it would clear away what looks like theirs
            adapter_saving.save(lm, folder, {}, held)
    # several weights of a layer may be one in the published files
    groups = _by_layer(tensors) if original else None
    publish = functools.partial(adapter_saving.as_published, lm) if original else None
    sizes = _sizes(tensors, held)
    written, where = _save_tensors(backend, folder, "model", sizes, gather, max_shard_mb, groups, publish)
    if len(set(where.values())) > 1:
        with checkpoint.together(runtime):
            if runtime.is_main:
                index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
                (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return written


def save_frozen(
    backend: Backend, folder: Path, stem: str, weights: Mapping[str, torch.Tensor], max_shard_mb: float
) -> list[Path]:
    """Write weights that are not the policy's, such as a reference's. As `save_model`."""
    sizes = _sizes(weights, backend.config.model.dtype)
    return _save_tensors(backend, folder, stem, sizes, lambda name: backend.full_tensor(weights[name]), max_shard_mb)[0]


def load_frozen(backend: Backend, folder: Path, stem: str, weights: Mapping[str, nn.Parameter]) -> None:
    """Undo `save_frozen`. On all processes together.

    Raises: TrainError for files that lack a weight or hold another.
    """
    from safetensors import safe_open

    files = sorted(folder.glob(f"{stem}*.safetensors"))
    held = {name for path in files for name in weight_files.names_in(path, str(folder))}
    wrong = min(held ^ weights.keys(), default=None)
    if wrong is not None:
        what = "lacks" if wrong in weights else "holds an unknown"
        raise TrainError(f"{folder}: {stem} {what} {wrong}; delete this checkpoint, and the one before is used")
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                backend.set_full_tensor(weights[name], file.get_tensor(name))


def _save_tensors(
    backend: Backend,
    folder: Path,
    stem: str,
    sizes: Mapping[str, int],
    gather: Callable[[str], torch.Tensor],
    max_shard_mb: float,
    groups: Mapping[str, list[str]] | None = None,
    publish: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
) -> tuple[list[Path], dict[str, str]]:
    """(files that this process wrote, the file of each tensor).

    Args: sizes: in bytes. groups: names that stay together. publish: what becomes of a file's tensors at last.
    """
    groups = groups or {name: [name] for name in sizes}
    together = {group: sum(sizes[name] for name in names) for group, names in groups.items()}
    runs = [[name for group in run for name in groups[group]] for run in cut(together, int(max_shard_mb * 1e6))]
    mine: dict[str, str] = {}

    def save(number: int, values: dict[str, torch.Tensor]) -> Path:
        from safetensors.torch import save_file

        path = folder / _file(stem, number, len(runs))
        values = values if publish is None else publish(values)
        mine.update(dict.fromkeys(values, path.name))
        save_file({name: value.contiguous() for name, value in values.items()}, path, metadata={"format": "pt"})
        return path

    written = write(backend.runtime, runs, gather, save)
    return written, dict(backend.runtime.gather_objects([*mine.items()]))


def save_optimizer(backend: Backend, folder: Path, max_shard_mb: float) -> list[Path]:
    """Write what the optimizer keeps, by the number of the parameter. As `save_model`."""
    state = backend.optimizer_state()
    sizes = {number: _STATE_BYTES * sharding.numel(p) for number, p in enumerate(backend.trained_parameters())}
    runs = cut(sizes, int(max_shard_mb * 1e6))

    def save(number: int, values: dict[int, dict[str, Any]]) -> Path:
        path = folder / _file("optimizer", number, len(runs))
        checkpoint.save_optimizer({n: kept for n, kept in values.items() if kept}, path)
        return path

    return write(backend.runtime, runs, state, save)


def _sizes(tensors: Mapping[str, torch.Tensor], dtype: str) -> dict[str, int]:
    """Bytes of each, in a dtype."""
    return {name: getattr(torch, dtype).itemsize * sharding.numel(value) for name, value in tensors.items()}


def _by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of each layer, which is what stands before and at the first number; others by themselves."""
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = re.match(r".*?\.\d+(?=\.)", name)
        groups.setdefault(layer[0] if layer else name, []).append(name)
    return groups


def cut(sizes: Mapping[_Name, int], limit: int) -> list[list[_Name]]:
    """Consecutive names whose sizes together are at most `limit`, or one name that is larger by itself."""
    runs: list[list[_Name]] = []
    room = 0
    for name, size in sizes.items():
        if size > room or not runs:
            runs.append([])
            room = limit
        runs[-1].append(name)
        room -= size
    return runs


def write(
    processes: Processes,
    runs: Sequence[Sequence[_Name]],
    gather: Callable[[_Name], Any],
    save: Callable[[int, dict[_Name, Any]], Path],
) -> list[Path]:
    """Write a file for each of the runs. On all processes together; returns the files that this one wrote.

    Args: gather: what belongs to a name, on all processes. save: writes the file with a number, on one.
    Raises: on all processes what failed on one of them; until the end it takes part in what the others gather.
    """
    written: list[Path] = []
    failure: Exception | None = None
    for first in range(0, len(runs), processes.world):
        kept: dict[_Name, Any] = {}
        own = first + processes.rank
        for number in range(first, min(first + processes.world, len(runs))):
            for name in runs[number]:
                value = gather(name)
                if number == own and failure is None:
                    kept[name] = _in_host(value)
        if own < len(runs) and failure is None:
            try:
                written.append(save(own, kept))
            except Exception as error:
                failure = error
    with checkpoint.together(processes):
        if failure is not None:
            raise failure
    return written


def _file(stem: str, number: int, of: int) -> str:
    """As transformers names the files of a model."""
    return f"{stem}.safetensors" if of == 1 else f"{stem}-{number + 1:05d}-of-{of:05d}.safetensors"


def _in_host(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _in_host(member) for name, member in value.items()}
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value
