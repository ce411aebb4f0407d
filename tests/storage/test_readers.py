"""Missing, damaged and unreadable just now are told apart by every reader."""

import errno
import os

import pytest

from prefopt import storage
from prefopt.storage import Unreadable

OUT_OF_REACH = [errno.EIO, errno.ESTALE, errno.EACCES]


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


def test_text_when_it_begins_with_a_byte_order_mark_then_that_is_no_part_of_it(tmp_path):
    (tmp_path / "judge.txt").write_bytes("\ufeff{prompt}".encode())
    assert storage.read_text(tmp_path / "judge.txt") == "{prompt}"


def test_file_when_it_is_a_pipe_then_it_is_out_of_reach_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "state.json")
    for read in (storage.read_bytes, storage.read_json, storage.sha256):
        with pytest.raises(Unreadable, match=r"state.json: cannot be read just now: is a named pipe"):
            read(tmp_path / "state.json")
