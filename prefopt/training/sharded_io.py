"""Weights and optimizer state in files that all ranks write side by side.

Every file holds full tensors. They are gathered one after the other; each rank keeps those of its own file, and as many
files as there are ranks are filled before they are written. So no rank ever holds more than one file, however large the
model is, and the files are the same for every parallel backend and world size.
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
from prefopt.training.checkpoint import Ranks

if TYPE_CHECKING:
    from prefopt.training.backends import Backend

_Name = TypeVar("_Name", bound=Hashable)
_STATE_BYTES = 8  # of AdamW state per element of a parameter; the files of other optimizers are smaller


def save_model(
    backend: Backend, folder: Path, max_shard_mb: float, dtype: str | None = None, original: bool = False
) -> list[Path]:
    """Write what `from_pretrained` of transformers or peft opens; called on all ranks.

    Args:
        dtype: of the weights in the files; None: as in training.
        original: use the names of the architecture's published checkpoints, where transformers uses other ones; a file
            then holds entire layers.
    Returns: the weight files that this rank wrote.
    Raises: on all ranks what failed on one of them.
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
        with checkpoint.raise_on_all_ranks(runtime):
            if runtime.is_main:
                adapter_saving.save(lm, folder, weights)
        return []
    held = dtype or backend.config.model.dtype
    with checkpoint.raise_on_all_ranks(runtime):
        if runtime.is_main:  # everything but the weights; it would remove files that look like weights
            adapter_saving.save(lm, folder, {}, held)
    # published files may merge several weights of a layer into one
    groups = _by_layer(tensors) if original else None
    publish = functools.partial(adapter_saving.as_published, lm) if original else None
    sizes = _sizes(tensors, held)
    written, where = _save_tensors(backend, folder, "model", sizes, gather, max_shard_mb, groups, publish)
    if len(set(where.values())) > 1:
        with checkpoint.raise_on_all_ranks(runtime):
            if runtime.is_main:
                index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
                (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return written


def save_frozen(
    backend: Backend, folder: Path, stem: str, weights: Mapping[str, torch.Tensor], max_shard_mb: float
) -> list[Path]:
    """Write weights that are not the policy's, such as those of a moving reference. As `save_model`."""
    sizes = _sizes(weights, backend.config.model.dtype)
    return _save_tensors(backend, folder, stem, sizes, lambda name: backend.full_tensor(weights[name]), max_shard_mb)[0]


def load_frozen(backend: Backend, folder: Path, stem: str, weights: Mapping[str, nn.Parameter]) -> None:
    """Load what `save_frozen` wrote; called on all ranks.

    Raises: TrainError for files that lack a weight or hold an unknown one.
    """
    from safetensors import safe_open

    files = sorted(folder.glob(f"{stem}*.safetensors"))
    held = {name for path in files for name in weight_files.weight_names(path, str(folder))}
    wrong = min(held ^ weights.keys(), default=None)
    if wrong is not None:
        what = "lacks" if wrong in weights else "holds an unknown"
        raise TrainError(
            f"{folder}: {stem} {what} {wrong}; delete this checkpoint, and the run resumes from the one before"
        )
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
    """(files that this rank wrote, the file of each tensor).

    Args: sizes: in bytes. groups: names that share a file. publish: converts the tensors of a file before writing.
    """
    groups = groups or {name: [name] for name in sizes}
    group_sizes = {group: sum(sizes[name] for name in names) for group, names in groups.items()}
    runs = [[name for group in run for name in groups[group]] for run in cut(group_sizes, int(max_shard_mb * 1e6))]
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
    """Write the optimizer state, by the index of the parameter. As `save_model`."""
    state = backend.optimizer_state()
    sizes = {number: _STATE_BYTES * sharding.numel(p) for number, p in enumerate(backend.trained_parameters())}
    runs = cut(sizes, int(max_shard_mb * 1e6))

    def save(number: int, values: dict[int, dict[str, Any]]) -> Path:
        path = folder / _file("optimizer", number, len(runs))
        checkpoint.save_optimizer({index: entries for index, entries in values.items() if entries}, path)
        return path

    return write(backend.runtime, runs, state, save)


def _sizes(tensors: Mapping[str, torch.Tensor], dtype: str) -> dict[str, int]:
    """Bytes of each tensor in a dtype."""
    return {name: getattr(torch, dtype).itemsize * sharding.numel(value) for name, value in tensors.items()}


def _by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by layer: the part of a name up to its first number. A name without a number is its own group."""
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = re.match(r".*?\.\d+(?=\.)", name)
        groups.setdefault(layer[0] if layer else name, []).append(name)
    return groups


def cut(sizes: Mapping[_Name, int], limit: int) -> list[list[_Name]]:
    """Split names, in their order, into files of at most `limit` bytes; a larger tensor is a file of its own."""
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
    ranks: Ranks,
    runs: Sequence[Sequence[_Name]],
    gather: Callable[[_Name], Any],
    save: Callable[[int, dict[_Name, Any]], Path],
) -> list[Path]:
    """Write one file per run of names; called on all ranks. Returns: the files that this rank wrote.

    Args: gather: the full value of a name, called on all ranks. save: writes the file with an index, on one rank.
    Raises: on all ranks what failed on one of them; until the end that rank takes part in gathering.
    """
    written: list[Path] = []
    failure: Exception | None = None
    for first in range(0, len(runs), ranks.world):
        values: dict[_Name, Any] = {}
        own = first + ranks.rank
        for number in range(first, min(first + ranks.world, len(runs))):
            for name in runs[number]:
                value = gather(name)
                if number == own and failure is None:
                    values[name] = _in_host(value)
        if own < len(runs) and failure is None:
            try:
                written.append(save(own, values))
            except Exception as error:
                failure = error
    with checkpoint.raise_on_all_ranks(ranks):
        if failure is not None:
            raise failure
    return written


def _file(stem: str, number: int, of: int) -> str:
    """The name of a file, as transformers names the files of a model."""
    return f"{stem}.safetensors" if of == 1 else f"{stem}-{number + 1:05d}-of-{of:05d}.safetensors"


def _in_host(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _in_host(member) for name, member in value.items()}
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value
