"""Stages on disk."""

import errno
import json

import datasets
import pytest

from prefopt.errors import RoundError
from prefopt.rounds import store
from prefopt.rounds.store import Stage
from prefopt.settings import parse
from prefopt.storage import Unreadable

KEYS = [["a", "b"], ["c"]]


def rows(shard):
    return [{"key": key, "value": float("nan") if key == "c" else 1.5} for key in KEYS[shard]]


@pytest.fixture
def said():
    return []


@pytest.fixture
def stage(tmp_path, said):
    return Stage(tmp_path / "round_01", "candidates", {"seed": 3, "policy": "abc"}, KEYS, said.append)


def finish(stage):
    assert not stage.begin()
    for number in stage.missing():
        stage.write(number, rows(number))
        stage.note({"engine": "x"})
    stage.finish({"kept": 3})
    assert store.read_manifest(stage.manifest_path)["about"] == {"engine": "x"}


def test_stage_is_done_when_its_manifest_and_its_shards_agree(stage):
    finish(stage)
    assert stage.begin()
    assert [row["key"] for row in stage.rows()] == ["a", "b", "c"]
    assert store.finished(stage.folder, "candidates")


def test_shards_are_read_by_datasets_and_hold_no_nan(stage, tmp_path):
    finish(stage)
    table = datasets.load_dataset("json", data_dir=str(stage.folder / "candidates"), cache_dir=str(tmp_path / "hf"))
    assert table["train"]["value"][:] == [1.5, 1.5, None]
    assert "NaN" not in stage.shard_path(1).read_text()


def test_half_finished_stage_goes_on_at_its_first_missing_shard(stage):
    stage.begin()
    stage.write(1, rows(1))
    assert not stage.begin()
    assert stage.missing() == [0]


def test_damaged_shard_of_an_unfinished_stage_is_made_again(stage, said):
    stage.begin()
    text = "".join(store._lines(rows(0)))
    for damaged in (text[:-5], text.splitlines()[0] + "\n", text.replace("1.5", "1.7"), "\0" * len(text), ""):
        stage.write(0, rows(0))
        assert stage.missing() == [1]
        stage.shard_path(0).write_text(damaged)
        assert not stage.begin()
        assert said.pop() == f"{stage.shard_path(0)}: does not match the hash it was written with; it is made again"
        assert stage.missing() == [0, 1]
    stage.write(0, rows(0))
    beside = stage.folder / ".candidates/00000.json"
    for spoil in (beside.unlink, lambda: beside.write_text("{")):
        stage.write(0, rows(0))
        spoil()
        assert not stage.begin()
        assert said.pop().endswith("; it is made again")
        assert stage.missing() == [0, 1]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("name", ["00000.jsonl", "candidates.json", ".candidates/00000.json"])
def test_stage_whose_files_cannot_be_read_just_now_stops_and_keeps_them(name, number, stage, unreadable):
    stage.begin()
    stage.write(0, rows(0))
    unreadable(name, number)
    with pytest.raises(Unreadable, match=f"{name}: cannot be read just now: "):
        stage.begin()
    unreadable(None)
    assert not stage.begin()
    assert stage.missing() == [1]


def test_input_that_an_older_version_did_not_note_is_not_held_against_it(stage):
    finish(stage)
    newer = Stage(stage.folder, stage.name, {**stage.inputs, "generation_config": "abc"}, KEYS)
    assert newer.begin()


def test_rows_of_a_shard_that_is_gone_are_not_none(stage):
    with pytest.raises(RoundError, match=r"00000\.jsonl: is missing; run again"):
        stage.read(0)


def test_truncated_shard_of_a_finished_stage_is_made_again_and_must_be_what_it_was(stage, said):
    finish(stage)
    before = stage.hash()
    stage.shard_path(0).write_text("")
    assert not stage.begin()
    assert "does not match its hash in the manifest; it is made again" in said.pop()
    finish(stage)
    assert stage.hash() == before
    stage.shard_path(0).unlink()
    stage.begin()
    assert "is missing" in said.pop()
    stage.write(0, [{"key": "a", "value": 2}, {"key": "b", "value": 2}])
    with pytest.raises(RoundError, match="made again, it is not what it was"):
        stage.finish({})


def test_manifest_that_was_edited_by_hand_is_refused(stage):
    finish(stage)
    path = stage.manifest_path
    edited = json.loads(path.read_text())
    edited["counts"]["kept"] = 4
    for text in (json.dumps(edited), path.read_text()[:-20], "[]", "{}"):
        path.write_text(text)
        with pytest.raises(
            RoundError, match=r"candidates\.json: does not match its own hash: it was edited or damaged"
        ):
            stage.begin()
    path.unlink()
    assert not stage.begin()
    assert stage.missing() == []  # the shards were kept


def test_stage_made_from_other_inputs_is_refused(stage):
    finish(stage)
    other = Stage(stage.folder, stage.name, {"seed": 3, "policy": "xyz"}, KEYS)
    with pytest.raises(
        RoundError, match=r"made from another policy \(abc -> xyz\); choose another --output, or delete"
    ):
        other.begin()


def test_rows_of_other_prompts_are_refused(stage):
    stage.begin()
    with pytest.raises(RoundError, match="1 rows for 2 prompts"):
        stage.write(0, rows(1))


def test_disk_that_is_full_loses_no_finished_shard(stage, monkeypatch):
    stage.begin()
    stage.write(0, rows(0))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        RoundError, match=r"00001\.jsonl: cannot be written: No space left on device; finished shards are"
    ):
        stage.write(1, rows(1))
    assert stage.missing() == [1]
    assert not list(stage.folder.rglob("*.tmp"))


def test_half_of_a_surrogate_pair_does_not_stop_a_stage(tmp_path):
    store.write_rows(tmp_path / "rows.jsonl", [{"text": "cut \ud83d"}])
    assert store.read_rows(tmp_path / "rows.jsonl") == [{"text": "cut ?"}]


def test_manifest_that_another_process_has_begun_is_left_as_it_is(stage):
    finish(stage)
    store.write_manifest(stage.manifest_path, {"stage": "candidates", "finished": False}, only_new=True)
    assert store.read_manifest(stage.manifest_path)["finished"]


def test_evaluation_is_not_done_while_the_run_to_compare_with_has_come_further(tmp_path):
    mine, other = tmp_path / "mine/round_01", tmp_path / "other/round_01"
    argv = ["--method", "sppo", "--rounds.count", "1"]
    alone, compared = parse(argv), parse([*argv, "--rounds.compare", str(tmp_path / "other")])
    assert not store.done(alone, mine, "evaluate")
    store.write_manifest(mine / "evaluate.json", {"inputs": {}})
    assert store.done(alone, mine, "evaluate")
    assert store.done(compared, mine, "evaluate"), "there is nothing to compare with yet"
    store.write_manifest(other / "held_out.json", {"finished": True, "shards": {}})
    assert not store.done(compared, mine, "evaluate")
    store.write_manifest(mine / "evaluate.json", {"inputs": {"other": "its hash"}})
    assert store.done(compared, mine, "evaluate")
