"""The Slurm launcher: runs of a sweep as array jobs. Runs that are in the queue already are not submitted again."""

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
from prefopt.sweeps.manifest import RunStates, SweepRun
from prefopt.training.signals import EXIT_UNFINISHED, handles_signals

# When one rank fails, srun ends the others after a minute, in which ranks that were signalled can save.
SRUN = ("srun", "--kill-on-bad-exit=0", "--wait=60")


def script(name: str, given: str | None = None) -> Path:
    """Path of a job script: the given one, or that of this folder or of the clone that the package is in.

    Raises: ConfigError where it does not exist.
    """
    clone = Path(__file__).resolve().parent.parent.parent
    places = [Path(given)] if given else [Path("slurm") / name, clone / "slurm" / name]
    for path in places:
        if path.is_file():
            return path
    raise ConfigError(f"--script: found no file {places[0]}; expected the job script (slurm/{name} of the repository)")


def split_command_line(flag: str, text: str) -> list[str]:
    """The arguments of a command line. Raises: ConfigError where a quote is not closed."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: found {text!r}: {error}") from None


def call(*command: str) -> str:
    """Standard output of a Slurm command. Raises: TrainError with its last error line where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise TrainError(
            f"{command[0]}: there is no such program on this machine; run this on a login node of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise TrainError(f"{command[0]}: no answer within 120 s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise TrainError(f"{shlex.join(command)[:200]}: {lines[-1]}")
    return done.stdout.strip()


@dataclass(frozen=True)
class Job:
    """A job, or one task of an array job, in the queue."""

    id: str
    state: str
    comment: str

    @property
    def array(self) -> str:
        return self.id.partition("_")[0]


def jobs() -> list[Job]:
    """This user's queued and running jobs. Raises: TrainError where Slurm does not answer."""
    lines = call("squeue", "--noheader", "--me", "--array", "--format=%i %T %k").splitlines()
    found = [line.split(" ", 2) for line in lines]
    return [Job(parts[0], parts[1], parts[2] if len(parts) > 2 else "") for parts in found]


def sbatch(arguments: Sequence[str], dry_run: bool, log: Callable[[str], None]) -> str:
    """Print and submit an sbatch command. Returns: the job's id, "" under `dry_run`."""
    command = ["sbatch", "--parsable", *arguments]
    log(shlex.join(command))
    return "" if dry_run else call(*command).partition(";")[0]


@dataclass(frozen=True)
class Slurm:
    """The launcher that submits to Slurm.

    Args:
        states: of the runs of the sweep.
        script: the job script of one array task.
        flags: additional sbatch flags.
        slots: most array tasks that run at a time; None: no limit.
        log: prints a line.
    """

    states: RunStates
    script: Path
    flags: Sequence[str]
    slots: int | None
    log: Callable[[str], None]

    def show(self, runs: Sequence[SweepRun]) -> None:
        """Print the commands that would be submitted."""
        self.submit(runs, dry_run=True)

    def submit(self, runs: Sequence[SweepRun], dry_run: bool = False) -> int:
        """Submit every run that is neither done nor failed nor in the queue. Returns: the number of submitted runs."""
        folder, queue = self.states.folder, queued(self.states.folder)
        state_of = {run.id: self.states.state(run, _states(queue)) for run in runs}
        groups: dict[tuple[str, ...], list[SweepRun]] = {}
        for run in runs:
            failed = [other for other in run.after if state_of.get(other) == "failed"]
            if state_of[run.id] == "pending" and failed:
                self.log(f"{run.id}: waits for {failed[0]}, which failed; not submitted")
            elif state_of[run.id] == "pending":
                groups.setdefault(tuple(other for other in run.after if state_of[other] != "done"), []).append(run)
        job_of = {run_id: job.id for run_id, job in queue.items()}
        for number, (after, group) in enumerate(sorted(groups.items(), key=lambda item: bool(item[0])), 1):
            text = "".join(run.id + "\n" for run in group)
            digest = text_hash(text)[:12]
            path = folder / "jobs" / f"{digest}.jsonl"
            throttle = f"%{self.slots}" if self.slots else ""
            arguments = [
                f"--job-name=prefopt-{folder.name}",
                f"--array=0-{len(group) - 1}{throttle}",
                f"--output={folder / 'logs' / 'slurm-%A_%a.out'}",
                f"--comment={path.resolve()}",
            ]
            if after:
                arguments += [f"--dependency=afterok:{':'.join(job_of[other] for other in after)}"]
                arguments += ["--kill-on-invalid-dep=yes"]
            if not dry_run:
                manifest.write(path, group)
                (folder / "logs").mkdir(parents=True, exist_ok=True)
            job = sbatch([*arguments, *self.flags, str(self.script), str(path)], dry_run, self.log) or f"JOB{number}"
            job_of |= {run.id: f"{job}_{task}" for task, run in enumerate(group)}
            for task, run in enumerate(group):
                self.log(f"  {task}: {run.id}: {shlex.join(['prefopt', 'train', *run.argv])}")
        return sum(map(len, groups.values()))


def queued(folder: Path) -> dict[str, Job]:
    """Run id -> its array task in the queue. The comment of a job is the path of the manifest that its tasks read.

    squeue is not called for a folder from which nothing was submitted.
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
    """Run id -> Slurm's state of it."""
    return _states(queued(folder))


def task(path: Path, number: int, log: Callable[[str], None]) -> int:
    """Run one line of a manifest inside an array task; srun starts the ranks.

    A run that exits unfinished because its time limit is near is requeued; one that was cancelled is not.

    Returns: the exit status of the run.
    """
    runs = manifest.read(path)
    if not 0 <= number < len(runs):
        raise TrainError(f"{path}: has no line {number}; it has {len(runs)} lines")
    run, states = runs[number], RunStates(path.parent.parent)
    if run.done:
        log(f"{run.id}: done already")
        return 0
    cancelled: list[int] = []
    if handles_signals():
        signal.signal(signal.SIGTERM, lambda number, frame: cancelled.append(number))
    log_file = states.begin_attempt(run, _job(os.environ))
    variables = environment()
    if "SLURM_CPUS_PER_TASK" in variables:  # srun does not inherit it from sbatch
        variables.setdefault("SRUN_CPUS_PER_TASK", variables["SLURM_CPUS_PER_TASK"])
    with log_file.open("ab") as file:
        command = train_command([*SRUN, sys.executable], run)
        status = subprocess.call(command, env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    if cancelled and status != 0:
        status = EXIT_UNFINISHED
    record = states.end_attempt(run, status)
    log(f"{run.id}: {'failed: ' + str(record.error) if record.failed else 'done' if status == 0 else 'unfinished'}")
    if status == EXIT_UNFINISHED and not cancelled:
        call("scontrol", "requeue", str(_job(os.environ)))
    return status


def _job(variables: MutableMapping[str, Any]) -> str | None:
    array, task = variables.get("SLURM_ARRAY_JOB_ID"), variables.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else variables.get("SLURM_JOB_ID")


def cancel(folder: Path) -> list[str]:
    """Cancel the sweep's jobs. Returns: their ids."""
    found = [job.id for job in queued(folder).values()]
    if found:
        call("scancel", *found)
    return found
