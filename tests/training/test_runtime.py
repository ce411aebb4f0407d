import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from prefopt.errors import TrainError
from prefopt.training.launcher import check_launcher
from prefopt.training.output_folder import OutputLock, prepare_output
from prefopt.training.random_state import random_state, set_random_state
from prefopt.training.runtime import set_threads, silence_deepspeed
from prefopt.training.weight_files import check_path

HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom prefopt.training.output_folder import OutputLock\n"
    "lock = OutputLock(Path(sys.argv[1]))\nlock.acquire()\nprint('held', flush=True)\ntime.sleep(60)\n"
)


def test_lock_when_held_by_another_process_then_names_it_and_is_freed_by_its_death(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(TrainError) as caught:
            OutputLock(tmp_path).acquire()
        assert str(caught.value) == (
            f"{tmp_path}: another run is writing here (process {owner.pid} on {socket.gethostname()}); "
            "wait for it, stop it, or choose another --output"
        )
    finally:
        owner.kill()
        owner.communicate()
    lock = OutputLock(tmp_path)
    lock.acquire()
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    lock.release()
    lock.release()


def test_lock_when_somebody_looks_at_it_for_a_moment_then_it_is_taken_all_the_same(tmp_path):
    (tmp_path / ".lock").touch()
    looking = open(tmp_path / ".lock")  # noqa: SIM115 - closed by the timer
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.1, looking.close).start()
    lock = OutputLock(tmp_path)
    lock.acquire()
    lock.release()


def test_lock_when_the_job_was_requeued_then_it_waits_for_the_attempt_before(tmp_path, monkeypatch, capsys):
    before = OutputLock(tmp_path)
    before.acquire()
    threading.Timer(1.5, before.release).start()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lock = OutputLock(tmp_path)
    lock.acquire()
    lock.release()
    assert capsys.readouterr().out == f"{tmp_path}: a process of an earlier attempt still writes here; waiting\n"


def test_lock_when_it_cannot_be_opened_then_one_line_says_so(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(TrainError) as caught:
        OutputLock(tmp_path).acquire()
    assert str(caught.value) == f"{tmp_path}/.lock: cannot be opened: Is a directory; choose another --output"


def test_output_when_a_parent_is_a_file_then_the_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainError) as caught:
        prepare_output(tmp_path / "file" / "run" / "deep")
    assert str(caught.value) == (
        f"--output {tmp_path}/file/run/deep: '{tmp_path}/file' is a file; expected a folder that can be written"
    )
    prepare_output(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_path_when_it_can_be_a_hub_id_or_is_a_folder_then_passes(tmp_path):
    check_path("model.path", "owner/name")
    check_path("model.path", str(tmp_path))
    with pytest.raises(TrainError) as caught:
        check_path("model.path", "./nothing")
    assert str(caught.value) == "model.path: './nothing' does not exist, expected the folder of a model or a hub id"


def test_threads_when_not_set_then_one_for_small_models_and_a_share_of_the_cores_for_large(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
        assert set_threads(None, 2_999_999) == torch.get_num_threads() == 1
        assert set_threads(None, 3_000_000) == torch.get_num_threads() == 6
        assert set_threads(2, 10) == torch.get_num_threads() == 2
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        assert set_threads(None, 3_000_000) == 1
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
        assert set_threads(None, 3_000_000) == 3
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
        assert set_threads(None, 3_000_000) == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("said", "threads"), [("3", 3), ("4,2", 4), (" 2 ", 2), ("0", 1), ("many", 1), ("", 1)])
def test_threads_when_not_set_are_those_of_the_environment(said, threads, monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert set_threads(None, 10) == torch.get_num_threads() == threads
        assert set_threads(5, 10) == 5  # a setting goes before it
    finally:
        torch.set_num_threads(before)


def test_deepspeed_says_nothing_of_a_machine_without_a_gpu(capfd):
    silence_deepspeed()
    logger = logging.getLogger("DeepSpeed")
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    try:
        logger.warning("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
        logger.warning("something else")
    finally:
        logger.removeHandler(handler)
    err = capfd.readouterr().err
    assert "something else" in err
    assert "accelerator" not in err


def test_random_state_when_set_again_then_every_generator_repeats_itself():
    import random

    import numpy

    def draw():
        return random.random(), float(numpy.random.rand()), torch.rand(3).tolist()

    state = random_state()
    first = draw()
    assert draw() != first
    set_random_state(state)
    assert draw() == first


def test_signals_when_two_of_a_kind_come_then_the_second_ends_the_process(tmp_path):
    code = (
        "import time\nfrom prefopt.training.signals import Stop\n"
        "stop = Stop()\nstop.install(1)\nstop.in_loop = True\nprint('ready', flush=True)\ntime.sleep(60)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "\n"
        assert process.stdout.readline() == (
            "SIGTERM: saving, then leaving with exit status 75; again to leave at once\n"
        )
        time.sleep(0.1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


def test_signal_that_time_is_nearly_over_when_all_is_done_then_is_no_failure(tmp_path):
    """Python gives signals their defaults back when it ends: what lives longer than its handlers sends one then."""
    code = (
        "import os, signal\nfrom prefopt.training.signals import Stop\n"
        "class Late:\n    def __init__(self): self.kill, self.me, self.which = os.kill, os.getpid(), signal.SIGUSR1\n"
        "    def __del__(self): self.kill(self.me, self.which)\n"
        "stop = Stop()\nstop.install(1)\n{}\nimport sys\nsys.late = Late()"
    )

    def status(line):
        return subprocess.run([sys.executable, "-c", code.format(line)]).returncode

    assert status("pass") == -signal.SIGUSR1
    assert status("stop.ignore_late_signal()") == 0


def _waits(runtime):
    """On each rank: what came of work that outlasts the patience of ordinary waiting, and of work that failed."""
    from datetime import timedelta

    import torch.distributed as dist

    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2))
    torch.manual_seed(0)
    before = torch.get_rng_state()

    def work():
        time.sleep(4)
        torch.rand(3)
        return "done"

    def fails():
        raise TrainError("no")

    said = runtime.on_main_patiently(work)
    try:
        runtime.on_main_patiently(fails)
    except TrainError as error:
        said += f" {error}"
    return said, bool((torch.get_rng_state() == before).all())


def test_work_of_the_first_process_may_outlast_what_others_usually_wait_and_moves_no_random_state():
    from tests.dist.ranks import run_ranks

    assert run_ranks(_waits) == [("done no", True)] * 2


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE: found 2 in the environment without RANK and MASTER_ADDR and MASTER_PORT",
        ),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE: found 'two' in the environment, expected a whole number"),
        ({"RANK": "3"}, "RANK: found 3 of WORLD_SIZE 1, expected less"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "launcher: ACCELERATE_USE_DEEPSPEED is in the environment, but no laun"),
    ],
)
def test_launcher_when_its_variables_are_not_whole_then_one_line_names_them(environment, says, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    check_launcher()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainError, match=f"^{says}"):
        check_launcher()
