"""The training loop. One for every method: only `method.loss` differs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from prefopt.errors import TrainError
from prefopt.training import callbacks, checkpoint, first_batch
from prefopt.training.best_model import BestModel
from prefopt.training.callbacks import CallbackList
from prefopt.training.evaluation import EvaluationLoop
from prefopt.training.export import ModelExport
from prefopt.training.forward import pair_stats, pair_stats_and_routing, statistics_for, to_device
from prefopt.training.loss_state import LossStates
from prefopt.training.metrics import Evaluator, Meter, loss_metrics, shared_metrics, total_loss
from prefopt.training.normalizers import Normalizers, non_finite_pairs, normalized, weighted
from prefopt.training.patience import Patience
from prefopt.training.progress_bar import ProgressBar, print_beside_bar
from prefopt.training.router_loss import RouterLoss
from prefopt.training.run import Interrupted, TrainingRun
from prefopt.training.run_checkpoints import RunCheckpoints
from prefopt.training.sample_tables import SampleTables
from prefopt.training.schedule import learning_rate
from prefopt.training.signals import EXIT_UNFINISHED
from prefopt.training.step_result import StepResult
from prefopt.training.tracking import Trackers
from prefopt.types import PairBatch


@dataclass
class Trainer:
    """Trains a run to its end.

    Args:
        run: what is trained on what.
        resume_from: an undamaged checkpoint whose weights `run.policy` holds, or None.
        evaluators: functions of the policy whose figures are logged at each evaluation, see `EvaluationLoop`.
        trackers: they receive all metrics; the caller closes them.
    """

    run: TrainingRun
    resume_from: Path | None = None
    evaluators: Sequence[Evaluator] = field(default_factory=tuple)
    trackers: Trackers | None = None

    def train(self) -> int:
        """Train to the end. Returns the exit status: 0 when finished, 75 when a signal asked to save and exit."""
        run = self.run
        self.prepare()
        self.done = start = self.checkpoints.restore(self.resume_from)
        outcome: Literal["finished", "interrupted", "failed"] = "failed"
        model: Path | None = None
        run.runtime.stop.in_loop = True
        try:
            self._loop(start)
            model = self._export()
            outcome = "finished"
        except Interrupted:
            outcome = "interrupted"
        finally:
            self.callbacks.on_end(callbacks.EndEvent(run, self.done, outcome, model))
        return 0 if outcome == "finished" else EXIT_UNFINISHED

    def prepare(self) -> None:
        """Build the parts of the training, so that steps and evaluations can run."""
        run = self.run
        run.prepare()
        self.router = RouterLoss(run)
        self.normalizers = Normalizers(run.method, run.batcher, run.runtime, run.train)
        self.loss_states = LossStates(run)
        self.evaluation = EvaluationLoop(run, self.evaluators, self.loss_states)
        self.export = ModelExport(run)
        self.best = BestModel(run, self.export)
        # trackers before the bar; patience before the callbacks of the user, which may read `run.stop_reason`
        builtin = [SampleTables(), *([] if self.trackers is None else [self.trackers]), ProgressBar(), Patience()]
        self.callbacks = CallbackList(run, builtin, callbacks.load(run.config.train.callbacks))
        self.checkpoints = RunCheckpoints(run, self.best, self.callbacks, self.loss_states)

    # The loop ---------------------------------------------------------------------------------------------------------

    def _loop(self, start: int) -> None:
        """Steps, evaluations and checkpoints until the run is over; a signal that asks to stop saves first."""
        run = self.run
        saved = start
        try:
            if start == 0:
                first_batch.check_first_batch(run)
            self.callbacks.on_start(callbacks.StartEvent(run, start, self.resume_from))
            self._evaluate_if_due(start)
            while not run.over(self.done):
                result = self._step(self.done)
                self.done = result.step
                self._log_step(result)
                self._evaluate_if_due(self.done)
                if self.done % run.config.train.save_every == 0 or run.over(self.done):
                    self._save()
                    saved = self.done
            if run.stop_reason is not None and not run.run_length.over(self.done):
                print_beside_bar(f"stopped at step {self.done}{run.run_length.of_total}: {run.stop_reason}")
        except Interrupted:
            if self.done > saved:
                self._save(last=True)
            print_beside_bar(f"left at step {self.done}{run.run_length.of_total}; the same command continues")
            raise

    def _step(self, step: int) -> StepResult:
        """One optimizer step, counted from 0: fetch, forward, loss, backward, clip, update."""
        began = time.perf_counter()
        run, runtime, backend = self.run, self.run.runtime, self.run.backend
        run.model.train()

        # Fetch this rank's micro-batches, and what the loss is divided by over all of them on all ranks.
        pairs = run.train.global_batch(step)
        indices, batches = run.batcher.step_batches(pairs, run.config.train.micro_batch)
        normalizers = self.normalizers.of_step(step, batches)
        self.router.begin_step(batches)
        self.loss_states.begin_step(step, [[pairs[i] for i in some] for some in indices], batches)
        meter, want = Meter(), statistics_for(run.needs)
        broken: list[tuple[torch.Tensor, PairBatch]] = []  # which pairs of each micro-batch have no finite loss
        sizes = torch.zeros(4, dtype=torch.float64)

        for index, batch in enumerate(batches):
            run.exit_if_requested()
            sizes += _sizes(batch)
            last = index == len(batches) - 1
            with backend.micro_batch(last):
                batch = to_device(batch, runtime.device)
                # Forward: statistics of every completion, each (B,).
                if self.router.weight:
                    stats, routing = pair_stats_and_routing(run.model, batch, want)
                else:
                    stats = pair_stats(run.model, batch, want)
                # Loss: this micro-batch's part of the mean over the step.
                output = weighted(self.loss_states.loss(index, stats, batch), batch)
                loss = normalized(output, normalizers)
                if self.router.weight:
                    balance = self.router.of_micro_batch(routing)
                    loss = loss + self.router.weight * balance
                    share = balance.new_full((1,), 1 / (len(batches) * runtime.world))
                    meter.add({"aux_loss": (balance.detach()[None], share)})
                # Backward: times the world size, because backends average gradients over ranks.
                backend.backward(loss * runtime.world, last)
            meter.add(loss_metrics(output) | shared_metrics(stats) | dict(output.metrics))
            broken.append((non_finite_pairs(output), batch))
        run.exit_if_requested()

        # Clip. An overflow of scaled gradients is left to the scaler, which skips the step and halves the scale.
        norm = backend.clip(run.config.optim.clip or math.inf)
        scaler = runtime.accelerator.scaler
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        broken_anywhere = float(runtime.sum(torch.stack([rows.sum() for rows, _ in broken]).sum().double()))
        if broken_anywhere > 0 or not (norm is None or math.isfinite(norm) or scale > 1):
            self._raise_non_finite(step, math.nan if norm is None else norm, broken)

        # Update the weights, then the reference where it follows them.
        counts = [int(value) for value in runtime.sum(sizes).tolist()]
        tokens = counts[2]
        spent = run.run_length.spent(tokens, self._seconds_since(began))
        lr = learning_rate(run.config, run.steps_of_epochs, step, spent)
        backend.set_lr(lr)
        skipped, norm_of_step = backend.step()
        backend.zero_grad()
        norm = norm_of_step if norm is None else norm
        if not (math.isfinite(norm) or skipped):
            self._raise_non_finite(step, norm, broken)
        if run.moving is not None and (step + 1) % (run.config.reference.sync_every or 1) == 0:
            run.moving.update()

        means = meter.averages(runtime)
        seconds = self._seconds_since(began)
        run.run_length.spend(tokens, seconds)
        return StepResult(
            step=step + 1,
            epoch=run.train.epochs(step + 1) if run.train.steps_per_epoch else None,
            loss=total_loss(output, means) + self.router.weight * means.get("aux_loss", 0.0),
            metrics={n: v for n, v in means.items() if len(output.terms) > 1 or not n.startswith("loss/")},
            learning_rate=lr,
            pairs=counts[0],
            completion_tokens=counts[1],
            tokens_processed=tokens,
            positions=counts[3],
            grad_norm=None if skipped else norm,
            loss_scale=None if scaler is None else scale,
            skipped=skipped,
            seconds=seconds,
            peak_memory_gib=torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        )

    # What follows a step ----------------------------------------------------------------------------------------------

    def _log_step(self, result: StepResult) -> None:
        line = result.line()
        self._write_line(line)
        self.callbacks.on_step(callbacks.StepEvent(self.run, result.step, result, line))

    def _write_line(self, line: Mapping[str, Any]) -> None:
        if self.run.is_main:
            self.run.metrics.write(line)

    def _evaluate_if_due(self, done: int) -> None:
        """Evaluate every `eval.every` steps and at the end, unless an earlier attempt has logged this evaluation."""
        run = self.run
        regular = done % run.config.eval.every == 0 if done else run.config.eval.at_start
        if (regular or run.over(done)) and not run.runtime.on_main(lambda: run.metrics.has(done, "eval")):
            self._evaluate(done)

    def _evaluate(self, done: int) -> None:
        result = self.evaluation.evaluate(done)
        if not result.empty:
            self._write_line(result.line)
        self.best.save_if_best(done, result.line)
        if not result.empty:
            event = callbacks.EvaluationEvent(self.run, done, result.line, result.tables, result.texts)
            self.callbacks.on_evaluation(event)

    def _save(self, last: bool = False) -> None:
        """Write a checkpoint. Args: last: whether the run exits after it although it is not over."""
        folder = self.checkpoints.save(self.done)
        last = last or self.run.over(self.done)
        self.callbacks.on_save(callbacks.SaveEvent(self.run, self.done, folder, last))

    def _export(self) -> Path:
        """Export the final model, or the best one. Returns: its folder."""
        runtime = self.run.runtime
        step = runtime.on_main(self.best.chosen)
        folder = None if step is None else self.best.folder / checkpoint.name_of(step)
        model = self.export.export(folder, step)
        if runtime.is_main:
            checkpoint.drop_all(self.best.folder)
        runtime.wait()
        return model

    def _seconds_since(self, began: float) -> float:
        """Seconds since `began`; rank 0's on all ranks where the end of the run depends on them."""
        seconds = time.perf_counter() - began
        by_time = self.run.config.train.max_seconds is not None
        return float(self.run.runtime.from_main(seconds)) if by_time else seconds

    def _raise_non_finite(self, step: int, norm: float, broken: Sequence[tuple[torch.Tensor, PairBatch]]) -> None:
        """Raise one error that names the pairs; called on all ranks."""
        mine = [b.where[i] or f"pair {i} of the batch" for bad, b in broken for i in bad.nonzero().flatten().tolist()]
        rows = self.run.runtime.gather_objects(mine)
        batch = f"first pairs with such a loss: {', '.join(rows[:3])}" if rows else f"gradient norm {norm}"
        if not rows:
            first = self.run.train.global_batch(step)
            batch += f", batch of {first[0].where or 'pair 0'} and {len(first) - 1} more"
        found = f"step {step + 1}: the loss or its gradient is not finite ({batch})"
        raise TrainError(f"{found}; {self.run.last_good_checkpoint()}")


def _sizes(batch: PairBatch) -> torch.Tensor:
    """(pairs, completion tokens, input tokens without padding, input positions) of a micro-batch, (4,) float64."""
    tokens = int(batch.attention_mask.sum()) if batch.pairs else 0
    return torch.tensor([batch.pairs, len(batch.labels), tokens, batch.attention_mask.numel()], dtype=torch.float64)
