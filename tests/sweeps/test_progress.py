"""Tables are made of metrics that are as they were written."""

import errno
import json

import pytest

from prefopt import storage
from prefopt.storage import Damaged, Unreadable
from prefopt.sweeps import manifest, progress
from prefopt.sweeps.manifest import AttemptRecord, RunStates, SweepRun


@pytest.fixture
def output(tmp_path):
    lines = [{"step": s, "split": "train", "pairs": 4, "tokens_processed": 9, "seconds": 0.5} for s in (1, 2, 3)]
    lines += [{"step": 3, "split": "eval", "loss": 0.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "checkpoints/step_00000003").mkdir(parents=True)
    state = {"step": 3, "metrics": storage.sums_of((tmp_path / "metrics.jsonl").read_bytes())}
    (tmp_path / "checkpoints/step_00000003/state.json").write_text(json.dumps(state))
    return tmp_path


def test_figures_of_a_finished_run_when_a_digit_of_its_metrics_is_another_then_the_line_is_named(output):
    assert progress.last_metrics(output) == {"loss": 0.25}
    assert progress.budget_used(output) == {"steps": 3, "pairs": 12, "tokens": 27, "seconds": 1.5}
    path = output / "metrics.jsonl"
    path.write_text(path.read_text().replace("0.25", "0.15"))
    for figures in (progress.last_metrics, progress.budget_used):
        with pytest.raises(Damaged, match=r"metrics\.jsonl:4: is not as it was written before .*00003 was saved"):
            figures(output)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_figures_when_the_metrics_cannot_be_read_just_now_then_they_are_not_none(number, output, unreadable):
    unreadable("metrics.jsonl", number)
    with pytest.raises(Unreadable):
        progress.last_metrics(output)


def test_record_of_a_run_when_damaged_or_unreadable_then_it_does_not_count_as_never_tried(tmp_path, unreadable):
    run, states = SweepRun("abc", (), str(tmp_path / "run")), RunStates(tmp_path)
    assert states.get(run) == AttemptRecord()
    states.put(run, AttemptRecord(attempts=3, status=1, error="no room"))
    assert states.get(run) == AttemptRecord(attempts=3, status=1, error="no room")
    path = tmp_path / "state/abc.json"
    unreadable("state/abc.json", errno.EIO)
    with pytest.raises(Unreadable):
        states.get(run)
    unreadable(None)
    for spoiled in (path.read_text().replace("3", "4", 1), "{", "", '{"other": 1}'):
        path.write_text(spoiled)
        with pytest.raises(Damaged, match=r"abc\.json: was edited or damaged, so the number of attempts is"):
            states.get(run)


def test_manifest_when_a_line_is_another_then_it_is_named(tmp_path):
    path = tmp_path / "manifest.jsonl"
    runs = [SweepRun(name, ("--seed", "1"), "out", settings={"seed": 1}) for name in ("abc", "def")]
    manifest.write(path, runs)
    assert manifest.read(path) == runs
    path.write_text(path.read_text().replace('"def", "argv": ["--seed", "1"', '"def", "argv": ["--seed", "7"'))
    with pytest.raises(Damaged, match=r"manifest\.jsonl:2: does not match its own hash"):
        manifest.read(path)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_run_whose_folder_cannot_be_seen_is_neither_done_nor_free(number, tmp_path, unreadable):
    run = SweepRun("abc", (), str(tmp_path))
    (tmp_path / ".lock").write_text("")
    unreadable(".lock", number)
    with pytest.raises(Unreadable):
        assert run.locked
    (tmp_path / "model").mkdir()
    (tmp_path / "model/manifest.json").write_text("{}")
    unreadable("manifest.json", number)
    with pytest.raises(Unreadable):
        assert run.done
