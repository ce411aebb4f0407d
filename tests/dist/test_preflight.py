"""What is found before any model is loaded: one line from the first process, all of them end."""

from types import SimpleNamespace

import pytest

from prefopt.engine import preflight
from prefopt.errors import TrainError
from tests.dist.ranks import run_ranks


def test_run_with_more_processes_than_pairs_is_refused(server, command, tmp_path):
    argv = command("dpo", tmp_path / "run", train__global_batch=1, train__micro_batch=1)
    ended = server.train(argv, ranks=2)
    assert ended.status == 2
    assert ended.err.splitlines()[-1] == (
        "error: train.global_batch: found 1 with 2 processes, expected a pair for each of them at least"
    )


def test_processes_of_other_versions_are_named():
    ours = {"python": "3.11.7", "torch": "2.13.0"}
    preflight.same_versions([("process 0 on a", ours), ("process 1 on b", dict(ours))])
    with pytest.raises(TrainError) as error:
        preflight.same_versions([("process 0 on a", ours), ("process 1 on b", ours | {"torch": "2.12.0"})])
    assert str(error.value) == (
        "launcher: process 1 on b has torch 2.12.0, process 0 on a has 2.13.0; expected one environment on all nodes"
    )


def _see(runtime, folder, other):
    mine = folder if runtime.is_main else other  # as on a node that has another disk there
    mine.mkdir(parents=True, exist_ok=True)
    try:
        preflight.shared_folder(runtime, mine)
    except TrainError as error:
        return str(error)
    return None


def test_folder_that_a_process_does_not_see_is_refused_on_all(tmp_path):
    assert run_ranks(_see, tmp_path / "a", tmp_path / "a") == [None, None]
    for said in run_ranks(_see, tmp_path / "a", tmp_path / "b"):
        assert "process 1 on" in said
        assert "does not see what process 0 has written there; expected a folder that all nodes share" in said
    assert not list((tmp_path / "a").iterdir())


def test_checkpoints_that_the_disk_has_no_room_for_are_refused_before_the_model_is_loaded(
    server, command, tmp_path, monkeypatch
):
    from prefopt.config import parse

    config = parse(command("dpo", tmp_path / "run"))
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5e9))
    preflight.room_for_checkpoints(config, 10**8, tmp_path)
    with pytest.raises(TrainError, match=r"^--output .*: 40 GB are needed for 2 checkpoints and the model, found 5 GB free"):
        preflight.room_for_checkpoints(config, 10**9, tmp_path)
