from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from prefopt import storage
from prefopt.errors import TrainError
from prefopt.storage import Unreadable
from prefopt.testbed.cache import built, cache_root


def test_built_runs_the_builder_once(tmp_path: Path) -> None:
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "a").write_text("1")

    first, second = built(tmp_path / "new", "key", build), built(tmp_path / "new", "key", build)
    assert first == second == tmp_path / "new" / "key"
    assert len(calls) == 1
    assert (first / "a").read_text() == "1"
    assert sorted(p.name for p in first.parent.iterdir()) == [".key.lock", "key"]


def test_built_leaves_nothing_when_the_builder_fails(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("1")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        built(tmp_path, "key", build)
    assert list(tmp_path.iterdir()) == []


def test_built_keeps_the_first_when_two_processes_build_at_once(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "a").write_text("mine")
        (tmp_path / "key").mkdir()  # meanwhile another process has finished
        (tmp_path / "key" / "a").write_text("theirs")
        storage.seal(tmp_path / "key")

    assert (built(tmp_path, "key", build) / "a").read_text() == "theirs"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".key.lock", "key"]


@pytest.mark.parametrize("name", ["a", "manifest.json"])
def test_built_builds_again_what_is_damaged_and_says_so(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(folder: Path) -> None:
        (folder / "a").write_text("text")

    built(tmp_path, "key", build)
    for damage in (b"tekt", b"", b"\0\0\0\0"):
        (tmp_path / "key" / name).write_bytes(damage)
        assert (built(tmp_path, "key", build) / "a").read_text() == "text"
        assert capsys.readouterr().err.startswith(f"warning: {tmp_path}/key: {name} ")
    built(tmp_path, "key", build)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_built_stops_where_it_cannot_see_what_is_there(number: int, tmp_path: Path, unreadable: Any) -> None:
    built(tmp_path, "key", lambda folder: (folder / "a").write_text("text"))
    unreadable("a", number)
    with pytest.raises(Unreadable, match="key/a: cannot be read just now"):
        built(tmp_path, "key", lambda folder: pytest.fail("built again"))


def test_built_names_the_folder_when_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match=r"file/cache: cannot write the cache: .*PREFOPT_CACHE"):
        built(tmp_path / "file" / "cache", "key", lambda folder: None)


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.delenv("PREFOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "prefopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "prefopt"
