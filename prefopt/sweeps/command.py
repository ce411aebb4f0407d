"""The command `sweep`: start the runs of a sweep file here or on Slurm, look at them, cancel them, tabulate them."""

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
from prefopt.settings.help import help_page, options_of
from prefopt.settings.reader import build, split_flags
from prefopt.settings.schema import type_hints
from prefopt.storage import owner_of
from prefopt.sweeps import expand, manifest, results, search, slurm, sweep_file
from prefopt.sweeps.local import Local, describe, machine, slots_of
from prefopt.sweeps.manifest import Forgiving, Ledger, SweepRun
from prefopt.sweeps.sweep_file import SweepFile
from prefopt.training import output_folder, signals

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Options:
    """How the runs are started."""

    launcher: Literal["local", "slurm"] = "local"
    """Processes of this machine, or array jobs of Slurm."""
    slots: int | None = None
    """Runs at a time. None: local, one for each gpus_per_run GPUs, or one; Slurm, as many as there is room for."""
    gpus_per_run: int = 1
    """local: GPUs that a run gets, where there are any."""
    start_with: str = ""
    """local: what starts a run, e.g. "torchrun --nproc_per_node 2". None: python."""
    sbatch: str = ""
    """slurm: further flags of sbatch, e.g. "--partition=gpu --gpus-per-node=8 --ntasks-per-node=8"."""
    script: str | None = None
    """slurm: job script of an array task. None: slurm/sweep.sbatch."""
    retry: bool = False
    """Start runs that have failed again."""
    watch: float | None = None
    """status: show the table again every so many seconds until no run waits or runs."""
    dry_run: bool = False
    """Print the runs, and what would be started or submitted, and stop."""


USAGE = """usage: sweep.py FILE.yaml [--launcher local|slurm] [--slots N] [--retry true] [--dry_run true]
       sweep.py status|results|cancel FILE.yaml

FILE.yaml names the settings of all runs; docs/sweeps.md says how. Runs that are done are skipped, runs that were
stopped are continued, runs that have failed are left alone without --retry. Exit status 0: all runs are done, or
submitted; 1: some have failed; 2: a mistake that one line explains; 75: stopped, the same command continues.
"""
_ACTIONS = ("status", "results", "cancel", "task")


def sweep(argv: Sequence[str]) -> int:
    """Do what the command line says. Returns the exit status. Raises: PrefoptError."""
    if not argv or "--help" in argv or "-h" in argv:
        with contextlib.suppress(BrokenPipeError):
            print(help_page([USAGE], [("options", "", options_of(Options, ""))]))
        return 0 if argv else 2
    places = list(itertools.takewhile(lambda word: not word.startswith("--"), argv))
    action = places.pop(0) if places and places[0] in _ACTIONS else "start"
    if action == "task":
        return _task(places)
    if len(places) != 1:
        near = did_you_mean(places[0], _ACTIONS[:-1]) if len(places) == 2 else ""
        raise ConfigError(f"sweep: found {shlex.join(places) or 'no file'}, expected one sweep file{near}")
    options = _options(argv[len(places) + (action != "start") :], action)
    file = sweep_file.read(Path(places[0]))
    if action in ("start", "results"):
        _refuse_another_folder(file)
    if action == "start":
        return _start(file, options)
    runs = _known(file)
    if action == "status":
        return _status(file, runs, options.watch)
    if action == "results":
        path, count = results.write_results(file.output, runs)
        _say(f"{count} finished runs: {path}, {path.with_suffix('.csv')}")
        return 0
    return _cancel(file)


def _options(argv: Sequence[str], action: str) -> Options:
    words = list(argv)
    for index in range(len(words) - 2, -1, -1):
        if words[index] in ("--sbatch", "--start_with"):  # whose values are flags themselves
            words[index : index + 2] = [f"{words[index]}={words[index + 1]}"]
    flags = split_flags(words)
    hints = type_hints(Options)
    for key in flags:
        if key not in hints:
            raise ConfigError(f"--{key}: unknown option of sweep{did_you_mean(key, hints) or '; --help lists them'}")
        allowed = ("watch",) if action == "status" else () if action != "start" else {*hints} - {"watch"}
        if key not in allowed:
            raise ConfigError(f"--{key}: not read by '{action}'; leave it out")
    options: Options = build(Options, flags, "", {})
    for key in ("slots", "gpus_per_run", "watch"):
        value = getattr(options, key)
        if value is not None and value <= 0:
            raise ConfigError(f"--{key}: found {value}, expected a number > 0")
    others = {"local": ("sbatch", "script"), "slurm": ("gpus_per_run", "start_with")}[options.launcher]
    for key in others:
        if key in flags:
            raise ConfigError(f"--{key}: not read by --launcher {options.launcher}; leave it out")
    return options


def _known(file: SweepFile) -> list[SweepRun]:
    """The runs of a sweep that was started, or those of its file."""
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
                    f"{file.path}: output: {file.output / table} is there, and no sweep wrote it; choose another output"
                )


# Starting -------------------------------------------------------------------------------------------------------------


def _start(file: SweepFile, options: Options) -> int:
    if file.search is not None:
        search.require(file)
        if options.launcher == "slurm":
            raise ConfigError(f"{file.path}: search: its runs depend on each other's results; use --launcher local")
    runs = expand.runs_of(file)  # of a search: draws of the same spaces, to find mistakes before anything starts
    ledger = (Forgiving if options.retry and options.dry_run else Ledger)(file.output)
    if options.launcher == "slurm":
        script, flags = slurm.script("sweep.sbatch", options.script), slurm.words_of("--sbatch", options.sbatch)
        launcher: slurm.Slurm | Local = slurm.Slurm(ledger, script, flags, options.slots, _say)
    else:
        slots = slots_of(options.slots, options.gpus_per_run, *machine())
        plan: Callable[[], Sequence[SweepRun]] = lambda: runs  # noqa: E731
        if file.search is not None:
            plan = search.Searched(
                file, ledger, len(slots), lambda new: manifest.write(file.output / MANIFEST, new)
            ).plan
        launcher = Local(ledger, slots, _start_with(options.start_with), plan, _say)
    _say(f"{file.path}: {len(runs)} runs in {file.output}")
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
            for run in _known(file):
                ledger.forgive(run)
        if isinstance(launcher, Local):
            return _run_here(file, launcher)
        count = launcher.submit(runs)
        _say(f"submitted {count} of {len(runs)} runs; the others are done, failed, or in the queue")
        return 0
    finally:
        lock.release()


def _run_here(file: SweepFile, launcher: Local) -> int:
    status = launcher.run()
    runs = _known(file)
    states = [launcher.ledger.state(run, {}) for run in runs]
    path, _ = results.write_results(file.output, runs)
    failed = [run for run, state in zip(runs, states, strict=True) if state == "failed"]
    for run in failed:
        _say(f"failed: {run.id}{describe(run)}: {launcher.ledger.get(run).error}")
    counts = f"{states.count('done')} of {len(runs)} runs are done" + (f", {len(failed)} failed" if failed else "")
    more = "; the same command continues" if status == signals.EXIT_UNFINISHED else ""
    more = "; --retry true starts them again" if failed and not more else more
    _say(f"{counts}{more}; results: {path}")
    return status


def _start_with(text: str) -> list[str]:
    words = slurm.words_of("--start_with", text)
    if words and shutil.which(words[0]) is None:
        raise ConfigError(f"--start_with: there is no program '{words[0]}' here")
    return words


def _say(text: str) -> None:
    print(printable(text, lines=True), flush=True)


# Looking and stopping -------------------------------------------------------------------------------------------------


def _status(file: SweepFile, runs: Sequence[SweepRun], watch: float | None) -> int:
    ledger = Ledger(file.output)
    while True:
        queue = slurm.queue_states(file.output)
        table = results.status_table(runs, ledger, queue)
        clear = "\x1b[H\x1b[2J" if watch is not None and sys.stdout.isatty() else ""
        with contextlib.suppress(BrokenPipeError):
            print(clear + printable(table, lines=True), flush=True)
        states = {ledger.state(run, queue) for run in runs}
        if watch is None or not states & {"running", "queued"}:
            return 0
        time.sleep(watch)
        runs = _known(file)


def _cancel(file: SweepFile) -> int:
    """Stop the launcher of this machine, whose runs then save, and cancel jobs in the queue."""
    found = slurm.cancel(file.output)
    if found:
        _say(f"cancelled {len(found)} jobs: {', '.join(found)}")
    owner = _owner(file.output)
    if owner is not None:
        pid, host = owner
        if host != socket.gethostname():
            raise ConfigError(f"sweep cancel: the sweep runs on {host} (process {pid}); say it there")
        os.kill(pid, signal.SIGTERM)
        _say(f"asked process {pid} to stop; its runs save, the same sweep continues them")
    if not found and owner is None:
        _say(f"{file.output}: nothing runs and nothing is in the queue")
    return 0


def _owner(folder: Path) -> tuple[int, str] | None:
    """(process, host) of the launcher that works on the sweep now."""
    if not SweepRun("", (), str(folder)).held:
        return None
    return owner_of(folder / ".lock")


def _task(words: Sequence[Any]) -> int:
    """What slurm/sweep.sbatch starts: `sweep task MANIFEST LINE`."""
    if len(words) != 2 or not str(words[1]).isdigit():
        raise ConfigError(f"sweep task: found {shlex.join(words)}, expected a manifest and the number of its line")
    path = Path(words[0])
    status = slurm.task(path, int(words[1]), _say)
    whole = path.parent.parent / MANIFEST
    if status == 0 and whole.exists():
        results.write_results(whole.parent, manifest.read(whole))
    return status
