"""Runs of a sweep in processes on this machine, as many at a time as there are slots, each with its share of it."""

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
from prefopt.sweeps.manifest import Ledger, SweepRun
from prefopt.training.signals import EXIT_UNFINISHED, FOLLOW, SAVE_SIGNALS, handles_signals

_PAUSE = 0.1  # seconds between looks at the children
_LOOK = 1.0  # seconds between looks at all runs where no child has ended
_STRIKES = 3  # attempts in a row that leave unfinished and have saved nothing


@dataclass(frozen=True)
class Slot:
    """A share of the machine: cores, and GPUs by their numbers; none where there are none."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        own = os.environ.get("OMP_NUM_THREADS", "")
        threads = min(len(self.cores), int(own)) if own.isdigit() and int(own) else len(self.cores)
        return {"OMP_NUM_THREADS": str(threads)} | ({"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {})


def slots_of(count: int | None, gpus_per_run: int, cores: Sequence[int], gpus: Sequence[str]) -> list[Slot]:
    """Deal the machine. Without GPUs a slot has its share of the cores; with more slots than either, slots share.

    Args: count: slots; None: one for each `gpus_per_run` GPUs, or one.
    Raises: ConfigError where a run would have more GPUs than there are.
    """
    if gpus and gpus_per_run > len(gpus):
        raise ConfigError(f"--gpus_per_run: found {gpus_per_run}, but there are {len(gpus)} GPUs here")
    groups = len(gpus) // gpus_per_run
    count = count or groups or 1

    def share(number: int) -> tuple[int, ...]:
        dealt = tuple(cores[len(cores) * number // count : len(cores) * (number + 1) // count])
        return dealt or (cores[number % len(cores)],)

    def group(number: int) -> tuple[str, ...]:
        first = number % groups * gpus_per_run if groups else 0
        return tuple(gpus[first : first + gpus_per_run]) if groups else ()

    return [Slot(share(number), group(number)) for number in range(count)]


def machine() -> tuple[list[int], list[str]]:
    """(cores, GPUs) that this process may use."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return cores, [gpu for gpu in named.split(",") if gpu]
    if shutil.which("nvidia-smi") is None:
        return cores, []
    asked = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return cores, subprocess.run(asked, capture_output=True, text=True).stdout.split()


def train_command(launcher: Sequence[str], run: SweepRun) -> list[str]:
    """What starts a run. Args: launcher: such as `torchrun --nproc_per_node 2`; nothing: Python."""
    return [*(launcher or [sys.executable]), "-m", "prefopt", "train", *run.argv]


def environment() -> dict[str, str]:
    """This one, where the package is found by the processes started in it."""
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
    """The launcher.

    Args:
        ledger: remembers what became of each run.
        slots: shares of the machine.
        launcher: words before `-m prefopt train`; none: Python.
        plan: the runs as they are known now; more may follow as others end.
        say: prints a line.
    """

    ledger: Ledger
    slots: Sequence[Slot]
    launcher: Sequence[str]
    plan: Callable[[], Sequence[SweepRun]]
    say: Callable[[str], None]
    _children: list[_Child] = field(default_factory=list)
    _strikes: dict[str, int] = field(default_factory=dict)
    _waiting: set[str] = field(default_factory=set)
    _asked: bool = False

    def show(self, runs: Sequence[SweepRun]) -> None:
        """Say what would be started."""
        for run in runs:
            after = f" (after {', '.join(run.after)})" if run.after else ""
            command = shlex.join(train_command(self.launcher, run))
            self.say(f"{self.ledger.state(run, {})}: {run.id}{after}: {command}")

    def run(self) -> int:
        """Start what is not done until nothing is left to start.

        Returns: 0 when all runs are done, 1 when some have failed, 75 after a signal that asks to save and leave.
        """
        numbers = SAVE_SIGNALS if handles_signals() else ()
        before = {number: signal.signal(number, self._stop) for number in numbers}
        try:
            due = 0.0
            while True:
                if self._reap() or time.monotonic() >= due:
                    runs, due = self.plan(), time.monotonic() + _LOOK
                    self._start_ready(runs)
                if not (self._children or (self._waiting and not self._asked)):
                    break
                time.sleep(_PAUSE)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if all(run.done for run in runs):
            return 0
        return EXIT_UNFINISHED if self._asked else 1

    def _stop(self, number: int, frame: Any) -> None:
        """Pass the wish on; a second signal ends this process, and the kernel then asks the runs once more."""
        self._asked = True
        signal.signal(number, signal.SIG_DFL)
        for child in self._children:
            child.process.send_signal(signal.SIGTERM)

    def _start_ready(self, runs: Sequence[SweepRun]) -> None:
        busy = {child.run.id for child in self._children}
        free = [number for number in range(len(self.slots)) if number not in {child.slot for child in self._children}]
        if not free:
            return
        done = {run.id for run in runs if run.done}
        self._waiting &= {run.id for run in runs if run.held}
        for run in runs:
            if self._asked or not free:
                break
            ready = run.id not in done | busy and not self.ledger.get(run).failed and done.issuperset(run.after)
            if not ready:
                continue
            if run.held:
                if run.id not in self._waiting:
                    self.say(f"{run.id}: a process of an earlier attempt still writes to {run.output}; waiting")
                self._waiting.add(run.id)
                continue
            self._start(run, free.pop(0))

    def _start(self, run: SweepRun, number: int) -> None:
        log, slot = self.ledger.begin(run), self.slots[number]
        with log.open("ab") as file, _on_cores(slot.cores):
            process = subprocess.Popen(
                train_command(self.launcher, run),
                env=environment() | slot.environment() | {FOLLOW: "1"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
            )
        self._children.append(_Child(run, number, process, time.time()))
        if self._asked:  # the signal came while it was started
            process.send_signal(signal.SIGTERM)
        self.say(f"{run.id}: started{describe(run)}")

    def _reap(self) -> bool:
        """Note how children ended. Returns: whether any did."""
        ended = [child for child in self._children if child.process.poll() is not None]
        for child in ended:
            self._children.remove(child)
            run, status = child.run, child.process.returncode
            if self._asked and status == -signal.SIGTERM:  # before Python had learned what to do at a signal
                status = EXIT_UNFINISHED
            error = None
            if status == EXIT_UNFINISHED and not self._asked:
                saved = _newest(Path(run.output)) > child.began
                self._strikes[run.id] = 0 if saved else self._strikes.get(run.id, 0) + 1
                if self._strikes[run.id] == _STRIKES:
                    status, error = 1, f"left unfinished {_STRIKES} times in a row, and saved nothing"
            record = self.ledger.end(run, status, error)
            if record.failed:
                self.say(f"{run.id}: failed: {record.error} (log: {self.ledger.log(run)})")
            else:
                self.say(f"{run.id}: {'done' if status == 0 else 'left unfinished, it is to be continued'}")
        return bool(ended)


def describe(run: SweepRun) -> str:
    """The settings that the sweep file names, for a line about a run."""
    return " (" + ", ".join(f"{key}={value}" for key, value in run.settings.items()) + ")" if run.settings else ""


def _newest(output: Path) -> float:
    """When something was saved last: a checkpoint, or a file of a round."""
    saved = [*output.glob("checkpoints/step_*"), *output.glob("round_*/**/*.json*")]
    return max((path.stat().st_mtime for path in saved), default=0.0)


@contextlib.contextmanager
def _on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Processes that are started here may use these cores only, so that they count and bind their threads right."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
