"""A file is whole or absent, whatever happens while it is written."""

import errno
import os

import pytest

from prefopt import storage


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_when_the_disk_fails_then_the_file_before_stands_and_nothing_is_left(call, number, sealed, monkeypatch):
    before = sealed.read_bytes()

    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*((os, "fsync", fails) if call == "fsync" else (type(sealed), "replace", fails)))
    with pytest.raises(OSError, match=os.strerror(number)):
        storage.write_sealed(sealed, {"step": 4})
    assert sealed.read_bytes() == before
    assert [path.name for path in sealed.parent.iterdir()] == ["state.json"]


def test_write_flushes_the_file_before_it_has_its_name_and_the_folder_after(tmp_path, monkeypatch):
    seen, fsync = [], os.fsync

    def spy(descriptor):
        seen.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "file").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    storage.write_whole(tmp_path / "file", ["text"])
    (scratch, before), (folder, after) = seen
    assert (scratch.endswith(".tmp"), before) == (True, False)
    assert (folder, after) == (str(tmp_path), True)


def test_sweep_removes_what_killed_writers_left_and_nothing_of_a_user(tmp_path):
    theirs = [".notes.tmp", "a.12.34.tmp", ".x.12.tmp", ".state.json.12.34.tmp.bak"]
    for name in [*theirs, ".state.json.12.34.tmp"]:
        (tmp_path / "sub").mkdir(exist_ok=True)
        (tmp_path / "sub" / name).write_text("")
    storage.sweep(tmp_path)
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == sorted(theirs)
