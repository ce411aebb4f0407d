"""The runs of a sweep: what each is started with, and what has become of it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from prefopt import storage
from prefopt.errors import TrainError
from prefopt.redaction import printable
from prefopt.storage import Damaged, write_sealed, write_whole
from prefopt.training.signals import EXIT_UNFINISHED

State = Literal["pending", "queued", "running", "done", "failed"]


@dataclass(frozen=True)
class SweepRun:
    """One run, a line of the manifest.

    Args:
        id: of the settings alone: the same run has the same id in every sweep, on every machine.
        argv: the flags of `prefopt train`.
        output: its folder.
        after: ids of the runs that must be done before.
        settings: those that the sweep file names, by dotted key.
    """

    id: str
    argv: tuple[str, ...]
    output: str
    after: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether its model is exported, which is the last thing that a run does."""
        return storage.is_there(Path(self.output) / "model" / storage.MANIFEST)

    @property
    def held(self) -> bool:
        """Whether a process writes to its folder now."""
        return storage.is_held(Path(self.output) / ".lock")


def write(path: Path, runs: Iterable[SweepRun]) -> None:
    """Write a manifest, whole or not at all, where it is not there as it would be written."""
    text = "".join(json.dumps(storage.sealed(asdict(run))) + "\n" for run in runs)
    if storage.read_bytes(path) == text.encode():
        return
    write_whole(path, [text])


def read(path: Path) -> list[SweepRun]:
    """The runs of a manifest, in its order. Raises: TrainError for a file that is none."""
    content = storage.read_bytes(path)
    if content is None:
        raise TrainError(f"{path}: No such file or directory; start the sweep first")
    try:
        lines = [
            storage.unseal(json.loads(line), f"{path}:{number}", unsealed=True)
            for number, line in enumerate(content.splitlines(), 1)
        ]
        return [SweepRun(**{**line, "argv": tuple(line["argv"]), "after": tuple(line["after"])}) for line in lines]
    except (ValueError, TypeError, KeyError) as error:
        raise TrainError(f"{path}: not a manifest: {error}; move it away and start the sweep again") from error


@dataclass(frozen=True)
class Record:
    """What a launcher remembers of a run. Whether the run is done, or held, its own folder says.

    Args:
        attempts: how often it was started.
        status: exit status of the last attempt; None while there is none, or it is under way.
        error: last line that a failed attempt wrote.
        job: Slurm's number of the array task that ran the last attempt.
    """

    attempts: int = 0
    status: int | None = None
    error: str | None = None
    job: str | None = None

    @property
    def failed(self) -> bool:
        return self.status not in (None, 0, EXIT_UNFINISHED)


ATTEMPT = "=== attempt "  # begins the line in a log with which an attempt begins


class Ledger:
    """The records of a sweep: a small file for each run, so that array tasks write side by side."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, run: SweepRun) -> Path:
        return self.folder / "state" / f"{run.id}.json"

    def log(self, run: SweepRun) -> Path:
        return self.folder / "logs" / f"{run.id}.log"

    def begin(self, run: SweepRun, job: str | None = None) -> Path:
        """Note that an attempt begins. Returns the log to append to."""
        record = replace(self.get(run), attempts=self.get(run).attempts + 1, status=None, error=None, job=job)
        log = self.log(run)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(f"{ATTEMPT}{record.attempts}, {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n")
        self.put(run, record)
        return log

    def end(self, run: SweepRun, status: int, error: str | None = None) -> Record:
        """Note how an attempt ended. Args: status: as `subprocess` gives it, minus a signal's number."""
        if status not in (0, EXIT_UNFINISHED) and error is None:
            killed = f"killed by {signal.Signals(-status).name}" if status < 0 else None
            error = killed or last_line(self.log(run)) or f"exit status {status}"
        record = replace(self.get(run), status=status, error=None if error is None else printable(error))
        self.put(run, record)
        return record

    def forgive(self, run: SweepRun) -> None:
        """Forget that a run has failed, so that it is started again."""
        record = self.get(run)
        if record.failed:
            self.put(run, replace(record, status=None, error=None))

    def get(self, run: SweepRun) -> Record:
        """What is remembered of a run. Raises: Unreadable; Damaged."""
        path = self._path(run)
        try:
            return Record(**(storage.read_sealed(path, unsealed=True) or {}))
        except (Damaged, TypeError):
            raise Damaged(
                f"{path}: was edited or damaged, so how often the run was tried is not known; delete the file and "
                "start the sweep again: the run continues where it was"
            ) from None

    def put(self, run: SweepRun, record: Record) -> None:
        write_sealed(self._path(run), asdict(record))

    def state(self, run: SweepRun, queue: Mapping[str, str]) -> State:
        """What has become of a run. Args: queue: run -> Slurm's state of it, of the runs that it has."""
        if run.done:
            return "done"
        if run.held:
            return "running"
        if run.id in queue:
            return "running" if queue[run.id] == "RUNNING" else "queued"
        return "failed" if self.get(run).failed else "pending"


class Forgiving(Ledger):
    """The same, as it would be once failed runs are to be started again; nothing is written."""

    def get(self, run: SweepRun) -> Record:
        record = super().get(run)
        return replace(record, status=None, error=None) if record.failed else record


def last_line(log: Path, at_most: int = 400) -> str | None:
    """The line that says why a program ended: the last `error:` line, else the last of all."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 20_000))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return None
    text = text.rpartition(ATTEMPT)[2].partition("\n")[2]
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    found: Sequence[str] = errors or lines
    return printable(found[-1])[:at_most] if found else None
