"""Callbacks that the tests of test_callbacks.py name by dotted path."""

import json

from prefopt.training.callbacks import Callback


class Recorder(Callback):
    """Appends every hook with its step to hooks.jsonl in the output folder."""

    def __init__(self):
        self.state = {}

    def _record(self, hook, event, **more):
        if event.run.is_main:
            with (event.run.output / "hooks.jsonl").open("a") as file:
                file.write(json.dumps([hook, event.step, more]) + "\n")

    def on_start(self, event):
        self._record("on_start", event, resumed=event.resumed_from is not None)

    def on_step(self, event):
        assert event.line["loss"] == event.result.loss
        self._record("on_step", event)

    def on_evaluation(self, event):
        self._record("on_evaluation", event, pairs=event.line["pairs"])

    def on_save(self, event):
        self._record("on_save", event, complete=(event.folder / "manifest.json").is_file(), last=event.last)

    def on_end(self, event):
        self._record("on_end", event, outcome=event.outcome, model=event.model and event.model.name)


class Mean(Callback):
    """Keeps the running sum of losses over all attempts, and writes it at the end."""

    def __init__(self):
        self.steps, self.loss = 0, 0.0

    def on_step(self, event):
        self.steps += 1
        self.loss += event.result.loss

    def on_end(self, event):
        if event.outcome == "finished" and event.run.is_main:
            (event.run.output / "mean.json").write_text(json.dumps([self.steps, self.loss]))

    def state_dict(self):
        return {"steps": self.steps, "loss": self.loss}

    def load_state_dict(self, state):
        self.steps, self.loss = state["steps"], state["loss"]


class StopAt5(Callback):
    """Requests the end of the run after step 5, on rank 0 only."""

    def on_step(self, event):
        if event.step == 5 and event.run.is_main:
            event.run.stop("five are enough")


class Raises(Callback):
    """Fails after step 3 on the last rank."""

    def on_step(self, event):
        if event.step == 3 and event.run.rank == event.run.world_size - 1:
            raise ZeroDivisionError("no\nline")


class NoJson(Callback):
    """Its state cannot be written."""

    def state_dict(self):
        return {"run": object()}


class Unfit(Mean):
    """Its state is of another version of itself."""

    def load_state_dict(self, state):
        super().load_state_dict({"steps": state["count"]})


class NeedsArguments(Callback):
    def __init__(self, every):
        self.every = every


class NoCallback:
    pass
