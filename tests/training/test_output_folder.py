"""The lock on an output folder, and how the folder is made."""

import fcntl
import os
import socket
import subprocess
import sys
import threading

import pytest

from prefopt.errors import TrainError
from prefopt.training.output_folder import OutputLock, prepare_output

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
