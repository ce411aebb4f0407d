import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, NoCluster, until

ROOT = Path(__file__).resolve().parent.parent.parent
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")


@dataclass(frozen=True)
class Place:
    """A folder like a clone, from which jobs are submitted."""

    folder: Path
    environment: dict[str, str]
    cluster: Cluster

    def shell(self, command: str, status: int = 0) -> str:
        """What a command line says. Its exit status must be this one."""
        done = subprocess.run(
            command, shell=True, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == status, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def submit(self, command: str) -> str:
        """Submit with `sbatch --parsable ...`. Returns the job's number."""
        return self.shell(command).strip()

    def about(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.shell(f"scontrol --oneliner show job {job}")))

    def state(self, job: str) -> str:
        return self.about(job)["JobState"]

    def wait(self, job: str, seconds: float = 240) -> dict[str, str]:
        """Wait for the end of a job that must complete."""
        until(lambda: self.state(job) in ENDED, seconds, f"the end of job {job}, which is {self.state(job)}")
        about = self.about(job)
        log = Path(about["StdOut"])
        assert about["JobState"] == "COMPLETED", log.read_text()[-3000:] if log.exists() else about
        return about

    def wait_for_all(self, seconds: float = 400) -> None:
        """Wait until the queue is empty."""
        until(lambda: not self.shell("squeue --noheader").strip(), seconds, self.shell("squeue"))

    def wait_for_step(self, output: str, step: int) -> None:
        """Wait until a run has logged a step."""
        path = self.folder / output / "metrics.jsonl"
        until(
            lambda: path.exists() and f'"step": {step}, "split": "train"' in path.read_text(), 240, f"{output}: {step}"
        )

    def weights(self, output: str) -> bytes:
        return (self.folder / output / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    home = Path(f"/tmp/prefopt-slurm-{os.getpid()}")
    cluster = Cluster(home)
    try:
        cluster.up()
    except NoCluster as error:
        shutil.rmtree(home, ignore_errors=True)
        pytest.skip(f"no Slurm here: {error}")
    folder = tmp_path_factory.mktemp("clone")
    for name in ("scripts", "configs", "prefopt", "slurm", "tests"):
        (folder / name).symlink_to(ROOT / name)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_CONF": str(cluster.conf),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    environment["PYTHONPATH"] = str(ROOT)  # whatever is installed
    place = Place(folder, environment, cluster)
    yield place
    subprocess.run(["scancel", "--user=root"], env=environment)
    cluster.down()
    shutil.rmtree(home, ignore_errors=True)
