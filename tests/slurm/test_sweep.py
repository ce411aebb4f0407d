"""Sweeps as arrays and rounds as chains of jobs, on a real Slurm."""

import csv
import json
import shutil
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
SWEEP = "python scripts/sweep.py"


@pytest.fixture
def pairs(place, task):
    """The tiny model and its pairs, under short names in the folder that jobs are submitted from."""
    for name in ("model", "pairs.jsonl"):
        if not (place.folder / name).exists():
            (place.folder / name).symlink_to(task.folder / name)


def status(place, name):
    return place.shell(f"{SWEEP} status {name}.yaml")


def rows(place, name):
    with (place.folder / "runs" / "sweeps" / name / "results.csv").open() as file:
        return list(csv.DictReader(file))


def fixed(**more):
    settings = {"model.path": "model", "train.max_steps": 3, "train.global_batch": 5, "train.micro_batch": 5, **more}
    return "fixed: {" + ", ".join(f"{key}: {value}" for key, value in settings.items()) + "}\n"


def test_sweep_of_twelve_with_one_poisoned_finishes_eleven_and_the_last_one_after_the_fix(place, pairs):
    entries = [f"  - {{seed: {seed}, data.train: pairs.jsonl}}\n" for seed in range(11)]
    kept = {"reference.cache": "logps", "reference.cache_dir": "kept"}
    text = fixed(method="dpo", **kept) + "list:\n" + "".join(entries) + "  - {seed: 11, data.train: bad.jsonl}\n"
    (place.folder / "twelve.yaml").write_text(text)
    good = (place.folder / "pairs.jsonl").read_text()
    (place.folder / "bad.jsonl").write_text(good + '{"prompt": "p", "chosen": "c"}\n')
    shown = place.shell(f"{SWEEP} twelve.yaml --launcher slurm --slots 4 --dry_run true")
    said = place.shell(f"{SWEEP} twelve.yaml --launcher slurm --slots 4")
    assert said.startswith(shown)
    assert "submitted 12 of 12 runs" in said
    assert "submitted 0 of 12 runs" in place.shell(f"{SWEEP} twelve.yaml --launcher slurm")
    place.wait_for_all()
    table = status(place, "twelve")
    assert "12 runs: 11 done, 1 failed" in table
    assert "bad.jsonl:51: " in table
    assert "missing, expected a completion" in table
    assert len(rows(place, "twelve")) == 11
    models = {path: path.stat().st_mtime_ns for path in place.folder.glob("runs/sweeps/twelve/runs/*/model/*")}
    assert len({path.parent for path in models}) == 11

    (place.folder / "bad.jsonl").write_text(good)
    assert "submitted 0 of 12 runs" in place.shell(f"{SWEEP} twelve.yaml --launcher slurm")
    assert "submitted 1 of 12 runs" in place.shell(f"{SWEEP} twelve.yaml --launcher slurm --retry true")
    place.wait_for_all()
    assert "12 runs: 12 done" in status(place, "twelve")
    assert len([*(place.folder / "kept").glob("*/cache.json")]) == 1, "twelve runs asked their reference once"
    assert len(rows(place, "twelve")) == 12
    assert {path: path.stat().st_mtime_ns for path in models} == models
    states = [json.loads(path.read_text()) for path in place.folder.glob("runs/sweeps/twelve/state/*.json")]
    assert sorted(state["attempts"] for state in states) == [1] * 11 + [2]


def test_runs_that_start_from_a_run_are_submitted_behind_it(place, pairs):
    text = fixed(**{"data.train": "pairs.jsonl"}) + "start: {method: sft}\ngrid: {method: [dpo, tdpo]}\n"
    (place.folder / "started.yaml").write_text(text)
    said = place.shell(f"{SWEEP} started.yaml --launcher slurm")
    assert said.count("\nsbatch ") == 2
    assert "--dependency=afterok:" in said
    assert "submitted 3 of 3 runs" in said
    place.wait_for_all()
    assert "3 runs: 3 done" in status(place, "started")
    assert {row["method"] for row in rows(place, "started")} == {"dpo", "tdpo"}


def test_array_task_when_signalled_before_its_time_is_over_then_it_is_requeued_and_when_cancelled_it_is_not(place):
    text = (
        "fixed: {method: dpo, train.global_batch: 32, train.micro_batch: 16, testbed.eval_pairs: 16, "
        "eval.every: 1000}\nbudget: {match: steps, value: 200}\n"
    )
    (place.folder / "one.yaml").write_text(text)
    place.shell(f"{SWEEP} one.yaml --launcher slurm")
    (line,) = (place.folder / "runs/sweeps/one/manifest.jsonl").read_text().splitlines()
    run = json.loads(line)
    place.wait_for_step(run["output"], 20)
    assert "1 runs: 1 running" in status(place, "one")
    job = place.shell("squeue --noheader --format=%i").strip()
    place.shell(f"scancel --signal=USR1 {job}")
    place.wait_for_all()
    assert "1 runs: 1 done" in status(place, "one")
    state = json.loads((place.folder / f"runs/sweeps/one/state/{run['id']}.json").read_text())
    assert state["attempts"] == 2
    straight = place.weights(run["output"])

    shutil.rmtree(place.folder / "runs/sweeps/one")
    place.shell(f"{SWEEP} one.yaml --launcher slurm")
    place.wait_for_step(run["output"], 20)
    assert "cancelled 1 jobs" in place.shell(f"{SWEEP} cancel one.yaml")
    place.wait_for_all()
    assert "1 runs: 1 pending" in status(place, "one")
    place.shell(f"{SWEEP} one.yaml --launcher slurm")
    place.wait_for_all()
    assert "resuming from" in (place.folder / f"runs/sweeps/one/logs/{run['id']}.log").read_text()
    assert place.weights(run["output"]) == straight


ROUNDS = (
    "--method sppo --rounds.count 2 --rounds.prompts 8 --rounds.eval_prompts 4 --rounds.shard 2 --generate.batch 40 "
    "--train.global_batch 4 --train.micro_batch 4 --train.epochs 1 --train.threads 1"
)


def test_two_rounds_as_dependent_jobs_end_as_one_process_would(place):
    said = place.shell(f"python scripts/rounds.py --launcher slurm --parts 2 {ROUNDS} --output runs/rounds")
    assert said.count("sbatch --parsable") == 11
    assert said.count("--array=0-1") == 4
    assert said.count("--dependency=afterok:") == 10
    again = place.shell(f"python scripts/rounds.py --launcher slurm --parts 2 {ROUNDS} --output runs/rounds")
    assert "nothing to submit" in again
    place.wait_for_all(500)
    logs = "".join(path.read_text()[-500:] for path in sorted(Path(place.folder / "runs/rounds/logs").glob("*.out")))
    assert (place.folder / "runs/rounds/model").exists(), logs
    place.shell(f"python scripts/train.py {ROUNDS} --output runs/straight")
    assert place.weights("runs/rounds") == place.weights("runs/straight")
