"""Stages in processes of their own."""

import os
import signal
import sys
import threading

from prefopt.run.rounds_processes import run_stage
from prefopt.training.signals import SAVE_SIGNALS, Stop


def test_signals_when_the_command_runs_in_another_thread_then_none_is_handled_and_it_runs_all_the_same():
    before = {number: signal.getsignal(number) for number in SAVE_SIGNALS}
    done = []

    def run():
        stop = Stop()
        stop.install(1)
        stop.ignore_late_signal()
        done.append(run_stage([sys.executable, "-c", "raise SystemExit(3)"], os.environ))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [3]
    assert {number: signal.getsignal(number) for number in SAVE_SIGNALS} == before
