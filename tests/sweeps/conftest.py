import textwrap

import pytest

from prefopt.sweeps import expand, sweep_file


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a sweep file, in a folder of its own that is the working folder then."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="sweep.yaml"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write


@pytest.fixture
def runs(write):
    """The runs of a sweep file's text."""
    return lambda text: expand.runs_of(sweep_file.read(write(text).relative_to(write(text).parent)))
