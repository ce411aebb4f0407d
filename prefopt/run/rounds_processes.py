"""Rounds with each stage in a process of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from prefopt.errors import ConfigError
from prefopt.rounds.store import stages_left
from prefopt.run.output_checks import check_paths, check_same_run
from prefopt.settings import RunConfig
from prefopt.training import signals
from prefopt.training.launcher import print_rank_0


def run_stages(config: RunConfig, flags: Sequence[str]) -> int:
    """Run the stages that are not done, one after the other. After a kill the same command resumes.

    Args: flags: command-line arguments of each stage. Returns: the exit status of the first stage that fails, or 0.
    """
    check_paths(config)
    try:
        launcher = shlex.split(config.rounds.launcher) or [sys.executable]
    except ValueError as error:
        raise ConfigError(f"rounds.launcher: found {config.rounds.launcher!r}: {error}") from None
    if shutil.which(launcher[0]) is None:
        raise ConfigError(f"rounds.launcher: there is no program '{launcher[0]}' here")
    output = Path(config.output)
    check_same_run(config, output)
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, signals.FOLLOW: "1"}
    for number, name in stages_left(config):
        command = [*(launcher if name == "train" else [sys.executable]), "-m", "prefopt", "rounds"]
        print_rank_0(f"round {number}: {name}")
        status = run_stage([*command, "--stage", name, "--round", str(number), *flags], environment)
        if status != 0:
            return status if status in (2, signals.EXIT_UNFINISHED) else 1
    print_rank_0(f"finished: model in {output / 'model'}, rounds in {output / 'rounds.md'} and {output / 'rounds.png'}")
    return 0


def run_stage(command: list[str], environment: Mapping[str, str]) -> int:
    """Run a stage and wait for it; signals that ask to save are forwarded to it. Returns: its exit status."""
    with subprocess.Popen(command, env=dict(environment)) as process:
        received: list[int] = []

        def forward(number: int, frame: object) -> None:
            received.append(number)
            process.send_signal(number)

        numbers = signals.SAVE_SIGNALS if signals.handles_signals() else ()
        before = {number: signal.signal(number, forward) for number in numbers}
        try:
            status = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return signals.EXIT_UNFINISHED if received and status != 0 else status
