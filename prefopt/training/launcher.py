"""What a launcher puts into the environment: rank, world size, backend; and printing on rank 0. Imports no library."""

from __future__ import annotations

import os
import re
import sys
import time

from prefopt.errors import RendezvousError, TrainError
from prefopt.redaction import printable

RANK_0_GRACE = 2.0  # seconds that rank 0 has to print its error before another rank exits


def rank() -> int:
    """The global rank of this process, known before any library is loaded."""
    return _integer("RANK", 0)


def world_size() -> int:
    """The number of ranks that the launcher announces."""
    return _integer("WORLD_SIZE", 1)


def _integer(name: str, default: int) -> int:
    found = os.environ.get(name, "")
    return int(found) if re.fullmatch("[0-9]{1,9}", found) else default


def requested_backend() -> str:
    """The parallel backend that the launcher asks for: `zero`, `fsdp2` or `ddp`, by accelerate's variables."""

    def on(name: str) -> bool:
        return os.environ.get(name, "false").lower() in ("true", "1", "yes")

    return "zero" if on("ACCELERATE_USE_DEEPSPEED") else "fsdp2" if on("ACCELERATE_USE_FSDP") else "ddp"


def check_launcher() -> None:
    """Check that the variables of the launcher are complete and consistent. Raises: TrainError naming the variable."""
    without = "(without a launcher such as torchrun leave them all out)"
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        found = os.environ.get(name)
        if found is not None and not re.fullmatch("[0-9]{1,9}", found):
            raise TrainError(f"{name}: found '{found}' in the environment, expected a whole number {without}")
    world = world_size()
    lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world > 1 and lacking:
        raise TrainError(
            f"WORLD_SIZE: found {world} in the environment without {' and '.join(lacking)}, expected all that a "
            f"launcher sets {without}"
        )
    if rank() >= max(world, 1):
        raise TrainError(f"RANK: found {rank()} of WORLD_SIZE {world}, expected less {without}")
    if requested_backend() == "zero" and "RANK" not in os.environ:
        raise TrainError(
            "launcher: ACCELERATE_USE_DEEPSPEED is in the environment, but no launcher has started this process; start "
            "it with accelerate launch --config_file configs/accelerate/zero2.yaml, or unset the variable"
        )


def print_rank_0(text: str) -> None:
    """Print on rank 0 only, with secrets and control characters removed; the text may have several lines."""
    if rank() == 0:
        print(printable(text, lines=True), flush=True)


def print_error(error: Exception) -> int:
    """Print a user's error as one line to stderr, on rank 0, or a RendezvousError on each. Returns the exit status."""
    if rank() == 0 or isinstance(error, RendezvousError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:  # a launcher ends all ranks when one has exited, and rank 0 must have printed its error before that
        time.sleep(RANK_0_GRACE)
    return 2
