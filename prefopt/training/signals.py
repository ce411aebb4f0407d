"""Signals that request a stop: the run saves a checkpoint and exits with a status that means "not finished"."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from pathlib import Path
from typing import Any

from prefopt.training.launcher import rank, world_size

EXIT_UNFINISHED = 75  # EX_TEMPFAIL: saved, not finished, run the same command again
FOLLOW = "PREFOPT_FOLLOW_PARENT"  # set for processes that must not outlive the one that started them
SAVE_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def handles_signals() -> bool:
    """Whether this thread may install signal handlers: Python allows it in the main thread only."""
    return threading.current_thread() is threading.main_thread()


class Stop:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a stop request, which the training loop reads between micro-batches.

    A second signal of the same kind ends the process at once. Before the loop there is nothing to save: a single
    process exits immediately; with several ranks, all wait for the loop, because collectives need every rank.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.in_loop = False
        self._single = True
        self._saved = "nothing to save yet"

    def install(self, world: int) -> None:
        """Install the handlers. Args: world: number of ranks."""
        self._single = world == 1
        if not handles_signals():
            return
        for number in SAVE_SIGNALS:
            signal.signal(number, self._handle)
        _follow_launcher()

    def exit_at_once(self) -> None:
        """From here on all results are in files that are complete or absent, so a signal ends each process at once."""
        self.in_loop, self._single, self._saved = False, True, "all that is finished is saved"
        if self.requested is not None:
            raise SystemExit(EXIT_UNFINISHED)

    def coordinate_exit(self) -> None:
        """From here on ranks depend on each other again, and exit together in the loop."""
        self._single = world_size() == 1

    def ignore_late_signal(self) -> None:
        """Ignore SIGUSR1 when all work is done, so that a late warning of the time limit does not fail the run.

        Python restores the default handlers before it exits, and the default of SIGUSR1 is to kill.
        """
        if handles_signals():
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _handle(self, number: int, _frame: Any) -> None:
        self.requested = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
        if self._single and not self.in_loop:
            _write_at_once(f"{self._saved}, leaving with exit status {EXIT_UNFINISHED}", self.requested)
            raise SystemExit(EXIT_UNFINISHED)
        _write_at_once(
            f"saving, then leaving with exit status {EXIT_UNFINISHED}; again to leave at once", self.requested
        )


def _write_at_once(text: str, name: str) -> None:
    """Write from a signal handler, which may interrupt a print: a nested print would raise."""
    if rank() == 0:
        with contextlib.suppress(OSError):
            os.write(1, f"\n{name}: {text}\n".encode())


def _follow_launcher() -> None:
    """Ask the kernel for SIGTERM when a launcher that does not forward signals dies, so that no orphan keeps training.

    Only under a launcher: a run started from a shell may outlive its terminal, as its user intends.
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
