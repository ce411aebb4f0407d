"""Draws that learn: Optuna asks, runs answer, what was asked is kept."""

import json
import sys
from pathlib import Path

import pytest

from prefopt.errors import ConfigError
from prefopt.sweeps import manifest
from prefopt.sweeps.command import sweep
from tests.sweeps.test_local import STAND_IN

optuna = pytest.importorskip("optuna")

SEARCH = """
fixed: {method: dpo, train.max_steps: 4}
random: {draws: 14, optim.lr: {loguniform: [1e-8, 1]}}
search: optuna
maximize: score
"""


@pytest.fixture
def start(write):
    def start(text, *flags, plan=None):
        path = write(text)
        Path("plan").write_text(json.dumps(plan or {}))
        return sweep([str(path), "--start_with", STAND_IN, *flags])

    return start


def runs():
    return manifest.read(Path("runs/sweeps/sweep/manifest.jsonl"))


def far(run):
    """Powers of ten between a run's rate and the best one, 1e-4."""
    figures = json.loads((Path(run.output) / "metrics.jsonl").read_text())
    return (-figures["score"]) ** 0.5


def test_search_comes_nearer_to_what_is_best_than_its_first_draws(start):
    assert start(SEARCH) == 0
    found = sorted(runs(), key=lambda run: (Path(run.output) / "metrics.jsonl").stat().st_mtime_ns)
    assert len(found) == 14
    distances = [far(run) for run in found]
    assert min(distances[4:]) < min(distances[:4])
    assert sum(distances[9:]) / 5 < sum(distances[:4]) / 4
    assert start(SEARCH) == 0
    assert len(Path("started.jsonl").read_text().splitlines()) == 14, "a finished search starts nothing"


def test_search_when_it_goes_on_then_with_the_same_trials_and_more_of_them(start):
    few = SEARCH.replace("14", "3")
    assert start(few) == 0
    first = [run.id for run in runs()]
    assert start(SEARCH.replace("14", "5"), "--slots", "2") == 0
    assert {*first} < {run.id for run in runs()}
    assert len(runs()) == 5


def test_search_gives_every_method_as_many_trials(start):
    text = SEARCH.replace("method: dpo, ", "").replace("14", "3") + "grid: {method: [dpo, sppo]}\n"
    assert start(text, "--slots", "2") == 0
    assert sorted(run.settings["method"] for run in runs()) == ["dpo"] * 3 + ["sppo"] * 3


def test_search_when_a_trial_fails_then_it_learns_from_the_others(start):
    start(SEARCH.replace("14", "1"))
    (run,) = runs()
    for path in (Path(run.output) / "model", Path(run.output) / "attempts"):
        (path / "manifest.json").unlink() if path.is_dir() else path.unlink()
    assert start(SEARCH.replace("14", "4"), plan={run.id: [2]}) == 1
    assert sum((Path(run.output) / "metrics.jsonl").exists() and run.done for run in runs()) == 3


def test_search_when_no_run_has_its_metric_then_the_known_ones_are_named(start):
    with pytest.raises(ConfigError, match=r"search: dpo-\w+ has no metric 'scores', expected one of loss, .*'score'\?"):
        start(SEARCH.replace("maximize: score", "maximize: scores"))


def test_search_when_a_value_is_impossible_then_it_is_refused_before_anything_starts(start):
    with pytest.raises(ConfigError, match=r"run \d+ of 14 \(optim.clip=-0.*\): optim.clip: found -0"):
        start(SEARCH.replace("draws: 14,", "draws: 14, optim.clip: {uniform: [-1, 0]},"))
    assert not Path("runs").exists()


def test_search_on_slurm_or_without_optuna_is_refused_in_one_line(start, monkeypatch):
    with pytest.raises(ConfigError, match="search: its runs depend on each other's results; use --launcher local"):
        sweep([str(Path("sweep.yaml")), "--launcher", "slurm"]) if Path("sweep.yaml").exists() else start_slurm(start)
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"search: 'optuna' is not installed; pip install 'prefopt\[search\]'"):
        start(SEARCH)


def start_slurm(start):
    Path("sweep.yaml").write_text(SEARCH)
    sweep(["sweep.yaml", "--launcher", "slurm"])
