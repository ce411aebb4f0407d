"""Folders are whole or absent, and their manifests notice every change."""

import contextlib
import json

from prefopt import storage


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


def test_folder_when_it_is_built_beside_then_it_appears_whole_or_leaves_nothing(tmp_path):
    final = tmp_path / "key"
    with storage.built_beside(final) as scratch:
        (scratch / "a").write_text("text")
        assert not final.exists()
        storage.put_in_place(scratch, final)
    assert (final / "a").read_text() == "text"
    with contextlib.suppress(ValueError), storage.built_beside(tmp_path / "other") as scratch:
        (scratch / "a").write_text("te")
        raise ValueError("half")
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_folder_when_a_killed_builder_has_left_one_then_the_next_that_is_alone_removes_it(tmp_path):
    (tmp_path / ".key.abcd.tmp").mkdir()
    (tmp_path / ".keys.abcd.tmp").mkdir()
    with storage.built_beside(tmp_path / "key"):
        pass
    assert (tmp_path / ".key.abcd.tmp").exists(), "another process may be building it"
    with storage.built_beside(tmp_path / "key", alone=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".keys.abcd.tmp"]
