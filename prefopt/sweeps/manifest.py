"""The runs of a sweep: the arguments of each, and the state of each."""

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
        id: a hash of the settings alone: the same run has the same id in every sweep, on every machine.
        argv: the command-line arguments of `prefopt train`.
        output: its folder.
        after: ids of the runs that must be finished before it starts.
        settings: the settings that the sweep file gives it, by dotted key.
    """

    id: str
    argv: tuple[str, ...]
    output: str
    after: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether its model is exported, which is the last thing a run does."""
        return storage.is_there(Path(self.output) / "model" / storage.MANIFEST)

    @property
    def locked(self) -> bool:
        """Whether a process is writing to its folder now."""
        return storage.is_held(Path(self.output) / ".lock")


def write(path: Path, runs: Iterable[SweepRun]) -> None:
    """Write a manifest atomically, unless the file has this content already."""
    text = "".join(json.dumps(storage.sealed(asdict(run))) + "\n" for run in runs)
    if storage.read_bytes(path) == text.encode():
        return
    write_whole(path, [text])


def read(path: Path) -> list[SweepRun]:
    """The runs of a manifest, in its order. Raises: TrainError for a file that is not a manifest."""
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
class AttemptRecord:
    """What a launcher stores about the attempts of a run. Its own folder shows whether it is done or running.

    Args:
        attempts: number of times it was started.
        status: exit status of the last attempt; None before the first attempt and while one is running.
        error: the error line of a failed attempt.
        job: Slurm's id of the array task that ran the last attempt.
    """

    attempts: int = 0
    status: int | None = None
    error: str | None = None
    job: str | None = None

    @property
    def failed(self) -> bool:
        return self.status not in (None, 0, EXIT_UNFINISHED)


ATTEMPT = "=== attempt "  # the first line of each attempt in a log begins with this


class RunStates:
    """The state of each run of a sweep: one small file per run, so that array tasks can write concurrently."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, run: SweepRun) -> Path:
        return self.folder / "state" / f"{run.id}.json"

    def log(self, run: SweepRun) -> Path:
        return self.folder / "logs" / f"{run.id}.log"

    def begin_attempt(self, run: SweepRun, job: str | None = None) -> Path:
        """Record that an attempt begins. Returns: the log file to append to."""
        record = replace(self.get(run), attempts=self.get(run).attempts + 1, status=None, error=None, job=job)
        log = self.log(run)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(f"{ATTEMPT}{record.attempts}, {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n")
        self.put(run, record)
        return log

    def end_attempt(self, run: SweepRun, status: int, error: str | None = None) -> AttemptRecord:
        """Record how an attempt ended. Args: status: as `subprocess` returns it, negative for a signal."""
        if status not in (0, EXIT_UNFINISHED) and error is None:
            killed = f"killed by {signal.Signals(-status).name}" if status < 0 else None
            error = killed or last_line(self.log(run)) or f"exit status {status}"
        record = replace(self.get(run), status=status, error=None if error is None else printable(error))
        self.put(run, record)
        return record

    def retry(self, run: SweepRun) -> None:
        """Clear the failure of a run, so that it is started again."""
        record = self.get(run)
        if record.failed:
            self.put(run, replace(record, status=None, error=None))

    def get(self, run: SweepRun) -> AttemptRecord:
        """The record of a run, an empty one if it was never started. Raises: Unreadable; Damaged."""
        path = self._path(run)
        try:
            return AttemptRecord(**(storage.read_sealed(path, unsealed=True) or {}))
        except (Damaged, TypeError):
            raise Damaged(
                f"{path}: was edited or damaged, so the number of attempts is unknown; delete the file and start "
                "the sweep again: the run resumes from its last checkpoint"
            ) from None

    def put(self, run: SweepRun, record: AttemptRecord) -> None:
        write_sealed(self._path(run), asdict(record))

    def state(self, run: SweepRun, queue: Mapping[str, str]) -> State:
        """The state of a run. Args: queue: run id -> Slurm's state, for the runs in its queue."""
        if run.done:
            return "done"
        if run.locked:
            return "running"
        if run.id in queue:
            return "running" if queue[run.id] == "RUNNING" else "queued"
        return "failed" if self.get(run).failed else "pending"


class RetryView(RunStates):
    """The states as they would be under `--retry`, for a dry run: no run has failed, and nothing is written."""

    def get(self, run: SweepRun) -> AttemptRecord:
        record = super().get(run)
        return replace(record, status=None, error=None) if record.failed else record


def last_line(log: Path, at_most: int = 400) -> str | None:
    """The line of a log that explains why a program ended: the last `error:` line, else the last line."""
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
