"""Runs train commands in forks of one process that has made the imports, so that an attempt costs a second, not ten.

A fault is named in the request and happens inside the child: `{"at": "module:Class.function", "when": "before",
"count": 3, "do": "SIGKILL"}` kills it where the third call of that function begins.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import refuse

ROOT = Path(__file__).resolve().parent.parent
# What accelerate's launcher sets for each of configs/accelerate/*.yaml.
BACKENDS: dict[str, dict[str, str]] = {
    "ddp": {},
    **{
        f"zero{stage}": {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / f"configs/deepspeed/zero{stage}.json"),
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(stage == 3).lower(),
        }
        for stage in (1, 2, 3)
    },
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    },
}
# What it sets for a file of DeepSpeed's settings, which make a backend of BACKENDS offload.
OFFLOADED: dict[str, dict[str, str]] = {
    name: {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / f"configs/deepspeed/{name}.json"),
    }
    for name in ("zero3_offload", "zero3_nvme")
}


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status (minus a signal's number), seconds, and what it wrote."""

    status: int
    seconds: float
    out: str
    err: str


class ForkServer:
    """The parent's end: starts the process that forks, and asks it for one command after another."""

    def __init__(self, folder: Path, worlds: Path | None = None) -> None:
        """Args: folder: for its files and its cache. worlds: of the testbed, which several servers share; None: own."""
        self.folder, self._worlds = folder, worlds
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        env["PREFOPT_CACHE"] = str(folder / "cache")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=env,
            text=True,
        )

    def python(self, argv: list[str], cwd: Path) -> Ended:
        """What `python ARGV` does, where ARGV begins with a script or with `-m MODULE`, in a fork of the server."""
        return self.train(argv, cwd=cwd, command="python")

    def train(
        self,
        argv: list[str],
        fault: dict[str, Any] | None = None,
        kill_after: float | None = None,
        file_size_limit: int | None = None,
        cwd: Path | None = None,
        command: str = "train",
        ranks: int = 1,
        backend: str = "ddp",
        environment: dict[str, str] | None = None,
        unreadable: tuple[str, int] | None = None,
    ) -> Ended:
        """Run `prefopt train ARGV` in a fork of the server and wait for its end.

        Args: backend: what joins several ranks, one of `BACKENDS` or `OFFLOADED`; environment: more for all of them.
            ranks: processes joined by gloo; a fault happens on the one that its `rank` names, else the first; when
            one dies the others are killed, as a launcher does. What is written is the first one's.
            unreadable: the end of a path that cannot be read, and the number of the error; see `faults.refuse`.
        """
        out, err = self.folder / "out.txt", self.folder / "err.txt"
        request = {
            "argv": argv,
            "command": command,
            "ranks": ranks,
            "backend": backend,
            "environment": environment or {},
            "port": _free_port() if ranks > 1 else None,
            "fault": fault,
            "unreadable": unreadable,
            "kill_after": kill_after,
            "file_size_limit": file_size_limit,
            "cwd": str(cwd or self.folder),
            "out": str(out),
            "err": str(err),
        }
        self._share_worlds()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        self._share_worlds()
        return Ended(answer["status"], answer["seconds"], out.read_text(), err.read_text())

    @property
    def cache(self) -> Path:
        """PREFOPT_CACHE of its commands, with the worlds that are there by now."""
        self._share_worlds()
        return self.folder / "cache"

    def _share_worlds(self) -> None:
        if self._worlds is not None:
            _copy_worlds(self._worlds, self.folder / "cache")
            _copy_worlds(self.folder / "cache", self._worlds)

    def close(self) -> None:
        self._process.communicate()


def _copy_worlds(source: Path, target: Path) -> None:
    """Base policies that one cache has and another lacks; training one takes up to half a minute."""
    for world in source.glob("*-*[0-9a-f]/manifest.json"):
        name = world.parent.name
        if not (target / name).exists():
            target.mkdir(exist_ok=True)
            scratch = Path(tempfile.mkdtemp(dir=target, prefix=".copy"))
            shutil.copytree(world.parent, scratch / name)
            with contextlib.suppress(OSError):  # another one was first
                (scratch / name).rename(target / name)
            shutil.rmtree(scratch)


def _serve() -> None:
    import datasets  # noqa: F401
    import openai  # noqa: F401
    import peft  # noqa: F401
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    for name in ("cli", "run.training_run", "run.rounds_run", "inference.infer", "planner.dry_run"):
        importlib.import_module(f"prefopt.{name}")

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        began = time.monotonic()
        children = []
        for rank in range(request["ranks"]):
            pid = os.fork()
            if pid == 0:
                _child(request, rank)
            children.append(pid)
        if request["kill_after"] is not None:
            time.sleep(request["kill_after"])
            for pid in children:  # nobody has waited for them: the numbers are still their own
                os.kill(pid, signal.SIGKILL)
        answer = {"status": _status_of(children), "seconds": time.monotonic() - began}
        print(json.dumps(answer), flush=True)


def _status_of(children: list[int]) -> int:
    """The status of the first one that did not end well, after which the others are killed; else 0."""
    left, worst = {*children}, 0
    while left:
        pid, status = os.wait()
        left.discard(pid)
        code = os.waitstatus_to_exitcode(status)
        if code != 0 and worst == 0:
            worst = code
            for other in left:
                os.kill(other, signal.SIGKILL)
    return worst


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _child(request: dict[str, Any], rank: int) -> None:
    status = 1
    try:
        if request["ranks"] > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["ranks"], "MASTER_PORT": request["port"]}
            names |= {"LOCAL_WORLD_SIZE": request["ranks"], "MASTER_ADDR": "127.0.0.1"}
            os.environ.update({name: str(value) for name, value in names.items()})
            os.environ.update((BACKENDS | OFFLOADED)[request["backend"]] | request["environment"])
        if rank:
            request |= {"out": request["out"] + str(rank), "err": request["err"] + str(rank)}
        for path, target in ((os.devnull, 0), (request["out"], 1), (request["err"], 2)):
            flags = os.O_RDONLY if target == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(path, flags, 0o644), target)
        os.chdir(request["cwd"])
        if request["file_size_limit"] is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size_limit"],) * 2)
        fault = dict(request["fault"] or {})
        if fault and rank == fault.pop("rank", 0):
            _arm(**fault)
        if request["unreadable"] is not None:
            refuse(*request["unreadable"])
        if request["command"] == "python":
            _python(request["argv"])
            status = 0
        else:
            import prefopt.cli

            status = getattr(prefopt.cli, request["command"])(request["argv"])
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _python(argv: list[str]) -> None:
    """Run a script, or `-m MODULE`, as the interpreter would have."""
    import runpy

    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        runpy.run_path(argv[0], run_name="__main__")


def _arm(at: str, do: str, when: str = "before", count: int = 1) -> None:
    """Replace the function at `module:dotted.name` by one that does the fault at its `count`-th call."""
    module, _, dotted = at.partition(":")
    *parents, name = dotted.split(".")
    owner: Any = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        hit = calls == count
        if hit and when == "before":
            _happen(do, args)
        result = original(*args, **kwargs)
        if hit and when == "after":
            _happen(do, args)
        return result

    setattr(owner, name, wrapped)
    if getattr(original, "__module__", None) != module:
        return  # named where it is used: only there
    for loaded in [module for key, module in sys.modules.items() if key.startswith("prefopt")]:
        for alias, value in list(vars(loaded).items()):
            if value is original:  # imported by name before the fault was armed
                setattr(loaded, alias, wrapped)


def _happen(do: str, args: tuple[Any, ...]) -> None:
    if do == "ENOSPC":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if do == "WORSE":  # args: the metrics file and the line
        args[1]["loss"] = 99.0
        return
    if do == "NAN":  # args: the trainer
        import torch

        with torch.no_grad():
            next(iter(args[0].run.policy.lm.parameters())).fill_(float("nan"))
        return
    if do == "HALF_LINE":  # args: the metrics file and the line
        with args[0].path.open("a") as file:
            file.write(json.dumps(args[1])[:20])
        do = "SIGKILL"
    os.kill(os.getpid(), getattr(signal, do))


if __name__ == "__main__":
    _serve()
