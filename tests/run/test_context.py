"""The context of a run: its work finds the output locked and the ranks joined, and errors of the disk are one line."""

import errno
import os

import pytest

from prefopt.errors import ConfigError, TrainError
from prefopt.run.context import run_in_context
from prefopt.settings import parse
from prefopt.storage import Unreadable, is_held
from prefopt.training import signals


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(signals.Stop, "install", lambda *args: None)  # the handlers are pytest's here
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    return parse(["--method", "dpo", "--output", str(tmp_path / "run")])


@pytest.mark.parametrize("status", [0, 75])
def test_work_when_it_runs_then_holds_the_output_and_gives_the_status(status, config, tmp_path, capsys):
    held = []

    def work(runtime):
        held.append((is_held(tmp_path / "run" / ".lock"), runtime.world))
        return status

    assert run_in_context(config, work) == status
    assert held == [(True, 1)]
    assert not is_held(tmp_path / "run" / ".lock")
    assert capsys.readouterr().out.startswith("prefopt: world size 1, backend single process, device ")


def test_work_when_another_run_writes_to_the_output_then_is_not_begun(config):
    with pytest.raises(TrainError, match="another run is writing here"):
        run_in_context(config, lambda runtime: run_in_context(config, lambda runtime: pytest.fail("two runs at once")))


def test_parts_of_a_stage_when_they_run_at_once_then_share_the_output(config):
    assert run_in_context(config, lambda runtime: run_in_context(config, lambda runtime: 0, part="-1"), part="-0") == 0


@pytest.mark.parametrize(
    ("number", "expected", "words"),
    [
        (errno.ENOSPC, TrainError, "No space left on device; free space and run the same command again"),
        (errno.EIO, Unreadable, "cannot be read just now: Input/output error"),
        (errno.ECONNRESET, OSError, "Connection reset by peer"),
    ],
)
def test_work_when_the_system_fails_then_a_user_reads_what_to_do(number, expected, words, config, tmp_path):
    def work(runtime):
        raise OSError(number, os.strerror(number), str(tmp_path / "run" / "file"))

    with pytest.raises(expected, match=words):
        run_in_context(config, work)
    assert not is_held(tmp_path / "run" / ".lock")


def test_work_when_a_path_can_be_nothing_then_is_refused_before_the_output_is_made(config, tmp_path):
    wrong = parse(["--method", "dpo", "--model.path", "./none", "--data.train", "x.jsonl", "--output", config.output])
    with pytest.raises((ConfigError, TrainError), match=r"model\.path: '\./none' does not exist"):
        run_in_context(wrong, lambda runtime: pytest.fail("begun"))
    assert not (tmp_path / "run").exists()
