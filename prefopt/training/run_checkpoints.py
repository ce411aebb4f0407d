"""Saving a run in checkpoints, and restoring it from one so that it continues bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefopt import storage
from prefopt.errors import TrainError
from prefopt.training import checkpoint, sharded_io, sharding
from prefopt.training.best_model import BestModel
from prefopt.training.callbacks import CallbackList
from prefopt.training.loss_state import LossStates
from prefopt.training.random_state import random_state, set_random_state
from prefopt.training.run import TrainingRun

_REFERENCE = "moving_reference"  # stem of the files of a moving reference


class RunCheckpoints:
    """The checkpoints of one run: weights, optimizer, random state, metrics so far, states of loss and callbacks."""

    def __init__(self, run: TrainingRun, best: BestModel, callbacks: CallbackList, loss_states: LossStates) -> None:
        self.run, self.best, self.callbacks, self.loss_states = run, best, callbacks, loss_states

    def save(self, step: int) -> Path:
        """Write a checkpoint after `step` optimizer steps; called on all ranks.

        Raises: TrainError when the weights are not finite; the checkpoints before stay as they are.
        """
        run = self.run
        mine = sharding.not_finite(run.policy.lm)
        bad = next(iter(run.runtime.gather_objects([] if mine is None else [mine])), None)
        if bad is not None:
            pairs = run.train.global_batch(step - 1)
            raise TrainError(
                f"step {step}: its update left weights that are not finite ({bad}; batch of "
                f"{pairs[0].where or 'pair 0'} and {len(pairs) - 1} more); {run.last_good_checkpoint()}"
            )
        scaler = run.runtime.accelerator.scaler
        best, lines = run.runtime.on_main(lambda: (self.best.step(), run.metrics.seal()))
        state = {
            "step": step,
            "best": best,
            "metrics": lines,
            "random": run.runtime.gather_objects([random_state()]),  # by rank
            "loss_scale": None if scaler is None else scaler.state_dict(),
            "data": run.train.fingerprint,
            "budget": run.run_length.state(),
        }
        if run.needs.state:
            state["loss"] = self.loss_states.state_dict()
        if self.callbacks.named:
            state["callbacks"] = self.callbacks.state()
        if run.stop_reason is not None and not run.run_length.over(step):
            state["stopped"] = run.stop_reason
        folder = checkpoint.save(run.checkpoints, step, self._write, state, run.config.train.keep_last, run.runtime)
        run.runtime.on_main(lambda: self.best.drop_surpassed(best))
        return folder

    def _write(self, folder: Path) -> list[Path]:
        run, max_shard_mb = self.run, self.run.config.train.max_shard_mb
        mine = sharded_io.save_model(run.backend, folder, max_shard_mb)
        mine += sharded_io.save_optimizer(run.backend, folder, max_shard_mb)
        if run.moving is not None:
            mine += sharded_io.save_frozen(run.backend, folder, _REFERENCE, run.moving.weights(), max_shard_mb)
        if run.is_main:
            run.tokenizer.save_pretrained(folder)
        return mine

    def restore(self, folder: Path | None) -> int:
        """Restore the run from a checkpoint whose weights the policy holds already. Returns: the steps done.

        Args: folder: an undamaged checkpoint; None for a run that starts.
        Raises: TrainError when it is of other data.
        """
        start, state, run = 0, {}, self.run
        if folder is not None:
            state = checkpoint.load_state(folder)
            if state["data"] != run.train.fingerprint:
                raise TrainError(
                    f"{run.output}: the training data changed since step {state['step']}; choose another --output"
                )
            run.backend.load(folder)
            if run.moving is not None:
                sharded_io.load_frozen(run.backend, folder, _REFERENCE, run.moving.weights())
            if "budget" in state:  # checkpoints of older versions have none
                run.run_length.restore(state["budget"])
            by_rank = state["random"]
            if run.runtime.world == len(by_rank):  # otherwise the seed of the run and this rank have set it
                set_random_state(by_rank[run.runtime.rank])
            if run.runtime.accelerator.scaler is not None:
                run.runtime.accelerator.scaler.load_state_dict(state["loss_scale"])
            if run.needs.state:
                self.loss_states.load_state_dict(state["loss"])
            self.callbacks.restore(state.get("callbacks", {}), folder)
            run.stop_reason = state.get("stopped")
            start = int(state["step"])
        run.runtime.on_main(lambda: self._undo_after(folder, start, state))
        return start

    def _undo_after(self, folder: Path | None, start: int, state: Mapping[str, Any]) -> None:
        """Remove what an earlier attempt wrote after the checkpoint that this one resumes from.

        Later checkpoints that could not be read stay until this attempt has saved its own.
        """
        storage.sweep(self.run.output)
        checkpoint.clean(self.run.checkpoints)
        if "metrics" in state:
            self.run.metrics.restore(state["metrics"], str(folder))
        else:  # a run that starts, or a checkpoint of an older version, which has no checksums of the lines
            self.run.metrics.rewind(start if folder is not None else -1)
        self.best.restore(state)
