"""The part of a run of rounds that `rounds --stage` names."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from prefopt.errors import ConfigError, did_you_mean
from prefopt.rounds.store import SHARDED, STAGES


@dataclasses.dataclass(frozen=True)
class StageSlice:
    """One stage of one round.

    Args: part: (number of this process, number of processes) where several processes share the stage's shards.
    """

    name: str
    round: int
    part: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"{self.name}-{self.round}" + ("" if self.part is None else f"-{self.part[0]}of{self.part[1]}")


def parse_stage(argv: Sequence[str]) -> tuple[list[str], StageSlice | None]:
    """Read --stage, --round and --part. Returns: (all other arguments, the stage or None). Raises: ConfigError."""
    flags, own = [], {}
    arguments = [
        part for argument in argv for part in (argument.split("=", 1) if argument.startswith("--") else [argument])
    ]
    while arguments:
        argument = arguments.pop(0)
        if argument in ("--stage", "--round", "--part"):
            if not arguments:
                raise ConfigError(f"{argument}: found no value")
            own[argument] = arguments.pop(0)
        else:
            flags.append(argument)
    if not own:
        return flags, None
    name, number, part = own.get("--stage"), own.get("--round"), own.get("--part")
    if name not in STAGES:
        near = did_you_mean(str(name), STAGES)
        raise ConfigError(f"--stage: found {name!r}, expected one of {', '.join(STAGES)}{near}")
    if number is None or not number.isdigit() or (int(number) == 0 and name != "evaluate"):
        raise ConfigError(f"--round: found {number!r}, expected the number of a round, from 1 (evaluate: from 0)")
    if part is None:
        return flags, StageSlice(name, int(number))
    which, _, of = part.partition("/")
    if not (which.isdigit() and of.isdigit() and int(which) < int(of)):
        raise ConfigError(f"--part: found {part!r}, expected I/N, such as 0/4, 1/4, 2/4, 3/4")
    if name not in SHARDED:
        raise ConfigError(f"--part: the {name} stage cannot be shared by separate processes; leave --part out")
    return flags, StageSlice(name, int(number), (int(which), int(of)))
