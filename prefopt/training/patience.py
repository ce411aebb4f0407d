"""Early stopping: a run ends when its evaluations have not improved for a while (eval.patience)."""

from __future__ import annotations

from prefopt.training.best_checkpoint import Selection
from prefopt.training.callbacks import Callback, EvaluationEvent


class Patience(Callback):
    """Stops the run once the last `eval.patience` evaluations were no better than one before them.

    It reads metrics.jsonl, so it has no state of its own. Without eval.patience it does nothing.
    """

    def on_evaluation(self, event: EvaluationEvent) -> None:
        run = event.run
        patience, select = run.config.eval.patience, run.config.eval.select
        if patience is None or select is None:
            return
        selection = Selection.of(select)
        if run.runtime.on_main(lambda: selection.stale(run.metrics.lines()) >= patience):
            run.stop(f"no better {selection.metric} in {patience} evaluations")
