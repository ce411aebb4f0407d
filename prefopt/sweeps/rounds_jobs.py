"""Rounds as Slurm jobs: one job per stage, each dependent on the one before. A job runs the same program as a shell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prefopt.errors import ConfigError, did_you_mean
from prefopt.rounds.store import SHARDED, STAGES, stages_left
from prefopt.settings import RunConfig, coerce
from prefopt.sweeps import slurm


@dataclass(frozen=True)
class OnSlurm:
    """How rounds are submitted.

    Args:
        parts: array tasks per sharded stage.
        script: the job script of one stage. None: slurm/rounds.sbatch.
        flags: additional sbatch flags: of all stages under "", of one stage under its name.
    """

    parts: int = 1
    script: str | None = None
    flags: dict[str, list[str]] = field(default_factory=dict)


def options_of(argv: Sequence[str]) -> tuple[list[str], OnSlurm | None]:
    """(the other arguments, how to submit; None without `--launcher slurm`). Raises: ConfigError."""
    rest: list[str] = []
    own: dict[str, str] = {}
    arguments = list(argv)
    while arguments:
        flag, equals, value = arguments[0].partition("=")
        if flag in ("--launcher", "--parts", "--script", "--sbatch") or flag.startswith("--sbatch."):
            if not equals and len(arguments) == 1:
                raise ConfigError(f"{flag}: found no value")
            own[flag[2:]] = value if equals else arguments.pop(1)
        else:
            rest.append(arguments[0])
        arguments.pop(0)
    if not own:
        return list(argv), None
    if own.pop("launcher", "slurm") != "slurm":
        raise ConfigError("--launcher: expected slurm; leave it out to run on this machine")
    parts = coerce(own.pop("parts", "1"), int, "--parts")
    if parts < 1:
        raise ConfigError(f"--parts: found {parts}, expected a number >= 1")
    given = own.pop("script", None)
    flags = {}
    for name, text in own.items():
        stage = name.partition(".")[2]
        if stage and stage not in STAGES:
            raise ConfigError(
                f"--{name}: expected the flags of one of {', '.join(STAGES)}{did_you_mean(stage, STAGES)}"
            )
        flags[stage] = slurm.split_command_line(f"--{name}", text)
    return rest, OnSlurm(parts, given, flags)


def submit(config: RunConfig, flags: Sequence[str], how: OnSlurm, log: Callable[[str], None]) -> int:
    """Submit a job for each stage that is neither done nor in the queue, dependent on the one before. Returns 0."""
    script, output = slurm.script("rounds.sbatch", how.script), Path(config.output)
    # squeue is not called for a folder from which nothing was submitted
    queue = {job.comment: job.array for job in slurm.jobs()} if (output / "logs").is_dir() else {}
    before, new = None, 0
    for number, name in stages_left(config):
        comment = f"{output.resolve()} round {number} {name}"
        if comment in queue:
            before = queue[comment]
            continue
        new += 1
        arguments = [
            f"--job-name=prefopt-{output.name}-{number}-{name}",
            f"--output={output / 'logs' / f'{number}-{name}-%j.out'}",
            f"--comment={comment}",
        ]
        if name in SHARDED:
            arguments += [f"--array=0-{how.parts - 1}"]
        if before is not None:
            arguments += [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"]
        arguments += [*how.flags.get("", ()), *how.flags.get(name, ())]
        if not config.dry_run:
            (output / "logs").mkdir(parents=True, exist_ok=True)
        program = ["--stage", name, "--round", str(number), *_without_dry_run(flags)]
        before = slurm.sbatch([*arguments, str(script), *program], bool(config.dry_run), log) or f"JOB{new}"
    if new == 0:
        log(f"{output}: nothing to submit; all stages are done or in the queue")
    return 0


def _without_dry_run(flags: Sequence[str]) -> list[str]:
    """The arguments of the job that a dry run prints."""
    arguments = list(flags)
    for index, word in enumerate(flags):
        if word.partition("=")[0] == "--dry_run":
            del arguments[index : index + (1 if "=" in word or index + 1 == len(flags) else 2)]
    return arguments
