"""The output folder of a run: it must be writable, and only one run at a time may write it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from prefopt.errors import PrefoptError, TrainError
from prefopt.storage import Lock, owner_of
from prefopt.training.launcher import print_rank_0


class OutputLock:
    """A lock that allows one writer per output folder. The kernel releases it when its owner dies.

    The folder itself is locked too, not only the file `.lock` that names the owner, so deleting the file does not admit
    a second writer.

    Args: part: name of a part of the work, if several processes write different files of the folder; they share the
        folder with each other and with no other run.
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
                taken = _take_with_retries(lock)
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


def _take_with_retries(lock: Lock) -> bool:
    """Try to take the lock for half a second, because a process that checks the lock holds it for a moment.

    A job that Slurm has requeued tries for ten minutes: processes of the attempt before may still be exiting on a node.
    """
    seconds = 600.0 if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else 0.5
    began, printed = time.monotonic(), False
    while not lock.take():
        waited = time.monotonic() - began
        if waited > seconds:
            return False
        if waited > 1 and not printed:
            print_rank_0(f"{lock.path.parent}: a process of an earlier attempt still writes here; waiting")
            printed = True
        time.sleep(0.05)
    return True


def prepare_output(folder: Path) -> None:
    """Make the output folder and check that it is writable.

    Raises: TrainError naming the part of the path that prevents it.
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
