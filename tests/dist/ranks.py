"""Two gloo processes on CPU for tests: the imports are done once, in a server that each rank is forked from."""

import multiprocessing
import os
import pickle
import socket
import traceback

from tests.fork_server import BACKENDS

_PRELOAD = ["torch", "transformers", "accelerate", "tqdm", "prefopt.cli", "prefopt.training.trainer"]
# what a test module imports, which each rank does to find its work
_PRELOAD += ["pytest", "peft", "transformers.models.llama", "prefopt.planner.dry_run", "tests.invariant.steps"]


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_ranks(work, *args, world=2, timeout=300, mixed_precision="no", backend="ddp"):
    """What `work(runtime, *args)` returns on each rank, in order of rank; `work` is a function of a test module.

    Args: backend: one of `BACKENDS`.
    Raises: AssertionError with the rank's traceback when one fails, does not answer, or did not join the others.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    port, pipes, processes = free_port(), [], []
    for rank in range(world):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank, args=(theirs, rank, world, port, mixed_precision, backend, work, args), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        return [_answer(rank, pipe, timeout) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()


def _answer(rank, pipe, timeout):
    assert pipe.poll(timeout), f"rank {rank} gave no answer within {timeout} s"
    ok, value = pickle.loads(pipe.recv_bytes())
    assert ok, f"rank {rank} failed:\n{value}"
    return value


def _rank(pipe, rank, world, port, mixed_precision, backend, work, args):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        **BACKENDS[backend],
    }
    try:
        import torch
        import torch.distributed as dist

        from prefopt.training import runtime as rt
        from prefopt.training import signals

        torch.set_num_threads(1)
        runtime = rt.start(
            signals.Stop(), seed=0, mixed_precision=mixed_precision, deterministic=False, trackers=(), output="", rendezvous_timeout=60
        )
        # the failure to join is silent: each rank would train alone
        assert (runtime.world, runtime.rank, runtime.backend) == (world, rank, backend), runtime
        assert dist.get_backend() == "gloo"
        value = work(runtime, *args)
        runtime.wait()
        pipe.send_bytes(pickle.dumps((True, value)))  # by value: `send` would pass tensors by file descriptor
        dist.destroy_process_group()
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
        raise
