"""A real Slurm of two nodes on this machine, without systemd: munge, a controller, and a slurmd for each node.

`python -m tests.slurm.cluster up|down` does it by hand; `up` prints the SLURM_CONF to export.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "munge")
NODES = ("n1", "n2")
CPUS = 4  # of each node, whatever the machine has: tests wait for each other more than they compute

CONF = """\
ClusterName=prefopt
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool.%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
SlurmdParameters=config_overrides
KillWait=5
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


class NoCluster(Exception):
    """Slurm cannot be started here; the text says why."""


def install() -> None:
    """Install the Debian packages where the programs are missing. Raises: NoCluster."""
    os.environ["PATH"] = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if os.geteuid() != 0:
        raise NoCluster("needs root, to start slurmd")
    if all(map(shutil.which, PROGRAMS)):
        return
    if shutil.which("apt-get") is None:
        raise NoCluster(f"{', '.join(p for p in PROGRAMS if not shutil.which(p))} not found, and there is no apt-get")
    quiet = {"env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, "capture_output": True, "text": True}
    for words in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", "--quiet=2", *words], **quiet)
        if done.returncode != 0:
            raise NoCluster(f"apt-get {words[0]} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise NoCluster(f"{', '.join(missing)} not found after the installation of {', '.join(PACKAGES)}")


def until(holds: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until something holds. Raises: TimeoutError that says what did not."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(0.1)


@dataclass(frozen=True)
class Cluster:
    """Args: home: an empty folder with a short path, for a socket in it."""

    home: Path

    @property
    def conf(self) -> Path:
        return self.home / "slurm.conf"

    def up(self) -> None:
        """Start everything and wait for two idle nodes. Raises: NoCluster."""
        install()
        os.environ["SLURM_CONF"] = str(self.conf)
        try:
            self._munge()
            self._configure()
            self._start("slurmctld", "-f", str(self.conf))
            for node in NODES:
                self._start("slurmd", "-N", node, "-f", str(self.conf))
            until(lambda: self.idle() == len(NODES), 60, "two idle nodes")
        except (OSError, subprocess.SubprocessError, TimeoutError) as error:
            logs = [log.read_text().splitlines()[-1:] for log in self.home.glob("slurm*.log")]
            self.down()
            raise NoCluster(f"{error}; {logs}") from error

    def down(self) -> None:
        """Stop what `up` started, by the numbers in its own files."""
        for name in (*(f"slurmd.{node}" for node in NODES), "slurmctld", "munge/munged"):
            path = self.home / f"{name}.pid"
            try:
                pid = int(path.read_text())
                os.kill(pid, 15)
                until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 20, f"end of {name}")
            except (OSError, ValueError, TimeoutError):
                continue

    def crash(self, node: str) -> None:
        """What is left when a node loses its power: nothing of Slurm's there, nor of any job."""
        pid = int((self.home / f"slurmd.{node}.pid").read_text())
        tasks = [task for task in processes() if f"SLURMD_NODENAME={node}".encode() in environment_of(task)]
        for dead in {pid, *map(parent_of, tasks), *tasks}:  # a task's parent is its slurmstepd
            with contextlib.suppress(ProcessLookupError):
                os.kill(dead, signal.SIGKILL)

    def boot(self, node: str) -> None:
        """The node comes back."""
        self._start("slurmd", "-N", node, "-f", str(self.conf))

    def idle(self) -> int:
        found = subprocess.run(["sinfo", "-h", "-N", "-o", "%t"], capture_output=True, text=True)
        return found.stdout.split().count("idle")

    def _start(self, *command: str) -> None:
        """A daemon, which leaves its parent."""
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    def _munge(self) -> None:
        """A munged of its own, with a key of its own: the machine's is left alone."""
        folder = self.home / "munge"
        folder.mkdir(parents=True)
        folder.chmod(0o755)
        key = folder / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        names = {"socket": "socket", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "seed"}
        files = [f"--{flag}={folder / name}" for flag, name in names.items()]
        self._start("munged", "--force", f"--key-file={key}", *files)
        until((folder / "socket").exists, 10, "munge's socket")

    def _configure(self) -> None:
        host = socket.gethostname().partition(".")[0]
        memory = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20) - 512
        ports = free_ports(1 + len(NODES))
        lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory={memory}"
            for node, port in zip(NODES, ports[1:], strict=True)
        ]
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.home / name).mkdir()
        names = ",".join(NODES)
        text = CONF.format(host=host, port=ports[0], home=self.home, nodes="\n".join(lines), names=names)
        self.conf.write_text(text)


def processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def environment_of(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    servers = [socket.socket() for _ in range(count)]
    try:
        for server in servers:
            server.bind(("127.0.0.1", 0))
        return [server.getsockname()[1] for server in servers]
    finally:
        for server in servers:
            server.close()


if __name__ == "__main__":
    by_hand = Cluster(Path("/tmp/prefopt-slurm"))
    if sys.argv[1:] == ["up"]:
        by_hand.up()
        print(f"export SLURM_CONF={by_hand.conf}")
    else:
        by_hand.down()
        shutil.rmtree(by_hand.home, ignore_errors=True)
