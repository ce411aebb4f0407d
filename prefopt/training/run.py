"""What the parts of a training share: settings, ranks, policy, backend, data, and when the run ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from prefopt.data.loader import Batches
from prefopt.settings import RunConfig
from prefopt.training import checkpoint, compiling, models, offload
from prefopt.training.backends import make_backend
from prefopt.training.batching import Batcher
from prefopt.training.forward import Policy, PolicyWithReference
from prefopt.training.launcher import print_rank_0
from prefopt.training.layout_choice import choose_layouts
from prefopt.training.metrics import MetricsFile
from prefopt.training.moving_reference import MovingReference
from prefopt.training.optimizers import make_optimizer
from prefopt.training.reference_cache import ReferenceValues
from prefopt.training.run_length import RunLength
from prefopt.training.runtime import Runtime
from prefopt.training.schedule import total_steps
from prefopt.types import EncodedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Interrupted(Exception):
    """A signal asked the run to save and exit; the work in progress is dropped."""


@dataclass
class TrainingRun:
    """One training run, as its parts and its callbacks see it.

    Args:
        config: all settings.
        runtime: rank, world size, device and collectives.
        policy: the unwrapped policy.
        tokenizer: saved with every checkpoint; its pad token fills batches.
        train: the pairs of each optimizer step.
        eval_pairs: held-out pairs, maybe none.
        output: the output folder; the lock on it is held.
        values: the cached values of the reference for all pairs, where they replace a live reference.
    """

    config: RunConfig
    runtime: Runtime
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    train: Batches
    eval_pairs: Sequence[EncodedPair]
    output: Path
    values: ReferenceValues | None = None
    stop_reason: str | None = field(default=None, init=False)  # why the run ends early, see `stop`

    def prepare(self) -> None:
        """Create the optimizer and wrap the model, so that steps and evaluations can run."""
        config, runtime = self.config, self.runtime
        self.method = config.method
        self.needs = self.method.needs
        self.steps_of_epochs = None if self.train.steps_per_epoch is None else self.train.steps
        self.run_length = RunLength.of(config, total_steps(config, self.steps_of_epochs))
        self.moving: MovingReference | None = None
        if config.reference.sync_every is not None:
            assert isinstance(self.policy, PolicyWithReference), "a score has no reference"
            self.moving = MovingReference(self.policy, config.reference.sync_weight)
        if config.model.gradient_checkpointing:
            models.recompute_activations(self.policy.lm)
        # a fused step would not report that the gradient scaler skipped it
        optimizer = make_optimizer(config.optim, self.policy.lm, fused=runtime.accelerator.scaler is None)
        self.backend = make_backend(runtime, config)
        self.model, self.optimizer = self.backend.prepare(self.policy, optimizer)
        if config.model.offload_activations:
            self.policy.saved_tensors_context = offload.Offloading(
                self.policy.lm, pin_memory=runtime.device.type == "cuda"
            )
        layouts, note = choose_layouts(config, self.policy, runtime.device, self.backend.run_inside_forward)
        if note is not None:
            print_rank_0(note)
        pad_id = int(self.tokenizer.pad_token_id)
        self.batcher = Batcher(
            self.needs, layouts, pad_id, runtime.rank, runtime.world, self.values, config.data.weight_column
        )
        if config.train.compile:
            compiling.compile_layers(self.policy.backbone)
        self.metrics = MetricsFile(self.output / "metrics.jsonl")

    # For callbacks

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone prints and writes files."""
        return self.runtime.is_main

    @property
    def rank(self) -> int:
        return self.runtime.rank

    @property
    def world_size(self) -> int:
        return self.runtime.world

    @property
    def steps(self) -> int | None:
        """The number of optimizer steps; None where tokens or seconds end the run."""
        return self.run_length.steps

    def stop(self, reason: str) -> None:
        """End the run after the current step, with a last evaluation and checkpoint. Args: reason: to be printed."""
        self.stop_reason = self.stop_reason or reason

    # When it ends

    def over(self, done: int) -> bool:
        """Whether the run ends after `done` optimizer steps."""
        return self.stop_reason is not None or self.run_length.over(done)

    def exit_if_requested(self) -> None:
        """Drop the step if any rank received a signal to stop. Raises: Interrupted, on all ranks at the same point."""
        requested = torch.tensor(float(self.runtime.stop.requested is not None))
        if float(self.runtime.sum(requested)) > 0:
            self.backend.zero_grad()
            raise Interrupted

    # Checkpoints

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.output / "checkpoints"

    def last_good_checkpoint(self) -> str:
        """Where training can resume after an error, for the end of its line; looked up on rank 0, which prints it."""
        found = checkpoint.last_good(self.checkpoints) if self.is_main else None
        return f"last good checkpoint: {found}" if found else "no checkpoint was written yet"
