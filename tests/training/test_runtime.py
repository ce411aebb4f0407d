"""Threads, the log of DeepSpeed, and work of rank 0 that others wait for."""

import logging
import os
import time

import pytest
import torch

from prefopt.errors import TrainError
from prefopt.training.runtime import set_threads, silence_deepspeed


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
