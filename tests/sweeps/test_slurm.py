"""What would be submitted, as a laptop without Slurm can say it. That it works is proved in tests/slurm."""

import shlex
from pathlib import Path

import pytest

from prefopt.cli import rounds
from prefopt.sweeps import slurm
from prefopt.sweeps.command import sweep

ROOT = Path(__file__).resolve().parent.parent.parent


def submitted(out):
    return [shlex.split(line) for line in out.splitlines() if line.startswith("sbatch ")]


def test_sweep_is_an_array_with_a_line_for_each_run_and_writes_nothing_when_dry(write, capfd):
    write("fixed: {method: dpo}\ngrid: {seed: [0, 1, 2]}\nbudget: {match: steps, value: 4}\n")
    flags = [
        "--launcher",
        "slurm",
        "--slots",
        "2",
        "--sbatch",
        "--partition=gpu --gpus-per-node=8",
        "--dry_run",
        "true",
    ]
    assert sweep(["sweep.yaml", *flags]) == 0
    out = capfd.readouterr().out
    (words,) = submitted(out)
    script, manifest = words[-2:]
    assert script == str(ROOT / "slurm" / "sweep.sbatch")
    assert words[:2] == ["sbatch", "--parsable"]
    assert "--array=0-2%2" in words
    assert words[-4:-2] == ["--partition=gpu", "--gpus-per-node=8"]
    assert f"--comment={Path(manifest).resolve()}" in words
    assert [line[:5] for line in out.splitlines()[2:]] == ["  0: ", "  1: ", "  2: "]
    assert not Path("runs").exists()


def test_runs_behind_their_start_depend_on_its_array_task(write, capfd):
    write("""
        fixed: {model.path: base, data.train: pairs.jsonl}
        start: {method: sft, per: [seed]}
        grid: {method: [dpo, sppo], seed: [0, 1]}
    """)
    sweep(["sweep.yaml", "--launcher", "slurm", "--dry_run", "true"])
    starts, first, second = submitted(capfd.readouterr().out)
    assert "--array=0-1" in starts
    assert not [word for word in starts if "dependency" in word]
    assert "--dependency=afterok:JOB1_0" in first
    assert "--dependency=afterok:JOB1_1" in second
    assert "--kill-on-invalid-dep=yes" in second


def test_rounds_are_a_chain_of_stages(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = ["--method", "sppo", "--rounds.count", "2", "--output", "runs/r", "--dry_run", "true"]
    own = ["--launcher", "slurm", "--parts", "4", "--sbatch", "--time=1:00:00", "--sbatch.train=--nodes=2"]
    assert rounds([*own, *flags]) == 0
    jobs = submitted(capfd.readouterr().out)
    stages = [(words[words.index("--round") + 1], words[words.index("--stage") + 1]) for words in jobs]
    one = ["generate", "judge", "pair", "train", "evaluate"]
    assert stages == [("0", "evaluate"), *(("1", name) for name in one), *(("2", name) for name in one)]
    for number, ((_, name), words) in enumerate(zip(stages, jobs, strict=True)):
        assert ("--array=0-3" in words) == (name in ("generate", "judge"))
        assert ("--nodes=2" in words) == (name == "train")
        assert "--time=1:00:00" in words
        assert (f"--dependency=afterok:JOB{number}" in words) == (number > 0)
        assert words[-6:] == ["--method", "sppo", "--rounds.count", "2", "--output", "runs/r"]
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--launcher", "k8s"], "--launcher: expected slurm; leave it out to run on this machine"),
        (["--launcher", "slurm", "--parts", "0"], "--parts: found 0, expected a number >= 1"),
        (
            ["--launcher", "slurm", "--sbatch.trian", "-N2"],
            "--sbatch.trian: expected the flags of one of generate, judge, pair, train, evaluate; did you mean 'train'",
        ),
        (["--launcher", "slurm", "--script", "no.sbatch"], "--script: found no file no.sbatch; expected the job"),
        (["--launcher", "slurm", "--stage", "pair", "--round", "1"], "--launcher: given with --stage, which runs the"),
        (["--sbatch"], "--sbatch: found no value"),
        (["--sbatch", "--comment='x"], '--sbatch: found "--comment=\'x": No closing quotation'),
    ],
)
def test_mistake_in_the_flags_of_rounds_is_one_line(capfd, flags, expected):
    assert rounds(["--method", "sppo", "--rounds.count", "2", *flags]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: {expected}")
    assert error.count("\n") == 1


def test_slurm_when_it_is_not_installed_then_is_one_line(write, capfd, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        slurm.TrainError, match="squeue: there is no such program on this machine; run this on a login node"
    ):
        slurm.jobs()


@pytest.mark.parametrize("name", ["train", "sweep", "rounds"])
def test_job_scripts_ask_to_be_told_in_time_and_to_come_back(name):
    text = (ROOT / "slurm" / f"{name}.sbatch").read_text()
    for line in ("#SBATCH --requeue", "#SBATCH --signal=USR1@120", "#SBATCH --open-mode=append"):
        assert f"{line}\n" in text
    assert 'source "${PREFOPT_ENV:-slurm/env.sh}"' in text
    assert sum("python -m prefopt" in line for line in text.splitlines()) == 1
