"""One owner of a lock at a time, however its file is treated."""

import fcntl
import os

import pytest

from prefopt import storage
from prefopt.errors import PrefoptError
from prefopt.storage import Lock


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
