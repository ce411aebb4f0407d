"""Fixtures of the tests of settings."""

import textwrap
from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text, name="x.yaml"):
        Path(name).write_text(textwrap.dedent(text))
        return ["--config", name]

    return write
