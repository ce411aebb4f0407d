"""What a file holds is read once, and again as soon as it might hold something else."""

import hashlib
import os
import time

import pytest

from prefopt.data import content
from prefopt.data.content import file_hash
from prefopt.errors import DataError


@pytest.fixture
def reads(monkeypatch):
    """The files that were read to be hashed."""
    read, real = [], content._read

    def counted(path):
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(content, "_read", counted)
    return read


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file that nobody has changed lately, so far as the module knows."""
    monkeypatch.setattr(content, "SETTLED", -1.0)
    path = tmp_path / "pairs.jsonl"
    path.write_text("one")
    return path


def test_hash_when_the_file_is_untouched_then_is_read_once(file, tmp_path, reads):
    expected = hashlib.sha256(b"one").hexdigest()
    assert [file_hash(file, tmp_path / "hashes") for _ in range(3)] == [expected] * 3
    assert reads == ["pairs.jsonl"]
    assert file_hash(file) == expected
    assert len(reads) == 2, "nothing is remembered without a place for it"


@pytest.mark.parametrize("change", ["content", "same size and mtime", "another file of the same name"])
def test_hash_when_the_file_has_changed_then_is_read_again(file, tmp_path, reads, change):
    memory = tmp_path / "hashes"
    file_hash(file, memory)
    stat = file.stat()
    time.sleep(0.02)  # the kernel's clock moves on
    if change == "content":
        file.write_text("three")
    elif change == "same size and mtime":
        file.write_text("two")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        (tmp_path / "new").write_text("two")
        os.utime(tmp_path / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        (tmp_path / "new").replace(file)
    assert file_hash(file, memory) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert reads == ["pairs.jsonl"] * 2


def test_hash_when_the_file_was_changed_a_moment_ago_then_is_not_remembered(file, tmp_path, reads, monkeypatch):
    monkeypatch.setattr(content, "SETTLED", 2.0)
    for _ in range(2):
        file_hash(file, tmp_path / "hashes")
    assert len(reads) == 2


def test_hash_when_the_file_changes_while_it_is_read_then_is_not_remembered(file, tmp_path, monkeypatch):
    real = content._read

    def read(path):
        digest = real(path)
        path.write_text("changed meanwhile")
        return digest

    monkeypatch.setattr(content, "_read", read)
    file_hash(file, tmp_path / "hashes")
    monkeypatch.setattr(content, "_read", real)
    assert file_hash(file, tmp_path / "hashes") == hashlib.sha256(b"changed meanwhile").hexdigest()


@pytest.mark.parametrize("note", ["{", "[]", "\0" * 99, '{"sha256": "x"}', '{"sha256": "x", "state": null}'])
def test_hash_when_what_is_remembered_is_damaged_then_the_file_is_read(file, tmp_path, note):
    memory = tmp_path / "hashes"
    expected = file_hash(file, memory)
    (path,) = memory.glob("*.json")
    path.write_text(note)
    assert file_hash(file, memory) == expected


def test_hash_when_nothing_can_be_remembered_then_the_file_is_read(file, reads):
    assert file_hash(file, file / "hashes") == hashlib.sha256(b"one").hexdigest()
    assert reads == ["pairs.jsonl"]


def test_hash_when_the_file_is_gone_then_one_line_says_so(file, tmp_path):
    file_hash(file, tmp_path / "hashes")
    file.unlink()
    with pytest.raises(DataError) as error:
        file_hash(file, tmp_path / "hashes")
    assert str(error.value) == f"{file}: cannot be read: No such file or directory"
