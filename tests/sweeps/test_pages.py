"""The sweep files that the pages show, and those that come with the clone, give runs."""

import re
from pathlib import Path

import pytest

from prefopt.sweeps import expand, sweep_file

ROOT = Path(__file__).resolve().parent.parent.parent
BLOCKS = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "sweeps.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_sweep_file_on_the_page_gives_runs(number, runs):
    assert runs(BLOCKS[number])


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_sweep_file_of_the_clone_gives_runs_and_says_how_it_is_started(path):
    assert expand.runs_of(sweep_file.read(path))
    assert path.read_text().startswith("# ")
    assert f"# python scripts/sweep.py configs/sweeps/{path.name}\n" in path.read_text()
