"""Draws that learn from the runs before them, by Optuna's tree-structured Parzen estimator; Optuna is optional."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.errors import ConfigError, did_you_mean
from prefopt.storage import Damaged, read_sealed, text_hash, write_sealed
from prefopt.sweeps import expand, progress
from prefopt.sweeps.manifest import Ledger, SweepRun
from prefopt.sweeps.sweep_file import Search, Settings, Space, SweepFile

Draws = dict[str, list[Settings]]  # study -> what was asked for, in order


def require(file: SweepFile) -> None:
    """Raises: ConfigError where Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            f"{file.path}: search: 'optuna' is not installed; pip install 'prefopt[search]', or leave it out"
        )


@dataclass
class Searched:
    """The runs of a sweep that searches, which become more as others end.

    Each combination of grid and list is a study of its own with `draws` trials, so that no method gets more of them
    than another. What was asked for is kept in `search.json`, so a killed search goes on with the same trials.

    Args: slots: most runs that are asked for and not at their end. keep: called with all runs whenever there are more.
    """

    file: SweepFile
    ledger: Ledger
    slots: int
    keep: Callable[[list[SweepRun]], None]
    _runs: list[SweepRun] = field(default_factory=list)

    def plan(self) -> list[SweepRun]:
        """The runs so far, and new ones while there are slots for them."""
        draws, studies = self._read(), list(map(self._key, expand.combinations(self.file)))
        combinations = dict(zip(studies, expand.combinations(self.file), strict=True))
        if not self._runs:
            self._runs = self._all(draws, combinations)
        asked = False
        while self._open() < self.slots:
            study = min(studies, key=lambda key: len(draws.get(key, ())))
            if len(draws.get(study, ())) >= self.file.draws:
                break
            draws.setdefault(study, []).append(self._ask(combinations[study], draws.get(study, [])))
            write_sealed(self._path, draws)
            self._runs = self._all(draws, combinations)
            asked = True
        if asked:
            self.keep(self._runs)
        return self._runs

    @property
    def _path(self) -> Path:
        return self.file.output / "search.json"

    def _read(self) -> Draws:
        try:
            return read_sealed(self._path, unsealed=True) or {}
        except Damaged as error:
            raise Damaged(f"{error}; put it back from a copy, or choose another output") from None

    def _key(self, combination: Settings) -> str:
        """Of a study, which another space or another goal makes another one."""
        about = [combination, {key: (s.kind, s.values) for key, s in self.file.random.items()}, self._goal.metric]
        return text_hash(json.dumps(about, default=str))[:16]

    @property
    def _goal(self) -> Search:
        assert self.file.search is not None
        return self.file.search

    def _all(self, draws: Draws, combinations: dict[str, Settings]) -> list[SweepRun]:
        runs: dict[str, SweepRun] = {}
        for study, combination in combinations.items():
            for number, drawn in enumerate(draws.get(study, ())):
                runs |= {run.id: run for run in self._at(combination, drawn, number)}
        return sorted(runs.values(), key=lambda run: bool(run.after))

    def _at(self, combination: Settings, drawn: Settings, number: int) -> list[SweepRun]:
        return expand.runs_at(self.file, expand.met(self.file, {**combination, **drawn}), f"trial {number + 1}")

    def _open(self) -> int:
        """Runs that are asked for and neither done nor failed."""
        return sum(not run.done and not self.ledger.get(run).failed for run in self._runs)

    def _ask(self, combination: Settings, before: list[Settings]) -> Settings:
        """What to try next. The first third is drawn without looking back, as it is without a search."""
        number = len(before)
        if number < max(1, min(10, self.file.draws // 3)):
            return expand.draw(self.file, number)
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        distributions = {key: _distribution(space) for key, space in self.file.random.items()}
        seed = random.Random(f"{self.file.draw_seed} {number}").getrandbits(32)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, constant_liar=True)
        study = optuna.create_study(direction="maximize" if self._goal.maximize else "minimize", sampler=sampler)
        for index, drawn in enumerate(before):
            run = self._at(combination, drawn, index)[-1]
            value, state = None, optuna.trial.TrialState.RUNNING
            if run.done:
                value = self._value(run)
                state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
            elif self.ledger.get(run).failed:
                state = optuna.trial.TrialState.FAIL
            params = {key: _inside(self.file.random[key], drawn[key]) for key in drawn}
            study.add_trial(
                optuna.trial.create_trial(params=params, distributions=distributions, value=value, state=state)
            )
        asked = study.ask(distributions).params
        return {
            key: space.values[asked[key]] if space.kind == "choice" else float(f"{asked[key]:.4g}")
            for key, space in self.file.random.items()
        }

    def _value(self, run: SweepRun) -> float | None:
        """What the run is judged by; None where it came to nothing finite."""
        figures, metric = progress.last_figures(Path(run.output)), self._goal.metric
        if metric not in figures:
            known = sorted(figures)
            raise ConfigError(
                f"{self.file.path}: search: {run.id} has no metric '{metric}', expected one of {', '.join(known)}"
                f"{did_you_mean(metric, known)}"
            )
        return float(figures[metric]) if math.isfinite(figures[metric]) else None


def _distribution(space: Space) -> Any:
    import optuna

    if space.kind == "choice":  # by number: Optuna takes plain values only
        return optuna.distributions.CategoricalDistribution(range(len(space.values)))
    low, high = map(float, space.values)
    return optuna.distributions.FloatDistribution(low, high, log=space.kind == "loguniform")


def _inside(space: Space, value: Any) -> Any:
    """A value that was drawn, as its distribution knows it: rounding may have put it just outside."""
    if space.kind == "choice":
        return space.values.index(value)
    low, high = map(float, space.values)
    return min(max(value, low), high)
