"""The model of the best evaluation so far (eval.select), exported beside the checkpoints while the run lasts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefopt import storage
from prefopt.errors import ConfigError, TrainError, did_you_mean
from prefopt.figures import readable
from prefopt.training import checkpoint
from prefopt.training.best_checkpoint import SELECTED, Selection
from prefopt.training.export import ModelExport
from prefopt.training.launcher import print_rank_0
from prefopt.training.run import TrainingRun


class BestModel:
    """Keeps the best model in `best/`, in folders named by their steps. Without eval.select it does nothing.

    A model that a later evaluation surpasses stays as long as a checkpoint names it as the best: resumed from there,
    the run may find another one.
    """

    def __init__(self, run: TrainingRun, export: ModelExport) -> None:
        self.run, self.export = run, export
        select = run.config.eval.select
        self.selection = None if select is None else Selection.of(select)
        self.folder = run.output / "best"

    def step(self) -> int | None:
        """The step of the best evaluation so far; None without eval.select, or where no evaluation has its metric."""
        return None if self.selection is None else self.selection.best(self.run.metrics.lines())

    def save_if_best(self, step: int, line: Mapping[str, Any]) -> None:
        """Export the model if no evaluation after a step was better; the one before the first step never counts.

        Args: line: the metrics of this evaluation.
        Raises: ConfigError when they lack the metric of eval.select.
        """
        if self.selection is None:
            return
        metric, run = self.selection.metric, self.run

        def is_best() -> bool:
            if metric not in line:
                known = sorted(set(line) - {"step", "split", "seconds", "pairs"})
                raise ConfigError(
                    f"eval.select: found '{metric}', expected a metric of the evaluations: "
                    f"{', '.join(known) or 'none'}{did_you_mean(metric, known)}"
                )
            return step > 0 and self.step() == step

        if run.runtime.on_main(is_best):

            def write(folder: Path) -> list[Path]:
                mine = self.export.write(folder)
                if run.is_main:
                    (folder / SELECTED).write_text(json.dumps({"step": step, metric: line.get(metric)}))
                return mine

            checkpoint.export(self.folder / checkpoint.name_of(step), write, run.runtime, run.checkpoints)
            run.runtime.on_main(lambda: self.drop_surpassed(step))

    def verified(self, step: int) -> Path:
        """The folder of the model of a step. Raises: TrainError where it is damaged or missing."""
        folder = self.folder / checkpoint.name_of(step)
        wrong = checkpoint.damage(folder)
        exported = self.run.output / "model"
        if wrong is not None and not storage.is_there(folder) and storage.is_there(exported):
            raise TrainError(
                f"{exported}: is damaged ({checkpoint.damage(exported)}), and this finished run has no other copy of "
                "the model that eval.select chose; put it back from a copy, or choose another --output and train again"
            )
        if wrong is not None:
            raise TrainError(
                f"{folder}: the model that eval.select chose is damaged or missing: {wrong}; put it back from a copy, "
                "or choose another --output and train again"
            )
        return folder

    def chosen(self) -> int | None:
        """On rank 0, the step of the model to export, which is printed; None for the last model."""
        if self.selection is None:
            return None
        best, metric = self.step(), self.selection.metric
        if best is None:
            print_rank_0(f"exported: the last model, because no evaluation has the metric {metric}")
            return None
        value = storage.read_json(self.verified(best) / SELECTED)[metric]
        print_rank_0(f"exported: the model of step {best}, with the best {metric}: {readable(value)}")
        return best

    def restore(self, state: Mapping[str, Any]) -> None:
        """On rank 0, return to the best model that a checkpoint names. Args: state: of the checkpoint; maybe empty."""
        checkpoint.clean(self.folder)
        if self.selection is not None:
            best = state["best"] if "best" in state else self.step()
            if best is not None:
                self.verified(best)
            self.drop_surpassed(best)

    def drop_surpassed(self, best: int | None) -> None:
        """On rank 0, remove models that are neither the best so far nor that of any checkpoint."""
        if self.selection is None:
            return
        known = {best}
        for folder in checkpoint.steps(self.run.checkpoints):
            with contextlib.suppress(storage.Damaged):
                known.add(checkpoint.load_state(folder).get("best"))
        for folder in checkpoint.steps(self.folder):
            if checkpoint.step_of(folder) not in known:
                checkpoint.drop(folder)
