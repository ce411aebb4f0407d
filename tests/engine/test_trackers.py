"""Trackers see what metrics.jsonl has, under the same names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefopt.cli import train
from prefopt.engine.metrics import read_lines

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(command, task, tmp_path_factory):
    """The output of a short run that logged to both trackers."""
    output = tmp_path_factory.mktemp("tracked") / "run"
    flags = command("dpo", output, train__max_steps=4, eval__every=4, track__to="wandb,tensorboard")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PREFOPT_CACHE": str(task.folder / "cache")}
    environment |= {"WANDB_SILENT": "true", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("WANDB_MODE", None)
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/train.py", *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return output


def test_tensorboard_when_named_then_it_has_every_number_of_the_metrics_file(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (run / "prefopt").glob("events.out.tfevents*")  # the folder is the project's name
    board = EventAccumulator(str(events))
    board.Reload()
    logged = {(tag, event.step): event.value for tag in board.Tags()["scalars"] for event in board.Scalars(tag)}
    for line in read_lines(run / "metrics.jsonl"):
        prefix = "eval/" if line["split"] == "eval" else ""
        for name, value in line.items():
            if name not in ("step", "split"):
                assert logged[prefix + name, line["step"]] == pytest.approx(value, rel=1e-6, abs=1e-30), name


def test_wandb_when_named_then_it_writes_offline_into_the_output_folder(run):
    runs = list((run / "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    assert list(runs[0].glob("*.wandb"))


def test_tracker_when_it_is_not_installed_then_one_line_says_so(command, tmp_path, capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trackio" else find(name))
    assert train(command("dpo", tmp_path / "o", track__to="trackio")) == 2
    said = capsys.readouterr().err
    assert said == "error: track.to: 'trackio' is not installed; pip install 'trackio', or leave it out\n"
    assert not (tmp_path / "o").exists()
