"""One reader and one writer: missing, damaged and unreadable just now are told apart, whatever the file."""

import contextlib
import errno
import fcntl
import json
import os
import re

import pytest

from prefopt import storage
from prefopt.errors import PrefoptError
from prefopt.storage import Damaged, Lock, Unreadable

OUT_OF_REACH = [errno.EIO, errno.ESTALE, errno.EACCES]


@pytest.fixture
def sealed(tmp_path):
    path = tmp_path / "state.json"
    storage.write_sealed(path, {"step": 3, "names": ["a", "b"], "loss": 0.1})
    return path


def test_sealed_object_when_read_again_then_is_what_was_written(sealed):
    assert storage.read_sealed(sealed) == {"step": 3, "names": ["a", "b"], "loss": 0.1}
    assert storage.read_sealed(sealed.with_name("other.json")) is None


def test_sealed_object_when_any_bit_of_it_is_flipped_then_it_is_damaged(sealed):
    whole = sealed.read_bytes()
    found = []
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        sealed.write_bytes(data)
        with contextlib.suppress(Damaged):
            found.append(storage.read_sealed(sealed))
    assert found == [{"step": 3, "names": ["a", "b"], "loss": 0.1}] * len(found), "white space alone"
    assert len(found) < 30


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 4096, b"[]", b"{}", b"null", b'"text"', b"{" * 5000, b"\xff\xfe", b"1" * 9999]
)
def test_sealed_object_when_the_file_holds_something_else_then_it_is_damaged(content, sealed):
    sealed.write_bytes(content)
    with pytest.raises(Damaged, match=re.escape(str(sealed))):
        storage.read_sealed(sealed)


def test_object_of_an_older_version_is_read_only_where_that_is_asked_for(sealed):
    sealed.write_text('{"step": 3}')
    assert storage.read_sealed(sealed, unsealed=True) == {"step": 3}
    with pytest.raises(Damaged):
        storage.read_sealed(sealed)
    sealed.write_text('{"step": 3, "sha256": "edited"}')
    with pytest.raises(Damaged):
        storage.read_sealed(sealed, unsealed=True)


@pytest.mark.parametrize("number", OUT_OF_REACH)
def test_readers_when_a_file_is_out_of_reach_then_none_takes_it_for_missing(number, sealed, unreadable):
    folder = sealed.parent
    storage.seal(folder)
    readers = [
        lambda: storage.read_bytes(sealed),
        lambda: storage.read_json(sealed),
        lambda: storage.read_sealed(sealed),
        lambda: storage.is_there(sealed),
        lambda: storage.sha256(sealed),
        lambda: storage.damage(folder),
        lambda: storage.is_held(sealed),
    ]
    unreadable("state.json", number)
    for reader in readers:
        with pytest.raises(Unreadable, match=f"state.json: cannot be read just now: {os.strerror(number)}; nothing "):
            reader()
    unreadable(folder.name, number)
    with pytest.raises(Unreadable):
        storage.listing(folder)


def test_what_is_missing_is_no_error(tmp_path):
    gone = tmp_path / "a file" / "in it"
    (tmp_path / "a file").write_text("")
    for path in (gone, tmp_path / "none"):
        assert storage.read_bytes(path) is None
        assert not storage.is_there(path)
        assert storage.listing(path) == []
        assert not storage.is_held(path / ".lock")
        with pytest.raises(FileNotFoundError):
            storage.sha256(path)


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


# Locks ----------------------------------------------------------------------------------------------------------------


def test_lock_when_its_file_is_deleted_or_replaced_then_still_lets_nobody_in(tmp_path):
    path = tmp_path / ".lock"
    lock = Lock(path, folder=True)
    assert lock.take()
    assert storage.owner_of(path) == (os.getpid(), os.uname().nodename)
    path.unlink()
    assert storage.is_held(path)
    assert not Lock(path, folder=True).take()
    path.write_text("")
    assert not Lock(path, folder=True).take()
    lock.release()
    assert not storage.is_held(path)
    assert Lock(path, folder=True).take()


def test_lock_when_its_file_is_deleted_while_another_waits_then_the_file_that_is_there_is_locked(tmp_path, monkeypatch):
    path, flock = tmp_path / ".lock", fcntl.flock
    calls = []

    def deleted_meanwhile(descriptor, how):
        flock(descriptor, how)
        if not calls:
            path.unlink()
        calls.append(how)

    monkeypatch.setattr(fcntl, "flock", deleted_meanwhile)
    lock = Lock(path)
    assert lock.take()
    assert len(calls) == 2
    assert storage.is_held(path)


def test_locks_when_shared_then_each_other_only(tmp_path):
    path = tmp_path / ".lock"
    one, two = (Lock(path, shared=True, folder=True) for _ in range(2))
    assert one.take()
    assert two.take()
    assert not Lock(path, folder=True).take()


@pytest.mark.parametrize("kind", ["link", "dangling link", "fifo", "a file of a user", "folder"])
def test_lock_when_its_place_is_taken_by_something_else_then_that_is_left_alone(kind, tmp_path):
    path, target = tmp_path / ".lock", tmp_path / "thesis.tex"
    if kind == "link":
        target.write_text("chapter 1")
        path.symlink_to(target)
    elif kind == "dangling link":
        path.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text("chapter 1")
    with pytest.raises(
        PrefoptError,
        match=r"\.lock: (cannot be a lock: |cannot be opened: |is not a lock of prefopt; move it away, or)",
    ):
        Lock(path, folder=True).take()
    assert not target.exists() or target.read_text() == "chapter 1"
    if kind == "a file of a user":
        assert path.read_text() == "chapter 1"
    assert not storage.is_held(tmp_path / "other")  # the folder was let go


def test_folder_when_any_of_its_files_changes_then_it_is_damaged(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a", "sub/b"):
        (tmp_path / name).write_text("text")
    storage.seal(tmp_path)
    assert storage.damage(tmp_path) is None
    assert json.loads((tmp_path / storage.MANIFEST).read_text()).keys() == {"a", "sub/b"}
    (tmp_path / "sub/b").write_text("tekt")
    assert storage.damage(tmp_path) == "b does not match its hash"
    (tmp_path / "sub/b").unlink()
    (tmp_path / "sub/b").mkdir()
    assert storage.damage(tmp_path) == "b is no file"


def test_text_when_it_begins_with_a_byte_order_mark_then_that_is_no_part_of_it(tmp_path):
    (tmp_path / "judge.txt").write_bytes("\ufeff{prompt}".encode())
    assert storage.read_text(tmp_path / "judge.txt") == "{prompt}"


def test_file_when_it_is_a_pipe_then_it_is_out_of_reach_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "state.json")
    for read in (storage.read_bytes, storage.read_json, storage.sha256):
        with pytest.raises(Unreadable, match=r"state.json: cannot be read just now: is a named pipe"):
            read(tmp_path / "state.json")
