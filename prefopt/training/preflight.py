"""Checks that all ranks make together before any model is loaded; each failure is one line and ends the run cleanly."""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.errors import ConfigError, TrainError
from prefopt.settings import RunConfig
from prefopt.training import checkpoint
from prefopt.training.runtime import Runtime
from prefopt.training.versions import versions

if TYPE_CHECKING:
    import torch

_COMPARED = ("python", "prefopt", "torch", "transformers", "accelerate", "peft", "deepspeed")
_STATES = {"adamw": 2, "rmsprop": 1, "sgd": 0}  # float32 values of optimizer state per trained weight


def check(config: RunConfig, runtime: Runtime, output: Path) -> None:
    """Make all checks that need no model. All ranks must call it together.

    Raises: ConfigError or TrainError, the same one on every rank.
    """
    if config.train.global_batch < runtime.world:
        raise ConfigError(
            f"train.global_batch: found {config.train.global_batch} with {runtime.world} ranks, expected at least one "
            "pair per rank"
        )
    if runtime.world > 1:
        check_same_versions(runtime.gather_objects([(_rank_name(runtime), versions(("deepspeed",)))]))
        check_shared_folder(runtime, output)
    if any(how["device"] == "nvme" for how in runtime.offloaded.values()):
        check_nvme(runtime)


def _rank_name(runtime: Runtime) -> str:
    return f"rank {runtime.rank} on {socket.gethostname()}"


def gpu_memory(device: torch.device) -> int | None:
    """Total memory of a GPU in bytes; None for a device that is not a GPU."""
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def check_same_versions(found: list[tuple[str, Mapping[str, str]]]) -> None:
    """Raises: TrainError when two ranks run different versions. Args: found: (name, versions) of each rank."""
    first, expected = found[0]
    for who, mine in found[1:]:
        for name in _COMPARED:
            if mine.get(name) != expected.get(name):
                raise TrainError(
                    f"launcher: {who} has {name} {mine.get(name)}, {first} has {expected.get(name)}; expected one "
                    "environment on all nodes"
                )


def check_shared_folder(runtime: Runtime, output: Path) -> None:
    """Raises: TrainError when a rank does not see a file that rank 0 has written to the output folder."""
    name = runtime.from_main(f".seen-{uuid.uuid4().hex}")
    probe = output / name
    if runtime.is_main:
        probe.touch()
    runtime.wait()
    missing_on = runtime.gather_objects([] if probe.exists() else [_rank_name(runtime)])
    runtime.wait()
    if runtime.is_main:
        probe.unlink()
    if missing_on:
        raise TrainError(
            f"--output {output}: {missing_on[0]} does not see what rank 0 has written there; expected a folder that "
            "all nodes share"
        )


def check_nvme(runtime: Runtime) -> None:
    """Raises: ConfigError when DeepSpeed cannot offload to the NVMe path of its settings on some rank."""
    wrong = []
    for what, how in runtime.offloaded.items():
        path = how.get("nvme_path")
        if how["device"] == "nvme" and not _can_write(path):
            name = {"optimizer": "OPTIMIZER", "weights": "PARAM"}[what]
            wrong.append(
                f"launcher: {_rank_name(runtime)} offloads the {what} to nvme_path '{path}', expected a writable "
                f"folder on this node (ACCELERATE_DEEPSPEED_OFFLOAD_{name}_NVME_PATH where DeepSpeed's file has "
                '"auto")'
            )
    if not wrong and not _has_async_io():
        wrong.append(
            f"launcher: {_rank_name(runtime)} cannot build DeepSpeed's async_io, which NVMe offload needs; install "
            "libaio (apt-get install libaio-dev) and a C++ compiler, or use configs/accelerate/zero3_offload.yaml"
        )
    wrong = runtime.gather_objects(wrong)
    if wrong:
        raise ConfigError(wrong[0])


def _can_write(folder: str | None) -> bool:
    return folder is not None and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def _has_async_io() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))


def check_nvme_holds_one_model(runtime: Runtime) -> None:
    """Raises: ConfigError when weights are offloaded to NVMe, where a second model would overwrite the first."""
    how = runtime.offloaded.get("weights", {"device": "none"})
    if how["device"] == "nvme":
        raise ConfigError(
            "launcher: found weights offloaded to nvme, where DeepSpeed supports one model only, and the reference is "
            "a second one; expected weights on cpu (configs/accelerate/zero3_nvme.yaml), LoRA, or --reference.cache "
            "hidden"
        )


def check_disk_space(config: RunConfig, parameters: int, output: Path) -> None:
    """Raises: TrainError when the disk lacks space for the checkpoints that are kept and for the exported model.

    Args: parameters: number of trained parameters.
    """
    width = {"float64": 8, "float32": 4, "bfloat16": 2}[config.model.dtype]
    one = parameters * (width + 4 * _STATES.get(config.optim.name, 2))
    existing = len(checkpoint.steps(output / "checkpoints"))
    # a new checkpoint is complete before an old one is deleted, so one more than keep_last exists for a moment
    need = one * max(1, config.train.keep_last + 1 - existing) + parameters * width
    free = shutil.disk_usage(output).free
    if free < need:
        raise TrainError(
            f"--output {output}: {need / 1e9:.3g} GB are needed for {config.train.keep_last} checkpoints and the model"
            f", found {free / 1e9:.3g} GB free; free space, keep fewer (--train.keep_last), or choose another --output"
        )
