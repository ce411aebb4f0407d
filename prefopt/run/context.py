"""The context that every run needs: checked environment, locked output folder, joined ranks, signals that save.

What the run does in it is an argument.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from prefopt import storage
from prefopt.errors import TrainError
from prefopt.run.card import described_method
from prefopt.run.output_checks import check_paths, check_same_run
from prefopt.settings import RunConfig
from prefopt.testbed.cache import cache_root
from prefopt.training import launcher, output_folder, signals
from prefopt.training import runtime as rt
from prefopt.training.launcher import print_rank_0

_UNREADABLE = (errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_ROUNDS_TIMEOUT = timedelta(hours=24)  # a stage that rank 0 does alone may take longer than any training step

Work = Callable[[rt.Runtime], int]  # returns the exit status


def run_in_context(config: RunConfig, work: Work, part: str = "") -> int:
    """Run `work` with the output folder locked, the ranks joined and signals that ask to save.

    Args:
        config: settings of the whole run.
        work: what is run on every rank; its heavy imports should be its own, since a user's mistake that can be seen
            without them is reported before they cost time.
        part: names the part of the output that this process writes, where several processes share the folder.
    Returns: the exit status of `work`.
    Raises: PrefoptError for whatever a user can fix.
    """
    launcher.check_launcher()
    stop = signals.Stop()
    stop.install(launcher.world_size())
    check_paths(config)
    output = Path(config.output)
    lock = output_folder.OutputLock(output, part)
    if not config.dry_run:
        output_folder.prepare_output(output)
        if launcher.rank() == 0:
            lock.acquire()
    try:
        if not config.dry_run:
            check_same_run(config, output)
        status = _on_joined_ranks(config, output, stop, work)
        if status == 0:
            stop.ignore_late_signal()
        return status
    except OSError as error:
        if error.errno in _UNREADABLE and error.filename:
            with storage.reading(Path(error.filename)):
                raise
        if error.errno not in _NO_SPACE:
            raise
        place = error.filename or f"--output {output} (or the cache in {cache_root()})"
        raise TrainError(f"{place}: {error.strerror}; free space and run the same command again") from error
    finally:
        lock.release()


def _on_joined_ranks(config: RunConfig, output: Path, stop: signals.Stop, work: Work) -> int:
    from prefopt.training import compiling, layout_choice, optimizers, preflight

    runtime = rt.start(
        stop,
        seed=config.seed,
        mixed_precision=config.train.mixed_precision,
        deterministic=config.train.deterministic,
        trackers=() if config.dry_run else config.track.to,
        output=output,
        rendezvous_timeout=config.train.rendezvous_timeout,
        patience=_ROUNDS_TIMEOUT if config.rounds.count else None,
    )
    try:
        print_rank_0(_first_line(config, runtime))
        optimizers.check_optimizer(config.optim, runtime.device)
        layout_choice.check_settings(config, runtime.device)
        if not config.dry_run:
            preflight.check(config, runtime, output)
        if config.train.compile:
            compiling.check(runtime.device)
        if config.model.offload_activations and runtime.device.type == "cpu":
            print_rank_0(
                "warning: model.offload_activations has no use on a CPU: activations are in host memory already"
            )
        return work(runtime)
    finally:
        if runtime.world > 1:
            import torch.distributed as dist

            if dist.is_initialized() and sys.exc_info()[0] is None:
                runtime.wait()
                dist.destroy_process_group()


def _first_line(config: RunConfig, runtime: rt.Runtime) -> str:
    return (
        f"prefopt: world size {runtime.world}, backend {runtime.described_backend}, device {runtime.device.type}, "
        f"method {described_method(config)}, seed {config.seed}"
    )
