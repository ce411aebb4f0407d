"""What is found before any model is loaded: one line from the first process, all of them end."""

import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from prefopt.training import preflight
from prefopt.errors import TrainError
from tests.dist.ranks import free_port, run_ranks
from tests.fork_server import ROOT


def test_run_with_more_processes_than_pairs_is_refused(server, command, tmp_path):
    argv = command("dpo", tmp_path / "run", train__global_batch=1, train__micro_batch=1)
    ended = server.train(argv, ranks=2)
    assert ended.status == 2
    assert ended.err.splitlines()[-1] == (
        "error: train.global_batch: found 1 with 2 ranks, expected at least one pair per rank"
    )


def test_processes_of_other_versions_are_named():
    ours = {"python": "3.11.7", "torch": "2.13.0"}
    preflight.check_same_versions([("rank 0 on a", ours), ("rank 1 on b", dict(ours))])
    with pytest.raises(TrainError) as error:
        preflight.check_same_versions([("rank 0 on a", ours), ("rank 1 on b", ours | {"torch": "2.12.0"})])
    assert str(error.value) == (
        "launcher: rank 1 on b has torch 2.12.0, rank 0 on a has 2.13.0; expected one environment on all nodes"
    )


def _see(runtime, folder, other):
    mine = folder if runtime.is_main else other  # as on a node that has another disk there
    mine.mkdir(parents=True, exist_ok=True)
    try:
        preflight.check_shared_folder(runtime, mine)
    except TrainError as error:
        return str(error)
    return None


def test_folder_that_a_process_does_not_see_is_refused_on_all(tmp_path):
    assert run_ranks(_see, tmp_path / "a", tmp_path / "a") == [None, None]
    for said in run_ranks(_see, tmp_path / "a", tmp_path / "b"):
        assert "rank 1 on" in said
        assert "does not see what rank 0 has written there; expected a folder that all nodes share" in said
    assert not list((tmp_path / "a").iterdir())


def test_checkpoints_that_the_disk_has_no_room_for_are_refused_before_the_model_is_loaded(
    server, command, tmp_path, monkeypatch
):
    from prefopt.settings import parse

    config = parse(command("dpo", tmp_path / "run"))
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5e9))
    preflight.check_disk_space(config, 10**8, tmp_path)
    with pytest.raises(TrainError, match=r"^--output .*: 40 GB are needed for 2 checkpoints and the model, found 5 GB free"):
        preflight.check_disk_space(config, 10**9, tmp_path)


def start(argv, rank, port, address="127.0.0.1"):
    """One process of two, as srun or a user starts it: nobody but process 0 listens at the port."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    names |= {"MASTER_ADDR": address, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1}
    return subprocess.Popen(
        [sys.executable, "-m", "prefopt", "train", *argv],
        env=os.environ | {name: str(value) for name, value in names.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def alone(command, tmp_path):
    return command("dpo", tmp_path / "run", train__rendezvous_timeout=3)


def ends_in_one_line(process):
    """The line with which a process ended, the only one, and not by a signal."""
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert said.count("\n") == 1, said
    return said


def test_port_that_another_program_listens_at_is_named_and_all_processes_end(command, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:  # and never answers
        port = taken.getsockname()[1]
        processes = [start(alone(command, tmp_path), rank, port) for rank in (0, 1)]
        first, second = map(ends_in_one_line, processes)
    assert f": cannot listen at port {port} (Address already in use); choose another port for all ranks: MASTER_PORT" in first
    assert "rank 1 of 2 on " in second
    assert f" waited 3 s at 127.0.0.1:{port}: rank 0 of this run does not answer there; " in second


def test_address_that_cannot_be_resolved_is_named_by_all_processes(command, tmp_path):
    argv = alone(command, tmp_path)
    first, second = map(ends_in_one_line, [start(argv, rank, free_port(), "no-such-node.invalid") for rank in (0, 1)])
    assert "rank 0 of 2 on " in first
    assert ": MASTER_ADDR: 'no-such-node.invalid' cannot be resolved (" in first
    assert "rank 1 of 2 on " in second
    assert " cannot reach rank 0 at no-such-node.invalid:" in second


@pytest.mark.parametrize(
    ("rank", "expected"), [(0, "rank 1 did not join; start all ranks"), (1, "cannot reach rank 0 at 127.0.0.1:")]
)
def test_process_that_is_started_alone_says_whom_it_misses(rank, expected, command, tmp_path):
    assert expected in ends_in_one_line(start(alone(command, tmp_path), rank, free_port()))


def test_process_that_comes_before_the_first_one_waits_for_it(command, tmp_path):
    argv, port = command("dpo", tmp_path / "run", train__max_steps=1, train__rendezvous_timeout=60), free_port()
    early = start(argv, 1, port)
    time.sleep(6)
    first = start(argv, 0, port)
    assert [process.communicate(timeout=120) and process.returncode for process in (first, early)] == [0, 0]
