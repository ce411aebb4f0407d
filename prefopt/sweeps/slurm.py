"""Runs of a sweep as array jobs of Slurm. The queue itself says which runs it has: nothing is submitted twice."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.errors import ConfigError, TrainError
from prefopt.storage import text_hash
from prefopt.sweeps import manifest
from prefopt.sweeps.local import environment, train_command
from prefopt.sweeps.manifest import Ledger, SweepRun
from prefopt.training.signals import EXIT_UNFINISHED

# A rank that fails ends the others after a minute, in which ranks that leave after a signal can save.
SRUN = ("srun", "--kill-on-bad-exit=0", "--wait=60")


def script(name: str, given: str | None = None) -> Path:
    """A job script: the one that is named, of this folder, or of the clone that the package lies in.

    Raises: ConfigError where there is none.
    """
    clone = Path(__file__).resolve().parent.parent.parent
    places = [Path(given)] if given else [Path("slurm") / name, clone / "slurm" / name]
    for path in places:
        if path.is_file():
            return path
    raise ConfigError(f"--script: found no {places[0]}; expected the job script (slurm/{name} of the repository)")


def words_of(flag: str, text: str) -> list[str]:
    """The words of a command line. Raises: ConfigError where a quote is not closed."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: found {text!r}: {error}") from None


def call(*words: str) -> str:
    """What a command of Slurm says. Raises: TrainError with its last line where it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise TrainError(
            f"{words[0]}: there is no such program here; run this on a login node of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise TrainError(f"{words[0]}: no answer within 120 s") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise TrainError(f"{shlex.join(words)[:200]}: {said[-1]}")
    return done.stdout.strip()


@dataclass(frozen=True)
class Job:
    """A job, or one task of an array, that the queue holds."""

    id: str
    state: str
    comment: str

    @property
    def array(self) -> str:
        return self.id.partition("_")[0]


def jobs() -> list[Job]:
    """This user's jobs that wait or run. Raises: TrainError where Slurm does not answer."""
    lines = call("squeue", "--noheader", "--me", "--array", "--format=%i %T %k").splitlines()
    found = [line.split(" ", 2) for line in lines]
    return [Job(parts[0], parts[1], parts[2] if len(parts) > 2 else "") for parts in found]


def sbatch(words: Sequence[str], dry_run: bool, say: Callable[[str], None]) -> str:
    """Submit. Returns: the job's number; where it is only said what would be submitted, its place among those."""
    command = ["sbatch", "--parsable", *words]
    say(shlex.join(command))
    return "" if dry_run else call(*command).partition(";")[0]


@dataclass(frozen=True)
class Slurm:
    """The launcher.

    Args:
        ledger: of the sweep.
        script: the job script of one array task.
        flags: further flags of sbatch.
        slots: most tasks of an array that run at a time; None: as many as Slurm has room for.
        say: prints a line.
    """

    ledger: Ledger
    script: Path
    flags: Sequence[str]
    slots: int | None
    say: Callable[[str], None]

    def show(self, runs: Sequence[SweepRun]) -> None:
        """Say what would be submitted."""
        self.submit(runs, dry_run=True)

    def submit(self, runs: Sequence[SweepRun], dry_run: bool = False) -> int:
        """Submit what is neither done nor failed nor in the queue. Returns: how many runs that were."""
        folder, queue = self.ledger.folder, queued(self.ledger.folder)
        states = {run.id: self.ledger.state(run, _states(queue)) for run in runs}
        groups: dict[tuple[str, ...], list[SweepRun]] = {}
        for run in runs:
            failed = [other for other in run.after if states.get(other) == "failed"]
            if states[run.id] == "pending" and failed:
                self.say(f"{run.id}: waits for {failed[0]}, which failed; left out")
            elif states[run.id] == "pending":
                groups.setdefault(tuple(other for other in run.after if states[other] != "done"), []).append(run)
        job_of = {run_id: job.id for run_id, job in queue.items()}
        for number, (after, group) in enumerate(sorted(groups.items(), key=lambda item: bool(item[0])), 1):
            text = "".join(run.id + "\n" for run in group)
            digest = text_hash(text)[:12]
            path = folder / "jobs" / f"{digest}.jsonl"
            throttle = f"%{self.slots}" if self.slots else ""
            words = [
                f"--job-name=prefopt-{folder.name}",
                f"--array=0-{len(group) - 1}{throttle}",
                f"--output={folder / 'logs' / 'slurm-%A_%a.out'}",
                f"--comment={path.resolve()}",
            ]
            if after:
                words += [f"--dependency=afterok:{':'.join(job_of[other] for other in after)}"]
                words += ["--kill-on-invalid-dep=yes"]
            if not dry_run:
                manifest.write(path, group)
                (folder / "logs").mkdir(parents=True, exist_ok=True)
            job = sbatch([*words, *self.flags, str(self.script), str(path)], dry_run, self.say) or f"JOB{number}"
            job_of |= {run.id: f"{job}_{task}" for task, run in enumerate(group)}
            for task, run in enumerate(group):
                self.say(f"  {task}: {run.id}: {shlex.join(['prefopt', 'train', *run.argv])}")
        return sum(map(len, groups.values()))


def queued(folder: Path) -> dict[str, Job]:
    """SweepRun -> its array task in the queue; a task says by its job's comment which manifest it reads.

    A folder from which nothing was ever submitted has none, and Slurm is not asked.
    """
    if not (folder / "jobs").is_dir():
        return {}
    found: dict[str, Job] = {}
    lines: dict[str, list[SweepRun]] = {}
    root = str(folder.resolve() / "jobs") + os.sep
    for job in jobs():
        if job.comment.startswith(root):
            if job.comment not in lines:
                lines[job.comment] = manifest.read(Path(job.comment))
            found[lines[job.comment][int(job.id.partition("_")[2])].id] = job
    return found


def _states(queue: Mapping[str, Job]) -> dict[str, str]:
    return {run_id: job.state for run_id, job in queue.items()}


def queue_states(folder: Path) -> dict[str, str]:
    """SweepRun -> Slurm's state of it."""
    return _states(queued(folder))


def task(path: Path, number: int, say: Callable[[str], None]) -> int:
    """One line of a manifest, by an array task, on the node where its script runs: the ranks are started by srun.

    A run that was told to save, because its time is nearly over, goes back into the queue; one that was cancelled does
    not.

    Returns: the exit status of the run.
    """
    runs = manifest.read(path)
    if not 0 <= number < len(runs):
        raise TrainError(f"{path}: has no line {number}, it has {len(runs)}")
    run, ledger = runs[number], Ledger(path.parent.parent)
    if run.done:
        say(f"{run.id}: done already")
        return 0
    cancelled: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: cancelled.append(number))
    log = ledger.begin(run, _job(os.environ))
    variables = environment()
    if "SLURM_CPUS_PER_TASK" in variables:  # srun does not take it over from sbatch by itself
        variables.setdefault("SRUN_CPUS_PER_TASK", variables["SLURM_CPUS_PER_TASK"])
    with log.open("ab") as file:
        command = train_command([*SRUN, sys.executable], run)
        status = subprocess.call(command, env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    if cancelled and status != 0:
        status = EXIT_UNFINISHED
    record = ledger.end(run, status)
    say(f"{run.id}: {'failed: ' + str(record.error) if record.failed else 'done' if status == 0 else 'unfinished'}")
    if status == EXIT_UNFINISHED and not cancelled:
        call("scontrol", "requeue", str(_job(os.environ)))
    return status


def _job(variables: MutableMapping[str, Any]) -> str | None:
    array, task = variables.get("SLURM_ARRAY_JOB_ID"), variables.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else variables.get("SLURM_JOB_ID")


def cancel(folder: Path) -> list[str]:
    """Cancel the sweep's jobs. Returns their numbers."""
    found = [job.id for job in queued(folder).values()]
    if found:
        call("scancel", *found)
    return found
