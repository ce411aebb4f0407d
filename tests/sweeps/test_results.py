"""What the tables of a sweep say, from files as runs leave them."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from prefopt import settings as config
from prefopt.sweeps import progress
from prefopt.sweeps.manifest import ATTEMPT, RunStates, last_line
from prefopt.sweeps.results import status_table, write_results

SWEEP = "grid: {method: [dpo, sppo], seed: [0, 1]}\nbudget: {match: steps, value: 8}\n"


@pytest.fixture
def some(runs):
    """Four runs, and a function that writes what one of them would have."""
    found = runs(SWEEP)

    def trained(run, steps, done=True, **figures):
        output = Path(run.output)
        output.mkdir(parents=True)
        lines = [
            {"step": step, "split": "train", "seconds": 0.5, "pairs": 4, "tokens_processed": 100, "loss": 1.0}
            for step in range(1, steps + 1)
        ]
        if figures:
            lines.append({"step": steps, "split": "eval", "seconds": 1.0, "pairs": 7, **figures})
        (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if done:
            (output / "model").mkdir()
            (output / "model" / "manifest.json").write_text("{}")

    return found, trained


def test_results_hold_what_varies_and_the_last_evaluation_and_what_was_spent(some):
    runs, trained = some
    for number, run in enumerate(runs[:3]):
        trained(run, 8, loss=0.25 * (number + 1), **{"exact/reward": float(number), "kl/odd": 3.0})
    page, count = write_results(Path("runs/sweeps/sweep"), runs)
    assert count == 3
    with page.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        "run": runs[0].id,
        "method": "dpo",
        "seed": "0",
        "loss": "0.25",
        "exact/reward": "0.0",
        "kl/odd": "3.0",
        "steps": "8",
        "pairs": "32",
        "tokens": "800",
        "seconds": "4.0",
    }
    assert [row["method"] for row in rows] == ["dpo", "dpo", "sppo"]
    text = page.read_text()
    assert "3 of 4 runs are finished" in text
    assert "| run | method | seed | exact/reward | loss | steps | pairs | tokens | seconds |" in text
    assert "| dpo | 2 | 0.5 ± 0.71 | 0.375 ± 0.18 |" in text  # by hand: (0.25 + 0.5) / 2, 0.25 / sqrt(2)
    assert "| sppo | 1 | 2 | 0.75 |" in text
    assert write_results(Path("runs/sweeps/sweep"), runs[3:])[1] == 0


def test_status_says_how_far_each_run_is_and_what_went_wrong(some):
    runs, trained = some
    trained(runs[0], 8)
    trained(runs[1], 2, done=False, loss=1.0)
    states = RunStates(Path("runs/sweeps/sweep"))
    states.begin_attempt(runs[1], job="7_1")
    log = states.begin_attempt(runs[2])
    log.write_text(log.read_text() + "loading\nerror: there is poison\n")
    states.end_attempt(runs[2], 2)
    table = status_table(runs, states, {runs[1].id: "RUNNING", runs[3].id: "PENDING"})
    lines = [line.split() for line in table.splitlines()]
    assert table.startswith("4 runs: 1 done, 1 running, 1 queued, 1 failed; about ")
    # two of eight steps took 1 s, the evaluation another: 3 times 2 s are left, and 4 s of the run that waits
    assert "; about 0:10 left\n" in table
    assert lines[2] == ["run", "state", "step", "done", "left", "method", "seed"]
    assert lines[4] == [runs[1].id, "running", "2", "25%", "0:06", "dpo", "1"]
    assert lines[5] == [runs[2].id, "failed", "sppo", "0", "there", "is", "poison"]
    assert lines[6] == [runs[3].id, "queued", "sppo", "1"]


@pytest.mark.parametrize(
    ("flags", "fraction"),
    [
        (["--train.max_tokens", "400"], 0.5),
        (["--train.max_seconds", "4"], 0.25),
        (["--train.max_steps", "8"], 0.25),
        (["--model.path", "m", "--data.train", "p.jsonl", "--train.epochs", "2"], 0.2),
    ],
    ids=["tokens", "seconds", "steps", "epochs"],
)
def test_progress_goes_by_what_ends_the_run(tmp_path, flags, fraction):
    lines = [{"step": s, "split": "train", "seconds": 0.5, "tokens_processed": 100, "epoch": 0.2 * s} for s in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "sp')
    found = progress.progress_of(config.parse(["--method", "dpo", *flags]), tmp_path)
    assert found.step == 2
    assert found.fraction == pytest.approx(fraction)
    assert found.left == pytest.approx(1 / fraction - 1)


def test_figures_of_rounds_come_from_their_table(tmp_path):
    (tmp_path / "rounds.jsonl").write_text('{"round": 0, "score": 1.0}\n{"round": 1, "score": 2.0, "tokens": 9}\n')
    assert progress.last_metrics(tmp_path) == {"score": 2.0, "tokens": 9}
    config_of_rounds = config.parse(["--method", "sppo", "--rounds.count", "3"])
    assert progress.progress_of(config_of_rounds, tmp_path).fraction == 0.5


def test_last_line_is_the_error_of_the_last_attempt(tmp_path):
    log = tmp_path / "log"
    assert last_line(log) is None
    log.write_text(f"{ATTEMPT}1, now\nerror: old\n{ATTEMPT}2, now\nstep 1\rstep 2\nerror: new\nbye\n")
    assert last_line(log) == "new"
    log.write_text(f"{ATTEMPT}1, now\nTraceback\n  File x\nValueError: y\n")
    assert last_line(log) == "ValueError: y"


def test_what_a_run_wrote_last_is_shown_without_its_key_and_without_what_steers(some, monkeypatch):
    monkeypatch.setenv("LAB_API_KEY", "sk-of-mine-1234")
    runs, _ = some
    states = RunStates(Path("runs/sweeps/sweep"))
    log = states.begin_attempt(runs[0])
    with log.open("a") as file:
        file.write("x" * 390 + "\nerror: \x1b[2J\u202e refused " + "y" * 380 + " sk-of-mine-1234\n")
    record = states.end_attempt(runs[0], 1)
    assert record.error.startswith(r"\x1b[2J\u202e refused yyy")
    state = Path("runs/sweeps/sweep/state") / f"{runs[0].id}.json"
    assert "sk-of" not in record.error + state.read_text() + status_table(runs, states, {})
    state.write_text(json.dumps({"attempts": 1, "status": 1, "error": "of an older version: \x1b sk-of-mine-1234 a|b"}))
    assert r"of an older version: \x1b *** a|b" in status_table(runs, states, {})


def test_settings_stay_in_their_cells(some):
    runs, trained = some
    odd = [replace(run, settings={"method": name}) for run, name in zip(runs, ("a|b", "c\nd\x1b"), strict=False)]
    for run in odd:
        trained(run, 1)
    page, _ = write_results(Path("runs/sweeps/sweep"), odd)
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [len(re.findall(r"\|", rows[0]))] * 4
    assert "\x1b" not in page.read_text()
