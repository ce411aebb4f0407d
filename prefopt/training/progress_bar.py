"""The progress bars of rank 0: one of optimizer steps, and one of pairs during a long evaluation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prefopt.figures import NOTHING
from prefopt.training.callbacks import Callback, EndEvent, SaveEvent, StartEvent, StepEvent
from prefopt.training.launcher import print_rank_0
from prefopt.training.runtime import Runtime
from prefopt.types import PairBatch


class ProgressBar(Callback):
    """Shows the steps done, the loss, the throughput and the accuracy of the last step."""

    _bar: Any = None

    def on_start(self, event: StartEvent) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=event.run.run_length.steps,
            initial=event.step,
            disable=not event.run.is_main,
            unit="step",
            mininterval=_redraw_seconds(),
            dynamic_ncols=True,
        )

    def on_step(self, event: StepEvent) -> None:
        self._bar.set_postfix(_postfix(event.line, event.run.config.tied_at_start), refresh=False)
        self._bar.update()

    def on_save(self, event: SaveEvent) -> None:
        if event.last:  # what is printed from here on stands below the bar
            self._bar.close()

    def on_end(self, event: EndEvent) -> None:
        if self._bar is not None:
            self._bar.close()


def evaluation_bar(
    batches: Iterator[tuple[list[int], PairBatch]], pairs: int, runtime: Runtime
) -> Iterator[tuple[list[int], PairBatch]]:
    """The micro-batches of an evaluation of so many pairs, with a progress bar if it takes longer than 3 seconds."""
    from tqdm import tqdm

    bar = tqdm(
        total=pairs,
        desc="evaluating",
        unit="pair",
        delay=3,
        leave=False,
        mininterval=_redraw_seconds(),
        disable=not runtime.is_main,
        dynamic_ncols=True,
    )
    with bar:
        for numbers, batch in batches:
            yield numbers, batch
            bar.update(min(len(numbers) * runtime.world, pairs - bar.n))  # the other ranks score as many meanwhile


def print_beside_bar(text: str) -> None:
    """Print on rank 0 without breaking a progress bar that is on the screen."""
    from tqdm import tqdm

    with tqdm.external_write_mode():
        print_rank_0(text)


def _redraw_seconds() -> float:
    """Seconds between two updates of a bar: few updates where stderr is a log file."""
    return 0.2 if os.isatty(2) else 10


def _postfix(line: Mapping[str, Any], tied_at_start: Sequence[str]) -> dict[str, str]:
    """What the bar shows of a step. Args: tied_at_start: see `RunConfig.tied_at_start`."""
    shown = {"loss": f"{line['loss']:.4f}", "tok/s": f"{line['tokens_per_second']:,.0f}"}
    name = "rewards/accuracies"
    if name in line:
        # metrics of step 1 describe the policy before its first update
        shown["acc"] = NOTHING if name in tied_at_start and line["step"] == 1 else f"{line[name]:.3f}"
    return shown
