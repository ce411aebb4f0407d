"""Where a run runs: processes, device, threads, seeds, signals, the lock of the output folder."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import random
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.errors import PrefoptError, RendezvousError, TrainError, did_you_mean
from prefopt.redaction import printable
from prefopt.storage import Lock, owner_of
from prefopt.training import rendezvous

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

EXIT_UNFINISHED = 75  # EX_TEMPFAIL: saved, not finished, run the same command again
# accelerate's names -> ours; of DeepSpeed's stages each has its own
_BACKENDS = {"NO": "single process", "MULTI_CPU": "ddp", "MULTI_GPU": "ddp", "DEEPSPEED": "zero", "FSDP": "fsdp2"}
SHARDING = ("zero3", "fsdp2")  # those under which a process holds a part of each weight only
FOLLOW = "PREFOPT_FOLLOW_PARENT"  # set for processes that must not outlive the one that started them
_PATIENCE = timedelta(hours=24)
SPEAKS_WITHIN = 2.0  # seconds that the first process has for its line before another one ends
SAVE_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def rank() -> int:
    """This process's number among all, known before any library is loaded."""
    return _whole("RANK", 0)


def say(text: str) -> None:
    """Print on rank 0 only, without secrets and control characters; the text may have several lines."""
    if rank() == 0:
        print(printable(text, lines=True), flush=True)


def handles_signals() -> bool:
    """Whether this thread may install handlers of signals; in a program that calls a command from another, none is."""
    return threading.current_thread() is threading.main_thread()


class Stop:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a wish to save and leave, which the loop reads between micro-batches.

    A second signal of the same kind is not held back: it ends the process at once. Before the loop there is nothing
    to save: one process leaves where it stands, several wait for the loop, because none may leave the others alone.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.in_loop = False
        self._alone = True
        self._saved = "nothing to save yet"

    def install(self, processes: int) -> None:
        self._alone = processes == 1
        if not handles_signals():
            return
        for number in SAVE_SIGNALS:
            signal.signal(number, self._handle)
        _follow_launcher()

    def enter_files(self) -> None:
        """From here on all that counts is in files that are whole or absent: a signal ends each process where it is."""
        self.in_loop, self._alone, self._saved = False, True, "all that is finished is saved"
        if self.requested is not None:
            raise SystemExit(EXIT_UNFINISHED)

    def leave_files(self) -> None:
        """From here on processes depend on each other again."""
        self._alone = promised_processes() == 1

    def leave_be(self) -> None:
        """All is done: a word that time is nearly over, in the moment before the process ends, makes no failure of it.

        Python gives signals their defaults back before it ends, and the default of SIGUSR1 is to kill.
        """
        if handles_signals():
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _handle(self, number: int, _frame: Any) -> None:
        self.requested = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
        if self._alone and not self.in_loop:
            _say_at_once(f"{self._saved}, leaving with exit status {EXIT_UNFINISHED}", self.requested)
            raise SystemExit(EXIT_UNFINISHED)
        _say_at_once(f"saving, then leaving with exit status {EXIT_UNFINISHED}; again to leave at once", self.requested)


def _say_at_once(text: str, name: str) -> None:
    """Say it from a signal handler, which may have come in the middle of a print: a second one would be refused."""
    if rank() == 0:
        with contextlib.suppress(OSError):
            os.write(1, f"\n{name}: {text}\n".encode())


def _follow_launcher() -> None:
    """Ask the kernel for SIGTERM when a launcher that does not pass signals on dies, so that no orphan trains on.

    Only under a launcher: a run started by a shell outlives its terminal as its user intends.
    """
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        return
    launchers = (b"accelerate", b"torchrun", b"torch.distributed", b"elastic")
    if FOLLOW in os.environ or any(word in command for word in launchers):
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:  # it died between the two calls
            os.kill(os.getpid(), signal.SIGTERM)


class OutputLock:
    """One writer per output folder. The kernel frees the lock when its owner dies, however it dies.

    The folder is locked beside the file `.lock`, which says who it is: deleting the file lets no second writer in.

    Args: part: of the work, where several processes write to different files of the folder: they share the folder with
        each other and with nobody else.
    """

    def __init__(self, folder: Path, part: str = "") -> None:
        self._folder = folder
        self._locks = [Lock(folder / ".lock", shared=bool(part), folder=True)]
        if part:
            self._locks.append(Lock(folder / f".lock{part}"))

    def acquire(self) -> None:
        """Raises: TrainError naming the process that holds the folder."""
        for lock in self._locks:
            try:
                taken = _taken(lock)
            except PrefoptError as error:
                self.release()
                raise TrainError(str(error)) from error
            if not taken:
                self.release()
                owner = owner_of(lock.path)
                name = "unknown" if owner is None else f"process {owner[0]} on {owner[1]}"
                raise TrainError(
                    f"{self._folder}: another run is writing here ({name}); wait for it, stop it, "
                    "or choose another --output"
                )

    def release(self) -> None:
        for lock in self._locks:
            lock.release()


def _taken(lock: Lock) -> bool:
    """Try to lock, for a moment, since who looks whether it is locked holds it for as long.

    A job that Slurm has put back into its queue tries for longer: where it gave a node up, the processes of the attempt
    before may still have to notice.
    """
    seconds = 600.0 if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else 0.5
    began, said = time.monotonic(), False
    while not lock.take():
        waited = time.monotonic() - began
        if waited > seconds:
            return False
        if waited > 1 and not said:
            say(f"{lock.path.parent}: a process of an earlier attempt still writes here; waiting")
            said = True
        time.sleep(0.05)
    return True


def prepare_output(folder: Path) -> None:
    """Make the output folder and prove that it can be written.

    Raises: TrainError naming the part of the path that is in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        blocker = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
        found = f"'{blocker}' is a file" if blocker else str(error.strerror)
        raise TrainError(f"--output {folder}: {found}; expected a folder that can be written") from error


@dataclass
class Runtime:
    """The processes of this run, as accelerate sees them, and the few collective words that the loop speaks."""

    accelerator: Accelerator
    stop: Stop = field(default_factory=Stop)
    sharding: Any = None  # how ZeRO-3 shards what is loaded, where it does
    _patient: Any = field(default=None, init=False)  # a group of all processes that wait for hours

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
        """The name of what joins the processes: one process, ddp, zero1, zero2, zero3 or fsdp2."""
        name = _BACKENDS[str(self.accelerator.distributed_type.value)]
        return f"zero{self.accelerator.state.deepspeed_plugin.zero_stage}" if name == "zero" else name

    @property
    def offloaded(self) -> dict[str, dict[str, Any]]:
        """What DeepSpeed keeps elsewhere than on the device, optimizer or weights, and its settings for that."""
        if not self.backend.startswith("zero"):
            return {}
        settings = self.deepspeed_settings["zero_optimization"]
        asked = {"optimizer": settings.get("offload_optimizer"), "weights": settings.get("offload_param")}
        return {what: how for what, how in asked.items() if how and how.get("device", "none") != "none"}

    @property
    def described_backend(self) -> str:
        """The backend's name, and what it keeps elsewhere."""
        elsewhere = ", ".join(f"{what} on {how['device']}" for what, how in self.offloaded.items())
        return f"{self.backend} ({elsewhere})" if elsewhere else self.backend

    @property
    def deepspeed_settings(self) -> dict[str, Any]:
        """DeepSpeed's settings, as they will be when it is started."""
        settings: dict[str, Any] = self.accelerator.state.deepspeed_plugin.deepspeed_config
        return settings

    @contextlib.contextmanager
    def sharded_loading(self) -> Iterator[None]:
        """While it lasts, ZeRO-3 shards the weights of a model as they are loaded: on all processes together.

        At all other times it must not: what one process loads for itself would wait for the others.
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
        """Sum of a tensor over all processes."""
        if self.world == 1:
            return values
        import torch.distributed as dist

        values = values.to(self.device)
        dist.all_reduce(values)
        return values

    def gather_objects(self, mine: list[Any]) -> list[Any]:
        """The lists of all processes, joined in order of rank, on every process."""
        if self.world == 1:
            return mine
        import torch.distributed as dist

        parts: list[list[Any]] = [[] for _ in range(self.world)]
        dist.all_gather_object(parts, mine)
        return [item for part in parts for item in part]

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on every process."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 alone; its result, which must be small, on every process, or its PrefoptError."""
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

    def on_main_at_length(self, work: Callable[[], Any]) -> Any:
        """`on_main` for work that may take longer than processes usually wait for each other, such as sampling.

        The random generators stand afterwards as they stood before, whatever the work draws. All processes call it.
        """
        if self.world == 1:
            with random_state_kept():
                return work()
        import torch.distributed as dist

        if self._patient is None:  # gloo waits on the CPU, whatever joins the processes otherwise
            self._patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
        result, failure = None, None
        if self.is_main:
            try:
                with random_state_kept():
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
        """Run `work` on rank 0, then on the others, which find what it left on disk.

        A PrefoptError on rank 0 is raised on every process, so that none waits for ever.
        """
        if self.world == 1:
            return work()
        mine: list[Any] = []
        self.on_main(lambda: mine.append(work()))
        return mine[0] if self.is_main else work()


def promised_processes() -> int:
    """How many processes the launcher says there are."""
    return _whole("WORLD_SIZE", 1)


def _whole(name: str, other: int) -> int:
    found = os.environ.get(name, "")
    return int(found) if re.fullmatch("[0-9]{1,9}", found) else other


def check_launcher() -> None:
    """Whether the variables that launchers set are whole. Raises: TrainError naming the variable."""
    without = "(without a launcher such as torchrun leave them all out)"
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        found = os.environ.get(name)
        if found is not None and not re.fullmatch("[0-9]{1,9}", found):
            raise TrainError(f"{name}: found '{found}' in the environment, expected a whole number {without}")
    processes = promised_processes()
    lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if processes > 1 and lacking:
        raise TrainError(
            f"WORLD_SIZE: found {processes} in the environment without {' and '.join(lacking)}, expected all that a "
            f"launcher sets {without}"
        )
    if rank() >= max(processes, 1):
        raise TrainError(f"RANK: found {rank()} of WORLD_SIZE {processes}, expected less {without}")
    if _wanted_backend() == "zero" and "RANK" not in os.environ:
        raise TrainError(
            "launcher: ACCELERATE_USE_DEEPSPEED is in the environment, but no launcher has started this process; start "
            "it with accelerate launch --config_file configs/accelerate/zero2.yaml, or unset the variable"
        )


def start(
    stop: Stop,
    *,
    seed: int,
    mixed_precision: str,
    deterministic: bool,
    trackers: tuple[str, ...],
    output: Path,
    join_seconds: float,
    patience: timedelta | None = None,
) -> Runtime:
    """Join the processes that a launcher started, or be one process; then seed everything.

    Args:
        join_seconds: how long processes wait for each other here.
        patience: how long they do later; None: as long as torch would.
    Raises: RendezvousError if they do not come together; TrainError if the launcher promised more processes than
        accelerate joined, or another backend.
    """
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    # accelerate would divide every gradient by it, whatever it is told; accumulation is the loop's own
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    promised = promised_processes()
    on_cpu = not torch.cuda.is_available()
    wanted = _wanted_backend()
    joined: dict[str, Any] = {"init_method": rendezvous.init_method(join_seconds)}
    if patience is not None:
        joined["timeout"] = patience
    if on_cpu and wanted == "zero":
        _deepspeed_on_cpu()
        joined["backend"] = "gloo"
    if on_cpu and wanted == "fsdp2":
        _fsdp2_on_cpu(joined)
    accelerator = Accelerator(
        # joins gloo ranks; under DeepSpeed and FSDP2 it would drop them without a word
        cpu=on_cpu and wanted == "ddp",
        mixed_precision=mixed_precision,
        log_with=list(trackers) or None,
        project_dir=str(output),
        # a model's buffers are constants here (rotary frequencies): nothing to send with each forward pass
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(**joined),
        ],
    )
    if mixed_precision == "fp16" and accelerator.scaler is None:
        # accelerate leaves a CPU without both, and would train in float32 without a word
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler(accelerator.device.type)
    if accelerator.num_processes != promised:
        raise TrainError(
            f"launcher: {promised} processes were started but {accelerator.num_processes} joined "
            f"({accelerator.distributed_type}); for several CPU processes use --config_file configs/accelerate/cpu.yaml"
        )
    found = _BACKENDS.get(str(accelerator.distributed_type.value))
    if found is None:
        raise TrainError(
            f"launcher: backend {accelerator.distributed_type.value} is not supported, expected one process, DDP, "
            "DeepSpeed or FSDP2; use one of configs/accelerate/*.yaml"
        )
    if wanted != "ddp" and found != wanted:
        asked = {"zero": "DeepSpeed", "fsdp2": "FSDP2"}[wanted]
        raise TrainError(
            f"launcher: {asked} was asked for, but {found} came of it; start several processes with "
            f"accelerate launch --config_file configs/accelerate/{'zero3' if wanted == 'zero' else 'fsdp2'}.yaml"
        )
    if found == "fsdp2" and not accelerator.is_fsdp2:
        raise TrainError(
            "launcher: FSDP of version 1 was asked for, expected fsdp_version 2; "
            "use --config_file configs/accelerate/fsdp2.yaml"
        )
    sharding = None
    if found == "zero":
        # of DeepSpeed's calls, hundreds of times in a step
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor`", FutureWarning)
        sharding = getattr(accelerator.state.deepspeed_plugin, "dschf", None)
        _stop_sharding()
    set_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return Runtime(accelerator, stop, sharding)


def _wanted_backend() -> str:
    """What the launcher asked for, by the variables that accelerate's launcher sets."""

    def on(name: str) -> bool:
        return os.environ.get(name, "false").lower() in ("true", "1", "yes")

    return "zero" if on("ACCELERATE_USE_DEEPSPEED") else "fsdp2" if on("ACCELERATE_USE_FSDP") else "ddp"


def _deepspeed_on_cpu() -> None:
    """Before DeepSpeed joins processes without GPUs: no kernel of its own, which it would compile for minutes."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _stop_sharding() -> None:
    from transformers.integrations import deepspeed as integration

    integration.unset_hf_deepspeed_config()


def _fsdp2_on_cpu(joined: dict[str, Any]) -> None:
    """Join gloo ranks in the way in which accelerate takes them for GPUs: it has no FSDP on CPUs, but torch has."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    state: Any = PartialState(backend="gloo", **joined)
    state.distributed_type, state.device = DistributedType.MULTI_GPU, torch.device("cpu")


def set_seed(seed: int) -> None:
    """Seed every random generator."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def hush_deepspeed() -> None:
    """No word of DeepSpeed on a machine without a GPU, where other libraries import it in runs that do not use it."""
    about = "Setting accelerator to CPU"
    logging.getLogger("DeepSpeed").addFilter(lambda record: not str(record.msg).startswith(about))


def set_threads(threads: int | None, parameters: int) -> int:
    """Set CPU threads per process and return their number.

    It is the setting, else OMP_NUM_THREADS (which torchrun sets to 1 for several ranks), else what is fast for a model
    of this size.
    """
    import torch

    small_model = 3_000_000  # below it, the hand-over between threads costs more than the work it splits
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list is of nested levels
    if threads is None and asked.isdigit() and int(asked) > 0:
        threads = int(asked)
    if threads is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        given = os.environ.get("SLURM_CPUS_PER_TASK", "")  # there a process may see its own cores, or all of its node
        mine = min(cores, int(given)) if given.isdigit() else cores // processes
        threads = 1 if parameters < small_model else max(1, mine)
    torch.set_num_threads(threads)
    return threads


def random_state() -> dict[str, Any]:
    """The state of every random generator, as plain JSON values."""
    import base64

    import numpy
    import torch

    version, keys, gauss = random.getstate()
    numpy_state: Any = numpy.random.get_state(legacy=True)
    _, np_keys, position, has_gauss, cached = numpy_state
    state = {
        "python": [version, list(keys), gauss],
        "numpy": [np_keys.tolist(), position, has_gauss, cached],
        "torch": base64.b64encode(bytes(torch.get_rng_state().tolist())).decode(),
    }
    if torch.cuda.is_available():
        state["cuda"] = [base64.b64encode(bytes(s.tolist())).decode() for s in torch.cuda.get_rng_state_all()]
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Undo `random_state`."""
    import base64

    import numpy
    import torch

    def tensor(text: str) -> torch.Tensor:
        return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)

    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np_keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state(("MT19937", numpy.array(np_keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([tensor(text) for text in state["cuda"]])


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Every random generator stands afterwards as it stood before."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def check_path(key: str, path: str) -> None:
    """Refuse, without any import, a model path that can be neither a folder nor a hub id.

    Raises: TrainError naming `key`.
    """
    folder = Path(path)  # `~` is the shell's to expand
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if folder.is_dir() or not (looks_local or folder.exists()):
        return
    siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    found = "is a file" if folder.is_file() else "does not exist"
    raise TrainError(
        f"{key}: '{path}' {found}, expected the folder of a model or a hub id{did_you_mean(folder.name, siblings)}"
    )


def fail(error: Exception) -> int:
    """Print a user's error as one line on rank 0's stderr, or on each that it keeps apart; returns the exit status."""
    if rank() == 0 or isinstance(error, RendezvousError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:  # launchers end all processes when one has ended, and that must not be before the first one has spoken
        time.sleep(SPEAKS_WITHIN)
    return 2


def versions(extra: tuple[str, ...] = ()) -> dict[str, str]:
    """Versions of what decides a run's numbers, and of the packages in `extra`."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("prefopt", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "numpy", *extra):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
