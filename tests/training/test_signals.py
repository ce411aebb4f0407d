"""Signals that ask a run to save and exit."""

import signal
import subprocess
import sys
import time


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
