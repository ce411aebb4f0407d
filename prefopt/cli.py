"""The commands: each parses its command-line arguments and calls what they ask for, which makes its own heavy imports.

Exit status of every command: 0 done; 1 unexpected failure; 2 a mistake that the user can fix; 75 stopped and saved, run
the same command again.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from prefopt import settings
from prefopt.errors import ConfigError
from prefopt.exits import exit_status, record_settings
from prefopt.redaction import printable
from prefopt.training import weight_files
from prefopt.training.runtime import Runtime, silence_deepspeed
from prefopt.training.slurm_environment import join_step


def train(argv: Sequence[str]) -> int:
    """`prefopt train`: one training run, or rounds on the ranks of this launch where --rounds.count is given."""
    return _command("train", argv, settings.help_text, _train)


def _train(argv: Sequence[str]) -> int:
    from prefopt.run.context import run_in_context

    join_step()
    config = settings.parse(argv)
    record_settings(config.to_dict(), Path(config.output))
    if config.rounds.count:
        from prefopt.run.rounds_command import rounds_here

        return rounds_here(config)

    def work(runtime: Runtime) -> int:
        from prefopt.run.training_run import train_run

        return train_run(config, runtime)

    return run_in_context(config, work)


def rounds(argv: Sequence[str]) -> int:
    """`prefopt rounds`: each stage of each round in a process of its own, one stage, or jobs of Slurm."""
    from prefopt.run.rounds_command import rounds_help, run_rounds

    def run(argv: Sequence[str]) -> int:
        join_step()
        return run_rounds(argv)

    return _command("rounds", argv, rounds_help, run)


def infer(argv: Sequence[str]) -> int:
    """`prefopt infer`: answers prompts with a model."""
    from prefopt.settings.infer import infer_help, parse_infer

    def run(argv: Sequence[str]) -> int:
        config = parse_infer(argv)
        record_settings(dataclasses.asdict(config), Path(config.output) if config.output else None)
        from prefopt.inference import infer as inference

        return inference.run(config)

    return _command("infer", argv, infer_help, run)


def data(argv: Sequence[str]) -> int:
    """`prefopt data`: what training would report of data files, and some examples with their masks."""
    from prefopt.settings.data import data_help, parse_data

    def run(argv: Sequence[str]) -> int:
        from prefopt.run.data_command import preview_data

        config = parse_data(argv)
        record_settings(dataclasses.asdict(config))
        return preview_data(config)

    return _command("data", argv, data_help, run)


def methods(argv: Sequence[str]) -> int:
    """`prefopt methods`: a table of all methods."""

    def text(_: Sequence[str]) -> str:
        from prefopt.run.methods_command import methods_table

        return methods_table()

    def run(argv: Sequence[str]) -> int:
        table = text(argv)
        if argv:
            raise ConfigError(f"prefopt methods: found '{argv[0]}', expected no arguments")
        with contextlib.suppress(BrokenPipeError):
            print(table)
        return 0

    return _command("methods", argv, text, run)


def sweep(argv: Sequence[str]) -> int:
    """`prefopt sweep`: many runs from one file. Exit status 1 where some of them failed."""
    from prefopt.sweeps import command

    return exit_status("sweep", argv, lambda: command.sweep(argv))


def plan(argv: Sequence[str]) -> int:
    """`prefopt plan`: memory and time of a run under each parallel backend."""
    from prefopt.settings.plan import parse_plan, plan_help

    def run(argv: Sequence[str]) -> int:
        own, config = parse_plan(argv)
        record_settings(config.to_dict())
        weight_files.check_path("model.path", str(config.model.path))
        from prefopt.planner.plan_report import report

        with contextlib.suppress(BrokenPipeError):
            print(printable(report(own, config), lines=True))
        return 0

    return _command("plan", argv, plan_help, run)


def _command(
    name: str, argv: Sequence[str], help_text: Callable[[Sequence[str]], str], run: Callable[[Sequence[str]], int]
) -> int:
    """Print the help where it is asked for, else run the command. Returns: the exit status, see `exit_status`."""

    def run_or_help() -> int:
        if "--help" in argv or "-h" in argv:
            with contextlib.suppress(BrokenPipeError):
                print(help_text(argv))
            return 0
        silence_deepspeed()
        return run(argv)

    return exit_status(name, argv, run_or_help)
