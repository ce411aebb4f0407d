"""The partition of shards among processes, and the progress bar."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prefopt.errors import PrefoptError
from prefopt.rounds.store import Row, Stage
from prefopt.training.runtime import Runtime


@dataclass(frozen=True)
class Workers:
    """The processes that share the shards of a stage. The shards themselves do not depend on how many there are.

    Args:
        number: of this process, from 0.
        count: how many there are.
        runtime: the ranks of a launched run, which wait for each other; None for independent processes.
    """

    number: int = 0
    count: int = 1
    runtime: Runtime | None = None

    @property
    def first(self) -> bool:
        return self.number == 0

    def wait(self) -> None:
        if self.runtime is not None:
            self.runtime.wait()

    def agree(self, failure: PrefoptError | None) -> None:
        """Wait for all; where one has failed, fail on all with its line. What the others have finished stays."""
        failures = [failure] if self.runtime is None else self.runtime.gather_objects([failure])
        for error in failures:
            if error is not None:
                raise error

    def first_alone(self, work: Callable[[], Any]) -> Any:
        """Do it once where processes know of each other. An error of the first process is raised on all of them."""
        if self.runtime is None:
            return work()
        return self.runtime.on_main(work)


def do_shards(
    stage: Stage,
    workers: Workers,
    make: Callable[[], Callable[[int], list[Row]]],
    progress: ShardProgress,
) -> bool:
    """Make the shards of a stage that are missing and this process's to make.

    Args: make: opens what is needed (a model, a judge) and returns the function from a shard's number to its rows; it
        is not called where there is nothing to do.
    Returns: whether the whole stage is there now; where other processes share it and are not waited for, it may not be.
    """
    mine = [number for number in stage.missing() if number % workers.count == workers.number]
    workers.wait()  # no rank writes before all have looked
    failure = None
    try:
        if mine:
            with progress.of(stage) as advance:
                rows_of = make()
                for number in mine:
                    rows = rows_of(number)
                    stage.write(number, rows)
                    advance(rows)
    except PrefoptError as error:
        failure = error
    workers.agree(failure)
    return not stage.missing()


@dataclass(frozen=True)
class ShardProgress:
    """A bar: round, stage, shards, samples per second, time to the end, and the mean score where there is one.

    Args: title: round and stage. samples: of each shard. shown: on the first process only.
    """

    title: str
    samples: Sequence[int]
    shown: bool = True
    score: Callable[[Row], Sequence[float]] = lambda row: ()

    @contextmanager
    def of(self, stage: Stage) -> Iterator[Callable[[list[Row]], None]]:
        from tqdm import tqdm

        def done() -> tuple[int, int]:
            missing = {*stage.missing()}
            there = [number for number in range(len(self.samples)) if number not in missing]
            return len(there), sum(self.samples[number] for number in there)

        seconds = 0.2 if os.isatty(2) else 10
        with tqdm(
            desc=self.title,
            total=sum(self.samples),
            initial=done()[1],
            unit="sample",
            disable=not self.shown,
            mininterval=seconds,
            dynamic_ncols=True,
        ) as bar:
            scores: list[float] = []

            def advance(rows: list[Row]) -> None:
                shards, samples = done()  # those of other processes are counted too
                scores.extend(value for row in rows for value in self.score(row) if value == value)
                more: Mapping[str, str] = {"score": f"{sum(scores) / len(scores):.3f}"} if scores else {}
                bar.set_postfix({"shard": f"{shards}/{len(self.samples)}", **more}, refresh=False)
                bar.update(samples - bar.n)

            yield advance
