"""Tables of evaluators, such as the samples of eval.generate: written beside the metrics, and shown in the terminal."""

from __future__ import annotations

from prefopt.training.callbacks import Callback, EvaluationEvent
from prefopt.training.metrics import MetricsFile
from prefopt.training.progress_bar import print_beside_bar


class SampleTables(Callback):
    """Writes each table to `NAME.jsonl` in the output folder, a line per row, and prints the evaluators' texts."""

    def on_evaluation(self, event: EvaluationEvent) -> None:
        for name, rows in event.tables.items():
            MetricsFile(event.run.output / f"{name}.jsonl").replace(event.step, rows)
        for text in event.texts:
            print_beside_bar(f"\nstep {event.step}: {text}")
