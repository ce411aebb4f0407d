"""Runs the tasks of an srun step as the ranks of one run: sets the variables that a launcher would have set."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import MutableMapping

from prefopt.errors import TrainError

_PORTS = range(20000, 32000)  # below Linux's ephemeral ports


def join_step(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from Slurm's variables.

    This applies only inside a step of several tasks in which no other launcher has set RANK. A command in an allocation
    that was not started by srun remains a single process. Variables that are already set are kept.

    Returns: whether the variables were set.
    Raises: TrainError if Slurm does not report the address of the first node, or a variable that srun sets is missing.
    """
    if "RANK" in environment or "SLURM_PROCID" not in environment:
        return False
    try:
        return _join_step(environment)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        found = f"{error} is not set" if isinstance(error, KeyError) else f"inconsistent SLURM_ variables: {error}"
        raise TrainError(
            f"srun: {found}, expected all variables that srun sets; start the ranks by srun, or unset SLURM_PROCID for "
            "a single process"
        ) from None


def _join_step(environment: MutableMapping[str, str]) -> bool:
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks == 1:
        return False
    local, here = int(environment["SLURM_LOCALID"]), _tasks_on_node(environment)
    gpus = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        # if Slurm binds GPUs to tasks, each task sees only its own, numbered from 0
        "LOCAL_RANK": str(local % len(gpus) if gpus else local),
        "LOCAL_WORLD_SIZE": str(here),
        "MASTER_PORT": str(_port(environment)),
    }
    if "MASTER_ADDR" not in environment:
        found["MASTER_ADDR"] = _address(environment)
    for name, value in found.items():
        environment.setdefault(name, value)
    return True


def _tasks_on_node(environment: MutableMapping[str, str]) -> int:
    """Number of tasks of this step on this node. Slurm's format: `2(x3),1` is two on each of three nodes, then one."""
    counts: list[int] = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, nodes = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part).groups()  # type: ignore[union-attr]
        counts += [int(count)] * int(nodes or 1)
    return counts[int(environment["SLURM_NODEID"])]


def _port(environment: MutableMapping[str, str]) -> int:
    """A port derived from job and step, so that jobs that share a node are unlikely to use the same one."""
    number = int(environment["SLURM_JOB_ID"]) * 7 + int(environment["SLURM_STEP_ID"])
    return _PORTS[number % len(_PORTS)]


def _address(environment: MutableMapping[str, str]) -> str:
    """The first node's address in Slurm's configuration, since its host name may not resolve."""
    if environment["SLURM_STEP_NUM_NODES"] == "1":
        return "127.0.0.1"
    try:
        names = _scontrol("show", "hostnames", environment["SLURM_STEP_NODELIST"])
        about = _scontrol("show", "node", names.split()[0])
        found = re.search(r"\bNodeAddr=(\S+)", about)
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise TrainError(f"srun: cannot find the address of the first node: {error}; set MASTER_ADDR") from error
    if found is None:
        raise TrainError("srun: `scontrol show node` prints no NodeAddr of the first node; set MASTER_ADDR")
    return found[1]


def _scontrol(*arguments: str) -> str:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=60, check=True).stdout
