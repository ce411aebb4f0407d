"""Hooks into training. Progress bar, trackers, patience and sample tables are callbacks, and a user's own are too.

`train.callbacks` names classes by dotted path; each is constructed without arguments. All ranks construct them and call
every hook at the same points; what only one rank may do (print, write a file) goes under `if event.run.is_main`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefopt.errors import ConfigError, TrainError

if TYPE_CHECKING:
    from prefopt.training.run import TrainingRun
    from prefopt.training.step_result import StepResult

_KEY = "train.callbacks"


@dataclass(frozen=True)
class StartEvent:
    """Training starts or resumes. Args: step: optimizer steps done so far. resumed_from: a checkpoint, or None."""

    run: TrainingRun
    step: int
    resumed_from: Path | None


@dataclass(frozen=True)
class StepEvent:
    """An optimizer step is done. Args: step: from 1. line: what metrics.jsonl has of it, the same on all ranks but for
    times and memory."""

    run: TrainingRun
    step: int
    result: StepResult
    line: Mapping[str, Any]


@dataclass(frozen=True)
class EvaluationEvent:
    """An evaluation is done, and its line is in metrics.jsonl.

    Args:
        step: optimizer steps before it.
        line: its metrics.
        tables: by name, the tables of evaluators such as the samples of eval.generate; on rank 0 only.
        texts: texts of evaluators for the terminal; on rank 0 only.
    """

    run: TrainingRun
    step: int
    line: Mapping[str, Any]
    tables: Mapping[str, Sequence[Mapping[str, Any]]]
    texts: Sequence[str]


@dataclass(frozen=True)
class SaveEvent:
    """A checkpoint is complete on disk. Args: folder: of the checkpoint. last: whether no step follows."""

    run: TrainingRun
    step: int
    folder: Path
    last: bool


@dataclass(frozen=True)
class EndEvent:
    """The run ends.

    Args:
        step: optimizer steps done.
        outcome: `finished`; `interrupted`: a signal asked the run to save and exit, and the same command resumes it;
            `failed`: an error is about to end the run, perhaps on this rank only, so nothing may wait for other ranks.
        model: the folder of the exported model if the run is finished.
    """

    run: TrainingRun
    step: int
    outcome: Literal["finished", "interrupted", "failed"]
    model: Path | None


class Callback:
    """Base class of callbacks; override the hooks that you need.

    The hooks of a run come in this order: `on_start`; then for every step `on_step`, `on_evaluation` where an
    evaluation follows the step (and before the first step with eval.at_start), `on_save` where a checkpoint follows;
    at last `on_end`. `event.run.stop(reason)` ends the run after the current step, with a last evaluation and
    checkpoint. An exception in a hook ends the run with one line that names the callback.

    A resumed run repeats the steps after its last checkpoint. A callback that remembers something across steps returns
    it from `state_dict`, and `load_state_dict` receives it before `on_start` of the resumed run; with that an
    interrupted run calls the same hooks with the same state as an uninterrupted one.
    """

    def on_start(self, event: StartEvent) -> None:
        """Before the first step of a run or of a resumed run."""

    def on_step(self, event: StepEvent) -> None:
        """After each optimizer step."""

    def on_evaluation(self, event: EvaluationEvent) -> None:
        """After each evaluation."""

    def on_save(self, event: SaveEvent) -> None:
        """After each checkpoint. Its copy of `state_dict` was taken before this call."""

    def on_end(self, event: EndEvent) -> None:
        """Once at the end, also after an error."""

    def state_dict(self) -> Mapping[str, Any]:
        """What a checkpoint keeps of this callback: JSON values. Called on all ranks; rank 0's is kept."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, on all ranks."""
        if state:
            raise ValueError(f"it restores no state, but the checkpoint has {', '.join(state)}")


def load(paths: Sequence[str]) -> dict[str, Callback]:
    """The callbacks that `train.callbacks` names, by dotted path.

    Raises: ConfigError for one that cannot be imported or constructed, or is no subclass of `Callback`.
    """
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise ConfigError(f"{_KEY}: '{twice}' is given twice")
    return {path: _construct(path) for path in paths}


def _construct(path: str) -> Callback:
    module_name, _, name = path.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in path.split(".")):
        dotted = path.removesuffix(".py").replace(":", ".").replace("/", ".")
        hint = f"; did you mean '{dotted}'?" if "." in dotted and dotted != path else ""
        raise ConfigError(f"{_KEY}: found '{path}', expected a class by dotted path, such as my_callbacks.Mine{hint}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules in the working directory
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except ModuleNotFoundError as error:
        where = f" (looked in {Path.cwd()} too)" if module_name.startswith(error.name or " ") else ""
        raise ConfigError(f"{_KEY}: '{path}': no module named '{error.name}'{where}") from error
    except Exception as error:
        raise ConfigError(f"{_KEY}: importing '{path}' failed: {_described(error)}") from error
    if found is None:
        raise ConfigError(f"{_KEY}: module '{module_name}' has no class '{name}'")
    if not (isinstance(found, type) and issubclass(found, Callback)):
        raise ConfigError(f"{_KEY}: '{path}' is no subclass of prefopt.training.callbacks.Callback")
    try:
        return found()
    except Exception as error:
        raise ConfigError(f"{_KEY}: '{path}' cannot be constructed without arguments: {_described(error)}") from error


class CallbackList:
    """All callbacks of a run: built-in ones first, then those of `train.callbacks` in their order.

    Args: builtin: their exceptions pass through. named: by dotted path; see `load`.
    """

    def __init__(self, run: TrainingRun, builtin: Sequence[Callback], named: Mapping[str, Callback]) -> None:
        self.run, self.builtin, self.named = run, builtin, named

    def on_start(self, event: StartEvent) -> None:
        self._call("on_start", event)

    def on_step(self, event: StepEvent) -> None:
        self._call("on_step", event)

    def on_evaluation(self, event: EvaluationEvent) -> None:
        self._call("on_evaluation", event)

    def on_save(self, event: SaveEvent) -> None:
        self._call("on_save", event)

    def on_end(self, event: EndEvent) -> None:
        if event.outcome != "failed":
            self._call("on_end", event)
            return
        for callback in (*self.builtin, *self.named.values()):
            with contextlib.suppress(Exception):  # the error that ends the run is the one to report
                callback.on_end(event)

    def state(self) -> dict[str, Any]:
        """The state of each named callback, for a checkpoint. Raises: TrainError where it is no JSON."""

        def checked(callback: Callback) -> dict[str, Any]:
            state = dict(callback.state_dict())
            json.dumps(state)
            return state

        return self._on_each("state_dict", checked)

    def restore(self, states: Mapping[str, Any], checkpoint: Path) -> None:
        """Give each named callback its state. Raises: TrainError where one is missing or does not fit."""
        lacking = sorted(self.named.keys() ^ states.keys())
        if lacking:
            found = "has no state of" if lacking[0] in self.named else "has the state of another callback,"
            raise TrainError(f"{_KEY}: {checkpoint} {found} '{lacking[0]}'; choose another --output")
        names = iter(self.named)
        self._on_each("load_state_dict", lambda callback: callback.load_state_dict(states[next(names)]))

    def _call(self, hook: str, event: Any) -> None:
        for callback in self.builtin:
            getattr(callback, hook)(event)
        self._on_each(f"{hook} at step {event.step}", lambda callback: getattr(callback, hook)(event))

    def _on_each(self, what: str, call: Callable[[Callback], Any]) -> dict[str, Any]:
        """What `call` returns for each named callback. Raises: TrainError, on all ranks, if it fails on any of them."""
        results: dict[str, Any] = {}
        failure: tuple[str, Exception] | None = None
        for name, callback in self.named.items():
            try:
                results[name] = call(callback)
            except Exception as error:
                failure = (f"callback {name}: {what} failed: {_described(error)}", error)
                break
        runtime = self.run.runtime
        if self.named and runtime.world > 1:  # what one rank met or requested holds for all of them
            mine = (failure and f"{failure[0]} (rank {runtime.rank})", self.run.stop_reason)
            lines, reasons = zip(*runtime.gather_objects([mine]), strict=True)
            self.run.stop_reason = next((reason for reason in reasons if reason is not None), None)
            line = next((line for line in lines if line is not None), None)
        else:
            line = failure and failure[0]
        if line is not None:
            raise TrainError(line) from (failure and failure[1])
        return results


def _described(error: Exception) -> str:
    """An exception in one line, with the place in the user's code that it came through."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    where = f" ({Path(theirs[0].filename).name}:{theirs[0].lineno})" if theirs else ""
    return f"{type(error).__name__}{f': {text}' if text else ''}{where}"
