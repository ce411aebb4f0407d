"""The runtime of a run: its ranks, device and collective operations, as accelerate sets them up."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.errors import PrefoptError, TrainError
from prefopt.training import rendezvous
from prefopt.training.launcher import requested_backend, world_size
from prefopt.training.random_state import preserved_random_state, set_seed
from prefopt.training.signals import Stop

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

# accelerate's names -> ours; of DeepSpeed's stages each has its own
_BACKENDS = {"NO": "single process", "MULTI_CPU": "ddp", "MULTI_GPU": "ddp", "DEEPSPEED": "zero", "FSDP": "fsdp2"}
SHARDING = ("zero3", "fsdp2")  # backends under which a rank holds only a shard of each weight
_PATIENT_TIMEOUT = timedelta(hours=24)


@dataclass
class Runtime:
    """The ranks of this run, as accelerate has joined them, and the collective operations that the loop uses."""

    accelerator: Accelerator
    stop: Stop = field(default_factory=Stop)
    sharding: Any = None  # how ZeRO-3 shards what is loaded, where it does
    _patient: Any = field(default=None, init=False)  # a process group of all ranks with a timeout of hours

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def world(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def backend(self) -> str:
        """The name of the parallel backend: single process, ddp, zero1, zero2, zero3 or fsdp2."""
        name = _BACKENDS[str(self.accelerator.distributed_type.value)]
        return f"zero{self.accelerator.state.deepspeed_plugin.zero_stage}" if name == "zero" else name

    @property
    def offloaded(self) -> dict[str, dict[str, Any]]:
        """What DeepSpeed offloads, optimizer state or weights, and its settings for that."""
        if not self.backend.startswith("zero"):
            return {}
        settings = self.deepspeed_settings["zero_optimization"]
        asked = {"optimizer": settings.get("offload_optimizer"), "weights": settings.get("offload_param")}
        return {what: how for what, how in asked.items() if how and how.get("device", "none") != "none"}

    @property
    def described_backend(self) -> str:
        """The backend's name, and what it offloads."""
        elsewhere = ", ".join(f"{what} on {how['device']}" for what, how in self.offloaded.items())
        return f"{self.backend} ({elsewhere})" if elsewhere else self.backend

    @property
    def deepspeed_settings(self) -> dict[str, Any]:
        """DeepSpeed's settings, with which it will be initialised."""
        settings: dict[str, Any] = self.accelerator.state.deepspeed_plugin.deepspeed_config
        return settings

    @contextlib.contextmanager
    def sharded_loading(self) -> Iterator[None]:
        """While it lasts, ZeRO-3 shards the weights of a model as they are loaded, on all ranks together.

        Outside of it nothing is sharded, because a model that one rank loads alone would wait for the others.
        """
        if self.backend != "zero3" or self.sharding is None:
            yield
            return
        from transformers.integrations import deepspeed as integration

        integration.set_hf_deepspeed_config(self.sharding)
        try:
            yield
        finally:
            integration.unset_hf_deepspeed_config()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over all ranks."""
        if self.world == 1:
            return values
        import torch.distributed as dist

        values = values.to(self.device)
        dist.all_reduce(values)
        return values

    def gather_objects(self, mine: list[Any]) -> list[Any]:
        """The concatenated lists of all ranks, in order of rank, on every rank."""
        if self.world == 1:
            return mine
        import torch.distributed as dist

        parts: list[list[Any]] = [[] for _ in range(self.world)]
        dist.all_gather_object(parts, mine)
        return [item for part in parts for item in part]

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 only; its (small) result or its PrefoptError is broadcast to every rank."""
        result, failure = None, None
        if self.is_main:
            try:
                result = work()
            except PrefoptError as error:
                failure = error
        result, failure = self.from_main((result, failure))
        if failure is not None:
            raise failure
        return result

    def on_main_patiently(self, work: Callable[[], Any]) -> Any:
        """`on_main` for work that may exceed the timeout of collectives, such as sampling. All ranks call it.

        The states of the random generators are restored afterwards.
        """
        if self.world == 1:
            with preserved_random_state():
                return work()
        import torch.distributed as dist

        if self._patient is None:  # gloo, because its timeout is independent of the backend's
            self._patient = dist.new_group(backend="gloo", timeout=_PATIENT_TIMEOUT)
        result, failure = None, None
        if self.is_main:
            try:
                with preserved_random_state():
                    result = work()
            except PrefoptError as error:
                failure = error
        box = [(result, failure)]
        dist.broadcast_object_list(box, src=0, group=self._patient)
        result, failure = box[0]
        if failure is not None:
            raise failure
        return result

    def on_main_first(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0, then on the other ranks, which find its files on disk.

        A PrefoptError on rank 0 is raised on every rank, so that none waits for ever.
        """
        if self.world == 1:
            return work()
        mine: list[Any] = []
        self.on_main(lambda: mine.append(work()))
        return mine[0] if self.is_main else work()


def start(
    stop: Stop,
    *,
    seed: int,
    mixed_precision: str,
    deterministic: bool,
    trackers: tuple[str, ...],
    output: Path,
    rendezvous_timeout: float,
    patience: timedelta | None = None,
) -> Runtime:
    """Join the ranks that a launcher started, or run as a single process; then seed the random generators.

    Args:
        rendezvous_timeout: how long processes wait for each other here.
        patience: how long they do later; None: as long as torch would.
    Raises: RendezvousError if they do not come together; TrainError if the launcher promised more processes than
        accelerate joined, or another backend.
    """
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    # with it accelerate would divide every gradient; the loop accumulates by itself
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    promised = world_size()
    on_cpu = not torch.cuda.is_available()
    wanted = requested_backend()
    joined: dict[str, Any] = {"init_method": rendezvous.init_method(rendezvous_timeout)}
    if patience is not None:
        joined["timeout"] = patience
    if on_cpu and wanted == "zero":
        _deepspeed_on_cpu()
        joined["backend"] = "gloo"
    if on_cpu and wanted == "fsdp2":
        _fsdp2_on_cpu(joined)
    accelerator = Accelerator(
        # under DDP it joins gloo ranks; under DeepSpeed and FSDP2 it would silently drop the backend
        cpu=on_cpu and wanted == "ddp",
        mixed_precision=mixed_precision,
        log_with=list(trackers) or None,
        project_dir=str(output),
        # buffers are constants (rotary frequencies) and need not be broadcast in each forward pass
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(**joined),
        ],
    )
    if mixed_precision == "fp16" and accelerator.scaler is None:
        # accelerate sets neither on a CPU, and would silently train in float32
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler(accelerator.device.type)
    if accelerator.num_processes != promised:
        raise TrainError(
            f"launcher: {promised} ranks were launched but {accelerator.num_processes} joined "
            f"({accelerator.distributed_type}); for ranks on a CPU use --config_file configs/accelerate/cpu.yaml"
        )
    found = _BACKENDS.get(str(accelerator.distributed_type.value))
    if found is None:
        raise TrainError(
            f"launcher: backend {accelerator.distributed_type.value} is not supported, expected a single process, DDP, "
            "DeepSpeed or FSDP2; use one of configs/accelerate/*.yaml"
        )
    if wanted != "ddp" and found != wanted:
        asked = {"zero": "DeepSpeed", "fsdp2": "FSDP2"}[wanted]
        raise TrainError(
            f"launcher: {asked} was requested, but the backend is {found}; launch several ranks with "
            f"accelerate launch --config_file configs/accelerate/{'zero3' if wanted == 'zero' else 'fsdp2'}.yaml"
        )
    if found == "fsdp2" and not accelerator.is_fsdp2:
        raise TrainError(
            "launcher: FSDP version 1 was requested, expected fsdp_version 2; "
            "use --config_file configs/accelerate/fsdp2.yaml"
        )
    sharding = None
    if found == "zero":
        # raised by DeepSpeed's collectives, hundreds of times per step
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor`", FutureWarning)
        sharding = getattr(accelerator.state.deepspeed_plugin, "dschf", None)
        _stop_sharding()
    set_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return Runtime(accelerator, stop, sharding)


def _deepspeed_on_cpu() -> None:
    """Prepare DeepSpeed for CPU ranks: without its shared-memory kernel, which takes minutes to compile."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _stop_sharding() -> None:
    from transformers.integrations import deepspeed as integration

    integration.unset_hf_deepspeed_config()


def _fsdp2_on_cpu(joined: dict[str, Any]) -> None:
    """Join gloo ranks so that accelerate treats them as GPUs: it has no FSDP2 on CPUs, but torch has."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    state: Any = PartialState(backend="gloo", **joined)
    state.distributed_type, state.device = DistributedType.MULTI_GPU, torch.device("cpu")


def silence_deepspeed() -> None:
    """Suppress DeepSpeed's warning on machines without a GPU, where other libraries import it."""
    about = "Setting accelerator to CPU"
    logging.getLogger("DeepSpeed").addFilter(lambda record: not str(record.msg).startswith(about))


def set_threads(threads: int | None, parameters: int) -> int:
    """Set the number of CPU threads per rank and return it.

    It is the setting, else OMP_NUM_THREADS (which torchrun sets to 1 for several ranks), else a default by the size of
    the model.
    """
    import torch

    small_model = 3_000_000  # below it, synchronising threads costs more than parallel work saves
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list has one number per nesting level
    if threads is None and asked.isdigit() and int(asked) > 0:
        threads = int(asked)
    if threads is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        given = os.environ.get("SLURM_CPUS_PER_TASK", "")  # a task may see only its own cores, or all of the node
        mine = min(cores, int(given)) if given.isdigit() else cores // processes
        threads = 1 if parameters < small_model else max(1, mine)
    torch.set_num_threads(threads)
    return threads
