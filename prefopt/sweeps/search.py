"""Search: draws that depend on the results of earlier runs, by Optuna's tree-structured Parzen estimator (optional)."""

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
from prefopt.sweeps.manifest import RunStates, SweepRun
from prefopt.sweeps.sweep_file import Search, Settings, Space, SweepFile

Draws = dict[str, list[Settings]]  # study -> its draws, in order


def require(file: SweepFile) -> None:
    """Raises: ConfigError where Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            f"{file.path}: search: 'optuna' is not installed; pip install 'prefopt[search]', or remove search"
        )


@dataclass
class SearchedRuns:
    """The runs of a search; new ones are added as earlier ones end.

    Each combination of grid and list is a study of its own with `draws` trials, so that all methods have the same
    number. Draws are stored in `search.json`, so a killed search resumes with the same trials.

    Args: slots: most runs that are drawn and not ended. on_new_runs: called with all runs after some were added.
    """

    file: SweepFile
    states: RunStates
    slots: int
    on_new_runs: Callable[[list[SweepRun]], None]
    _runs: list[SweepRun] = field(default_factory=list)

    def plan(self) -> list[SweepRun]:
        """The runs so far, and new ones while slots are free."""
        draws, studies = self._read(), list(map(self._key, expand.combinations(self.file)))
        combinations = dict(zip(studies, expand.combinations(self.file), strict=True))
        if not self._runs:
            self._runs = self._all(draws, combinations)
        added = False
        while self._open() < self.slots:
            study = min(studies, key=lambda key: len(draws.get(key, ())))
            if len(draws.get(study, ())) >= self.file.draws:
                break
            draws.setdefault(study, []).append(self._ask(combinations[study], draws.get(study, [])))
            write_sealed(self._path, draws)
            self._runs = self._all(draws, combinations)
            added = True
        if added:
            self.on_new_runs(self._runs)
        return self._runs

    @property
    def _path(self) -> Path:
        return self.file.output / "search.json"

    def _read(self) -> Draws:
        try:
            return read_sealed(self._path, unsealed=True) or {}
        except Damaged as error:
            raise Damaged(f"{error}; restore it from a copy, or choose another output") from None

    def _key(self, combination: Settings) -> str:
        """Hash of a study: of its settings, its spaces and its metric."""
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
        return expand.runs_at(
            self.file, expand.apply_conditions(self.file, {**combination, **drawn}), f"trial {number + 1}"
        )

    def _open(self) -> int:
        """Number of runs that are neither done nor failed."""
        return sum(not run.done and not self.states.get(run).failed for run in self._runs)

    def _ask(self, combination: Settings, before: list[Settings]) -> Settings:
        """The next draw of a study. The first third is random, as without a search."""
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
            elif self.states.get(run).failed:
                state = optuna.trial.TrialState.FAIL
            params = {key: _inside(self.file.random[key], drawn[key]) for key in drawn}
            study.add_trial(
                optuna.trial.create_trial(params=params, distributions=distributions, value=value, state=state)
            )
        params = study.ask(distributions).params
        return {
            key: space.values[params[key]] if space.kind == "choice" else float(f"{params[key]:.4g}")
            for key, space in self.file.random.items()
        }

    def _value(self, run: SweepRun) -> float | None:
        """The metric that is optimised; None where it is not finite."""
        figures, metric = progress.last_metrics(Path(run.output)), self._goal.metric
        if metric not in figures:
            known = sorted(figures)
            raise ConfigError(
                f"{self.file.path}: search: {run.id} has no metric '{metric}', expected one of {', '.join(known)}"
                f"{did_you_mean(metric, known)}"
            )
        return float(figures[metric]) if math.isfinite(figures[metric]) else None


def _distribution(space: Space) -> Any:
    import optuna

    if space.kind == "choice":  # by index: Optuna accepts plain values only
        return optuna.distributions.CategoricalDistribution(range(len(space.values)))
    low, high = map(float, space.values)
    return optuna.distributions.FloatDistribution(low, high, log=space.kind == "loguniform")


def _inside(space: Space, value: Any) -> Any:
    """A drawn value inside its distribution: rounding to four digits may have put it just outside."""
    if space.kind == "choice":
        return space.values.index(value)
    low, high = map(float, space.values)
    return min(max(value, low), high)
