"""The command `sweep`: start the runs of a sweep file, show their status, cancel them, write their results."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefopt.errors import ConfigError, did_you_mean
from prefopt.redaction import printable
from prefopt.settings.help import OptionGroup, about, help_page, options_of, program
from prefopt.settings.reader import build, split_flags
from prefopt.settings.schema import type_hints
from prefopt.storage import owner_of
from prefopt.sweeps import expand, manifest, results, search, slurm, sweep_file
from prefopt.sweeps.local import Local, describe, machine, slots_of
from prefopt.sweeps.manifest import RetryView, RunStates, SweepRun
from prefopt.sweeps.sweep_file import SweepFile
from prefopt.training import output_folder, signals

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class SweepOptions:
    """Starting the runs of a sweep."""

    launcher: Literal["local", "slurm"] = "local"
    """Where runs are started: as processes of this machine, or as Slurm array jobs."""
    slots: int | None = None
    """Number of runs at a time. None: one per gpus_per_run GPUs (one without GPUs); on Slurm, no limit."""
    gpus_per_run: int = 1
    """local: GPUs per run, on a machine that has any."""
    start_with: str = ""
    """local: launcher of a run, e.g. "torchrun --nproc_per_node 2". None: python."""
    sbatch: str = ""
    """slurm: additional sbatch flags, e.g. "--partition=gpu --gpus-per-node=8 --ntasks-per-node=8"."""
    script: str | None = None
    """slurm: job script of one array task. None: slurm/sweep.sbatch."""
    retry: bool = False
    """Restart failed runs."""
    watch: float | None = None
    """status: print the table again every WATCH seconds until no run is queued or running."""
    dry_run: bool = False
    """Print the runs and the commands that would start them; start nothing."""


USAGE = """usage: {sweep} FILE.yaml [--launcher local|slurm] [--slots N] [--retry true] [--dry_run true]
       {sweep} status|results|cancel FILE.yaml

FILE.yaml holds the settings of all runs (docs/sweeps.md). Finished runs are skipped, interrupted runs are resumed,
and failed runs are restarted only with --retry. Exit status 0: all runs are finished, or submitted; 1: some runs have
failed; 2: an error in the command or the file, which one line explains; 75: interrupted, the same command resumes.
"""
_ACTIONS = ("status", "results", "cancel", "task")


def sweep(argv: Sequence[str]) -> int:
    """Run the command. Returns: the exit status. Raises: PrefoptError."""
    if not argv or "--help" in argv or "-h" in argv:
        with contextlib.suppress(BrokenPipeError):
            group = OptionGroup("options", about(SweepOptions), options_of(SweepOptions, ""))
            print(help_page([USAGE.format(sweep=program("sweep"))], [group]))
        return 0 if argv else 2
    positional = list(itertools.takewhile(lambda word: not word.startswith("--"), argv))
    action = positional.pop(0) if positional and positional[0] in _ACTIONS else "start"
    if action == "task":
        return _task(positional)
    if len(positional) != 1:
        near = did_you_mean(positional[0], _ACTIONS[:-1]) if len(positional) == 2 else ""
        raise ConfigError(f"sweep: found {shlex.join(positional) or 'no file'}, expected one sweep file{near}")
    options = _options(argv[len(positional) + (action != "start") :], action)
    file = sweep_file.read(Path(positional[0]))
    if action in ("start", "results"):
        _refuse_another_folder(file)
    if action == "start":
        return _start(file, options)
    runs = _runs(file)
    if action == "status":
        return _status(file, runs, options.watch)
    if action == "results":
        path, count = results.write_results(file.output, runs)
        _print(f"{count} finished runs: {path}, {path.with_suffix('.csv')}")
        return 0
    return _cancel(file)


def _options(argv: Sequence[str], action: str) -> SweepOptions:
    arguments = list(argv)
    for index in range(len(arguments) - 2, -1, -1):
        if arguments[index] in ("--sbatch", "--start_with"):  # their values begin with -- too
            arguments[index : index + 2] = [f"{arguments[index]}={arguments[index + 1]}"]
    flags = split_flags(arguments)
    hints = type_hints(SweepOptions)
    for key in flags:
        if key not in hints:
            hint = did_you_mean(key, hints) or "; --help lists the options"
            raise ConfigError(f"--{key}: unknown option of sweep{hint}")
        allowed = ("watch",) if action == "status" else () if action != "start" else {*hints} - {"watch"}
        if key not in allowed:
            raise ConfigError(f"--{key}: '{action}' does not read it; remove it")
    options: SweepOptions = build(SweepOptions, flags, "", {})
    for key in ("slots", "gpus_per_run", "watch"):
        value = getattr(options, key)
        if value is not None and value <= 0:
            raise ConfigError(f"--{key}: found {value}, expected a number > 0")
    others = {"local": ("sbatch", "script"), "slurm": ("gpus_per_run", "start_with")}[options.launcher]
    for key in others:
        if key in flags:
            raise ConfigError(f"--{key}: --launcher {options.launcher} does not read it; remove it")
    return options


def _runs(file: SweepFile) -> list[SweepRun]:
    """The runs of the manifest if the sweep was started before, else those of the sweep file."""
    path = file.output / MANIFEST
    return manifest.read(path) if path.exists() else expand.runs_of(file)


def _refuse_another_folder(file: SweepFile) -> None:
    """Refuse a folder with a manifest or tables that no sweep has written. Raises: TrainError; ConfigError."""
    path = file.output / MANIFEST
    if path.exists():
        manifest.read(path)
    elif not (file.output / results.LOCK).exists():
        for table in results.TABLES:
            if (file.output / table).exists():
                raise ConfigError(
                    f"{file.path}: output: {file.output / table} exists, and no sweep wrote it; choose another output"
                )


# Starting -------------------------------------------------------------------------------------------------------------


def _start(file: SweepFile, options: SweepOptions) -> int:
    if file.search is not None:
        search.require(file)
        if options.launcher == "slurm":
            raise ConfigError(f"{file.path}: search: its runs depend on each other's results; use --launcher local")
    runs = expand.runs_of(file)  # for a search: random draws from its spaces, to find errors before anything starts
    states = (RetryView if options.retry and options.dry_run else RunStates)(file.output)
    if options.launcher == "slurm":
        script = slurm.script("sweep.sbatch", options.script)
        flags = slurm.split_command_line("--sbatch", options.sbatch)
        launcher: slurm.Slurm | Local = slurm.Slurm(states, script, flags, options.slots, _print)
    else:
        slots = slots_of(options.slots, options.gpus_per_run, *machine())
        plan: Callable[[], Sequence[SweepRun]] = lambda: runs  # noqa: E731
        if file.search is not None:
            plan = search.SearchedRuns(
                file, states, len(slots), lambda new: manifest.write(file.output / MANIFEST, new)
            ).plan
        launcher = Local(states, slots, _start_with(options.start_with), plan, _print)
    _print(f"{file.path}: {len(runs)} runs in {file.output}")
    if options.dry_run:
        launcher.show(runs)
        return 0
    output_folder.prepare_output(file.output)
    lock = output_folder.OutputLock(file.output)
    lock.acquire()
    try:
        if file.search is None:
            manifest.write(file.output / MANIFEST, runs)
        if options.retry:
            for run in _runs(file):
                states.retry(run)
        if isinstance(launcher, Local):
            return _run_here(file, launcher)
        count = launcher.submit(runs)
        _print(f"submitted {count} of {len(runs)} runs; the others are finished, failed, or in the queue")
        return 0
    finally:
        lock.release()


def _run_here(file: SweepFile, launcher: Local) -> int:
    status = launcher.run()
    runs = _runs(file)
    state_of = {run.id: launcher.states.state(run, {}) for run in runs}
    path, _ = results.write_results(file.output, runs)
    failed = [run for run in runs if state_of[run.id] == "failed"]
    finished = [run for run in runs if state_of[run.id] == "done"]
    for run in failed:
        _print(f"failed: {run.id}{describe(run)}: {launcher.states.get(run).error}")
    counts = f"{len(finished)} of {len(runs)} runs are finished" + (f", {len(failed)} failed" if failed else "")
    more = "; the same command resumes" if status == signals.EXIT_UNFINISHED else ""
    more = "; --retry true restarts them" if failed and not more else more
    _print(f"{counts}{more}; results: {path}")
    return status


def _start_with(text: str) -> list[str]:
    launcher = slurm.split_command_line("--start_with", text)
    if launcher and shutil.which(launcher[0]) is None:
        raise ConfigError(f"--start_with: found '{launcher[0]}', which is not a program on this machine")
    return launcher


def _print(text: str) -> None:
    print(printable(text, lines=True), flush=True)


# Status and cancel ----------------------------------------------------------------------------------------------------


def _status(file: SweepFile, runs: Sequence[SweepRun], watch: float | None) -> int:
    states = RunStates(file.output)
    while True:
        queue = slurm.queue_states(file.output)
        table = results.status_table(runs, states, queue)
        clear = "\x1b[H\x1b[2J" if watch is not None and sys.stdout.isatty() else ""
        with contextlib.suppress(BrokenPipeError):
            print(clear + printable(table, lines=True), flush=True)
        active = any(states.state(run, queue) in ("running", "queued") for run in runs)
        if watch is None or not active:
            return 0
        time.sleep(watch)
        runs = _runs(file)


def _cancel(file: SweepFile) -> int:
    """Request the launcher on this machine to stop, whose runs then save, and cancel jobs in the queue."""
    found = slurm.cancel(file.output)
    if found:
        _print(f"cancelled {len(found)} jobs: {', '.join(found)}")
    owner = _owner(file.output)
    if owner is not None:
        pid, host = owner
        if host != socket.gethostname():
            raise ConfigError(f"sweep cancel: the sweep runs on {host} (process {pid}); cancel it there")
        os.kill(pid, signal.SIGTERM)
        _print(f"requested process {pid} to stop; its runs save, and the same sweep command resumes them")
    if not found and owner is None:
        _print(f"{file.output}: no run is running or in the queue")
    return 0


def _owner(folder: Path) -> tuple[int, str] | None:
    """(process id, host) of the launcher that runs the sweep now."""
    if not SweepRun("", (), str(folder)).locked:
        return None
    return owner_of(folder / ".lock")


def _task(arguments: Sequence[Any]) -> int:
    """The command that slurm/sweep.sbatch runs: `sweep task MANIFEST LINE`."""
    if len(arguments) != 2 or not str(arguments[1]).isdigit():
        raise ConfigError(f"sweep task: found {shlex.join(arguments)}, expected a manifest and a line number")
    path = Path(arguments[0])
    status = slurm.task(path, int(arguments[1]), _print)
    whole_sweep = path.parent.parent / MANIFEST  # `path` holds the runs of one array job
    if status == 0 and whole_sweep.exists():
        results.write_results(whole_sweep.parent, manifest.read(whole_sweep))
    return status
