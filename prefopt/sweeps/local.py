"""The local launcher: runs of a sweep as processes of this machine, one per slot, each with its own cores and GPUs."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.errors import ConfigError
from prefopt.sweeps.manifest import RunStates, SweepRun
from prefopt.training.signals import EXIT_UNFINISHED, FOLLOW, SAVE_SIGNALS, handles_signals

_POLL_CHILDREN = 0.1  # seconds between checks whether a child has ended
_POLL_RUNS = 1.0  # seconds between checks of all runs while no child ends
_MOST_ATTEMPTS = 3  # in a row that exit unfinished without having saved anything


@dataclass(frozen=True)
class Slot:
    """One run's part of the machine: CPU cores, and GPUs by their numbers."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """Environment variables of a run in this slot; an OMP_NUM_THREADS of the user is an upper limit."""
        own = os.environ.get("OMP_NUM_THREADS", "")
        threads = min(len(self.cores), int(own)) if own.isdigit() and int(own) else len(self.cores)
        return {"OMP_NUM_THREADS": str(threads)} | ({"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {})


def slots_of(count: int | None, gpus_per_run: int, cores: Sequence[int], gpus: Sequence[str]) -> list[Slot]:
    """Partition the machine into slots; with more slots than cores or GPU groups, slots share them.

    Args: count: number of slots. None: one per `gpus_per_run` GPUs, or one without GPUs.
    Raises: ConfigError where a run would need more GPUs than the machine has.
    """
    if gpus and gpus_per_run > len(gpus):
        raise ConfigError(f"--gpus_per_run: found {gpus_per_run}, but this machine has {len(gpus)} GPUs")
    groups = len(gpus) // gpus_per_run
    count = count or groups or 1

    def cores_of(number: int) -> tuple[int, ...]:
        own = tuple(cores[len(cores) * number // count : len(cores) * (number + 1) // count])
        return own or (cores[number % len(cores)],)

    def gpus_of(number: int) -> tuple[str, ...]:
        first = number % groups * gpus_per_run if groups else 0
        return tuple(gpus[first : first + gpus_per_run]) if groups else ()

    return [Slot(cores_of(number), gpus_of(number)) for number in range(count)]


def machine() -> tuple[list[int], list[str]]:
    """(CPU cores, GPU numbers) that this process may use."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return cores, [gpu for gpu in named.split(",") if gpu]
    if shutil.which("nvidia-smi") is None:
        return cores, []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return cores, subprocess.run(query, capture_output=True, text=True).stdout.split()


def train_command(launcher: Sequence[str], run: SweepRun) -> list[str]:
    """The command line of a run. Args: launcher: such as `torchrun --nproc_per_node 2`; empty: Python."""
    return [*(launcher or [sys.executable]), "-m", "prefopt", "train", *run.argv]


def environment() -> dict[str, str]:
    """The environment of this process, with the package on PYTHONPATH."""
    found = [str(Path(__file__).resolve().parent.parent.parent), os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, found))}


@dataclass
class _Child:
    run: SweepRun
    slot: int
    process: subprocess.Popen[bytes]
    began: float


@dataclass
class Local:
    """The launcher of this machine.

    Args:
        states: stores the attempts of each run.
        slots: parts of the machine, one run in each.
        launcher: command line before `-m prefopt train`; empty: Python.
        plan: returns the runs that are known now; a search adds more as others end.
        log: prints a line.
    """

    states: RunStates
    slots: Sequence[Slot]
    launcher: Sequence[str]
    plan: Callable[[], Sequence[SweepRun]]
    log: Callable[[str], None]
    _children: list[_Child] = field(default_factory=list)
    _unsaved_attempts: dict[str, int] = field(default_factory=dict)
    _waiting: set[str] = field(default_factory=set)
    _stop_requested: bool = False

    def show(self, runs: Sequence[SweepRun]) -> None:
        """Print the commands that would be started."""
        for run in runs:
            after = f" (after {', '.join(run.after)})" if run.after else ""
            command = shlex.join(train_command(self.launcher, run))
            self.log(f"{self.states.state(run, {})}: {run.id}{after}: {command}")

    def run(self) -> int:
        """Start every run that is not done, and wait for all.

        Returns: 0 when all runs are done, 1 when some have failed, 75 after a signal that requests a stop.
        """
        numbers = SAVE_SIGNALS if handles_signals() else ()
        before = {number: signal.signal(number, self._stop) for number in numbers}
        try:
            due = 0.0
            while True:
                if self._reap() or time.monotonic() >= due:
                    runs, due = self.plan(), time.monotonic() + _POLL_RUNS
                    self._start_ready(runs)
                if not (self._children or (self._waiting and not self._stop_requested)):
                    break
                time.sleep(_POLL_CHILDREN)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if all(run.done for run in runs):
            return 0
        return EXIT_UNFINISHED if self._stop_requested else 1

    def _stop(self, number: int, frame: Any) -> None:
        """Forward the stop request. A second signal ends this process, and the kernel then signals the runs again."""
        self._stop_requested = True
        signal.signal(number, signal.SIG_DFL)
        for child in self._children:
            child.process.send_signal(signal.SIGTERM)

    def _start_ready(self, runs: Sequence[SweepRun]) -> None:
        busy = {child.run.id for child in self._children}
        free = [number for number in range(len(self.slots)) if number not in {child.slot for child in self._children}]
        if not free:
            return
        done = {run.id for run in runs if run.done}
        self._waiting &= {run.id for run in runs if run.locked}
        for run in runs:
            if self._stop_requested or not free:
                break
            ready = run.id not in done | busy and not self.states.get(run).failed and done.issuperset(run.after)
            if not ready:
                continue
            if run.locked:
                if run.id not in self._waiting:
                    self.log(f"{run.id}: waiting: a process of an earlier attempt still writes to {run.output}")
                self._waiting.add(run.id)
                continue
            self._start(run, free.pop(0))

    def _start(self, run: SweepRun, number: int) -> None:
        log, slot = self.states.begin_attempt(run), self.slots[number]
        with log.open("ab") as file, _on_cores(slot.cores):
            process = subprocess.Popen(
                train_command(self.launcher, run),
                env=environment() | slot.environment() | {FOLLOW: "1"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process only, which forwards it once
            )
        self._children.append(_Child(run, number, process, time.time()))
        if self._stop_requested:  # the signal came while the process was being started
            process.send_signal(signal.SIGTERM)
        self.log(f"{run.id}: started{describe(run)}")

    def _reap(self) -> bool:
        """Record how children ended. Returns: whether any did."""
        ended = [child for child in self._children if child.process.poll() is not None]
        for child in ended:
            self._children.remove(child)
            run, status = child.run, child.process.returncode
            if self._stop_requested and status == -signal.SIGTERM:  # killed before it had installed its handlers
                status = EXIT_UNFINISHED
            error = None
            if status == EXIT_UNFINISHED and not self._stop_requested:
                saved = _last_saved(Path(run.output)) > child.began
                self._unsaved_attempts[run.id] = 0 if saved else self._unsaved_attempts.get(run.id, 0) + 1
                if self._unsaved_attempts[run.id] == _MOST_ATTEMPTS:
                    status, error = 1, f"exited unfinished {_MOST_ATTEMPTS} times in a row without having saved"
            record = self.states.end_attempt(run, status, error)
            if record.failed:
                self.log(f"{run.id}: failed: {record.error} (log: {self.states.log(run)})")
            else:
                self.log(f"{run.id}: {'done' if status == 0 else 'interrupted; the same sweep command resumes it'}")
        return bool(ended)


def describe(run: SweepRun) -> str:
    """The settings that the sweep file gives a run, in parentheses."""
    return " (" + ", ".join(f"{key}={value}" for key, value in run.settings.items()) + ")" if run.settings else ""


def _last_saved(output: Path) -> float:
    """Modification time of the newest checkpoint or file of a round."""
    saved = [*output.glob("checkpoints/step_*"), *output.glob("round_*/**/*.json*")]
    return max((path.stat().st_mtime for path in saved), default=0.0)


@contextlib.contextmanager
def _on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Pin processes that are started inside to these cores, so that they choose their thread counts accordingly."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
