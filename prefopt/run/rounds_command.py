"""The `rounds` command: all stages in processes of their own, one stage in this one, or jobs of Slurm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefopt import settings
from prefopt.errors import ConfigError
from prefopt.exits import record_settings
from prefopt.rounds.store import SHARDED, STAGES
from prefopt.run.context import run_in_context
from prefopt.run.rounds_processes import run_stages
from prefopt.run.stage_slice import StageSlice, parse_stage
from prefopt.settings import RunConfig
from prefopt.sweeps import rounds_jobs
from prefopt.training.launcher import print_rank_0
from prefopt.training.runtime import Runtime

USAGE = f"""usage: {{rounds}} --method NAME --rounds.count N [--GROUP.SETTING VALUE ...]
       {{rounds}} --stage {"|".join(STAGES)} --round K [--part I/N] (the same flags)
       {{rounds}} --launcher slurm [--parts N] [--sbatch FLAGS] [--sbatch.STAGE FLAGS] (the same flags)

Without --stage: runs every stage of every round that is not done yet, each in a process of its own; the train stage is
started by --rounds.launcher. With --stage: runs that stage; --part 0/4 to 3/4 share its shards among four processes.
With --launcher slurm: submits a job for each stage, each after the one before; N array tasks share the shards of
{" and ".join(SHARDED)}.
"""


def rounds_help(argv: Sequence[str]) -> str:
    """The usage of the command, then the settings."""
    named = any(argument.partition("=")[0] == "--rounds.count" for argument in argv)
    flags = [*argv, *([] if named else ["--rounds.count", "1"])]
    return settings.help_text(flags, USAGE.format(rounds=settings.program("rounds")))


def run_rounds(argv: Sequence[str]) -> int:
    """Run, or submit, what the command-line arguments ask for. Returns: the exit status."""
    flags, jobs = rounds_jobs.options_of(argv)
    flags, stage = parse_stage(flags)
    config = settings.parse(flags)
    record_settings(config.to_dict(), Path(config.output))
    if config.rounds.count == 0:
        raise ConfigError("--rounds.count: not given, expected how many rounds")
    if stage is not None and stage.round > config.rounds.count:
        raise ConfigError(f"--round: found {stage.round}, but there are {config.rounds.count} (--rounds.count)")
    if jobs is not None and stage is not None:
        raise ConfigError("--launcher: given with --stage, which runs the stage here; leave one of them out")
    if jobs is not None:
        return rounds_jobs.submit(config, flags, jobs, print_rank_0)
    if stage is None and not config.dry_run:
        return run_stages(config, flags)
    return rounds_here(config, stage)


def rounds_here(config: RunConfig, only: StageSlice | None = None) -> int:
    """Run all rounds, or one stage, in this process and the other ranks of its launch. Returns: the exit status."""

    def work(runtime: Runtime) -> int:
        from prefopt.run.rounds_run import rounds_run

        return rounds_run(config, runtime, only)

    return run_in_context(config, work, part="" if only is None or only.part is None else f"-{only}")
