"""Starting is cheap: what is imported when, never how long it takes. Times: benchmarks/startup.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
UNUSED = {"peft", "trl", "matplotlib", "bitsandbytes", "wandb", "tensorboard", "openai"}  # by a plain run
HEAVY = UNUSED | {"torch", "transformers", "accelerate", "datasets", "scipy", "numpy"}


def loaded(code, *argv, among, cache=None):
    """Which of the packages `among` a new process has loaded after `code`."""
    code = (
        f"import atexit, sys\natexit.register(lambda: print('loaded:', *sorted({among!r} & set(sys.modules))))\n{code}"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"PREFOPT_CACHE": str(cache)} if cache else {}
    ended = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    *said, last = ended.stdout.splitlines()
    assert last.startswith("loaded:")
    return last.removeprefix("loaded:").split(), said


def test_package_when_imported_then_nothing_heavy_is():
    assert loaded("import prefopt, prefopt.__main__, prefopt.cli", among=HEAVY)[0] == []
    assert loaded("import torch", among={"torch"})[0] == ["torch"], "the question can be answered with yes"


@pytest.mark.parametrize("command", ["train", "rounds", "infer"])
def test_help_when_asked_for_then_nothing_heavy_is_imported(command):
    code = "import sys\nfrom prefopt.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    found, said = loaded(code, command, "--help", among=HEAVY)
    assert found == []
    assert len(said) > 20


def test_run_when_started_then_only_what_it_needs_is_imported(command, tmp_path):
    code = "import sys\nfrom prefopt.cli import train\nsys.exit(train(sys.argv[1:]))"
    found, said = loaded(code, *command("dpo", tmp_path / "run", dry_run=True), among=UNUSED, cache=tmp_path)
    assert found == []
    assert "settings that differ from the defaults:" in said
