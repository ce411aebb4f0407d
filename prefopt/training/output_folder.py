"""The output folder of a run: it can be written, and one run at a time writes it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from prefopt.errors import PrefoptError, TrainError
from prefopt.storage import Lock, owner_of
from prefopt.training.launcher import print_rank_0


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
            print_rank_0(f"{lock.path.parent}: a process of an earlier attempt still writes here; waiting")
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
