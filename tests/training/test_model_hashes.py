"""A model is known by all that decides what its weights are, wherever in its folder that is."""

import errno
import hashlib

import pytest

from prefopt.storage import Unreadable
from prefopt.training import model_hashes


@pytest.fixture
def folder(tmp_path):
    model = tmp_path / "model"
    (model / "parts").mkdir(parents=True)
    (tmp_path / "other_disk").mkdir()
    (model / "more").symlink_to(tmp_path / "other_disk")
    (model / "loop").symlink_to(model)
    for name in ("config.json", "model.safetensors.index.json", "a.safetensors", "parts/b.safetensors", "code.py"):
        (model / name).write_text(name)
    (tmp_path / "other_disk" / "c.safetensors").write_text("c")
    return model


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "model.safetensors.index.json", "a.safetensors", "parts/b.safetensors"),
        *("more/c.safetensors", "code.py"),
    ],
)
def test_fingerprint_when_any_part_of_a_model_changes_then_it_is_another(name, folder):
    before = model_hashes.fingerprint(str(folder), None)
    (folder / name).write_text("changed")
    changed = model_hashes.fingerprint(str(folder), None)
    (folder / name).rename(folder / name.replace(".", "_other.", 1))
    assert len({before, changed, model_hashes.fingerprint(str(folder), None)}) == 3


def test_fingerprint_when_what_is_no_part_of_the_model_changes_then_it_is_the_same(folder):
    before = model_hashes.fingerprint(str(folder), None)
    (folder / ".cache").mkdir()
    for name in ("README.md", "generation_config.json", ".cache/x.safetensors", "tokenizer.json"):
        (folder / name).write_text(name)
    assert model_hashes.fingerprint(str(folder), None) == before


def test_fingerprint_of_a_folder_without_index_and_folders_is_what_it_was_in_earlier_versions(tmp_path):
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text(name)
        digest.update(name.encode() + hashlib.sha256(name.encode()).digest())
    assert model_hashes.fingerprint(str(tmp_path), None) == digest.hexdigest()[:16]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_fingerprint_when_a_part_cannot_be_read_just_now_then_stops(number, folder, unreadable):
    unreadable("b.safetensors", number)
    with pytest.raises(Unreadable, match=r"parts/b\.safetensors: cannot be read just now"):
        model_hashes.fingerprint(str(folder), None)


def test_generation_config_is_known_by_its_content(tmp_path):
    assert model_hashes.generation_config_hash(str(tmp_path)) is None
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    first = model_hashes.generation_config_hash(str(tmp_path))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert None is not first != model_hashes.generation_config_hash(str(tmp_path))
