"""What can be known to go wrong before any model is loaded, on all processes together: one line, and a clean end."""

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
_STATES = {"adamw": 2, "rmsprop": 1, "sgd": 0}  # what an optimizer keeps per weight, in float32


def check(config: RunConfig, runtime: Runtime, output: Path) -> None:
    """All checks that need no model. On every process together.

    Raises: ConfigError, TrainError: the same on each of them.
    """
    if config.train.global_batch < runtime.world:
        raise ConfigError(
            f"train.global_batch: found {config.train.global_batch} with {runtime.world} processes, expected a pair "
            "for each of them at least"
        )
    if runtime.world > 1:
        same_versions(runtime.gather_objects([(_here(runtime), versions(("deepspeed",)))]))
        shared_folder(runtime, output)
    if any(how["device"] == "nvme" for how in runtime.offloaded.values()):
        nvme(runtime)


def _here(runtime: Runtime) -> str:
    return f"process {runtime.rank} on {socket.gethostname()}"


def gpu_memory(device: torch.device) -> int | None:
    """Bytes of a GPU, all of it; None where the device is none."""
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def same_versions(found: list[tuple[str, Mapping[str, str]]]) -> None:
    """Raises: TrainError when two processes run other versions. Args: found: (who, versions) of each process."""
    first, expected = found[0]
    for who, mine in found[1:]:
        for name in _COMPARED:
            if mine.get(name) != expected.get(name):
                raise TrainError(
                    f"launcher: {who} has {name} {mine.get(name)}, {first} has {expected.get(name)}; expected one "
                    "environment on all nodes"
                )


def shared_folder(runtime: Runtime, output: Path) -> None:
    """Raises: TrainError when a process does not see what the first one has written to the output folder."""
    name = runtime.from_main(f".seen-{uuid.uuid4().hex}")
    probe = output / name
    if runtime.is_main:
        probe.touch()
    runtime.wait()
    blind = runtime.gather_objects([] if probe.exists() else [_here(runtime)])
    runtime.wait()
    if runtime.is_main:
        probe.unlink()
    if blind:
        raise TrainError(
            f"--output {output}: {blind[0]} does not see what process 0 has written there; expected a folder that all "
            "nodes share"
        )


def nvme(runtime: Runtime) -> None:
    """Raises: ConfigError where DeepSpeed could not keep on NVMe what it was told to, on any process."""
    wrong = []
    for what, how in runtime.offloaded.items():
        path = how.get("nvme_path")
        if how["device"] == "nvme" and not _can_write(path):
            name = {"optimizer": "OPTIMIZER", "weights": "PARAM"}[what]
            wrong.append(
                f"launcher: {_here(runtime)} was told to keep the {what} in nvme_path '{path}', expected a folder of "
                f"this node that can be written to (ACCELERATE_DEEPSPEED_OFFLOAD_{name}_NVME_PATH where DeepSpeed's "
                'file has "auto")'
            )
    if not wrong and not _has_async_io():
        wrong.append(
            f"launcher: {_here(runtime)} cannot build DeepSpeed's async_io, which NVMe offload needs; install libaio "
            "(apt-get install libaio-dev) and a C++ compiler, or use configs/accelerate/zero3_offload.yaml"
        )
    wrong = runtime.gather_objects(wrong)
    if wrong:
        raise ConfigError(wrong[0])


def _can_write(folder: str | None) -> bool:
    return folder is not None and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def _has_async_io() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))


def room_for_two_models(runtime: Runtime) -> None:
    """Raises: ConfigError where the weights of policy and reference would take each other's place on NVMe."""
    how = runtime.offloaded.get("weights", {"device": "none"})
    if how["device"] == "nvme":
        raise ConfigError(
            "launcher: found weights on nvme, where DeepSpeed has room for one model, and a reference that is a second "
            "one; expected weights on cpu (configs/accelerate/zero3_nvme.yaml), LoRA, or --reference.cache hidden"
        )


def room_for_checkpoints(config: RunConfig, parameters: int, output: Path) -> None:
    """Raises: TrainError when the disk has no room for the checkpoints that are kept, and the exported model.

    Args: parameters: trained ones.
    """
    width = {"float64": 8, "float32": 4, "bfloat16": 2}[config.model.dtype]
    one = parameters * (width + 4 * _STATES.get(config.optim.name, 2))
    there = len(checkpoint.steps(output / "checkpoints"))
    # a new checkpoint is whole before an old one goes
    need = one * max(1, config.train.keep_last + 1 - there) + parameters * width
    free = shutil.disk_usage(output).free
    if free < need:
        raise TrainError(
            f"--output {output}: {need / 1e9:.3g} GB are needed for {config.train.keep_last} checkpoints and the model"
            f", found {free / 1e9:.3g} GB free; free space, keep fewer (--train.keep_last), or choose another --output"
        )
