"""The launcher of this machine: who is started when, with which share of it, and what becomes of those that fail."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prefopt.errors import ConfigError, PrefoptError
from prefopt.sweeps import expand, sweep_file
from prefopt.sweeps.command import sweep
from prefopt.sweeps.local import Slot, slots_of
from prefopt.sweeps.manifest import RunStates
from prefopt.training.output_folder import OutputLock

ROOT = Path(__file__).resolve().parent.parent.parent
STAND_IN = f"{sys.executable} {Path(__file__).parent / 'stand_in.py'}"
SWEEP = "fixed: {method: dpo, train.max_steps: 4}\ngrid: {seed: [0, 1, 2]}\n"


@pytest.fixture
def start(write, capfd):
    """Start a sweep whose runs are stand-ins. Returns (exit status, output)."""

    def start(text, *flags, plan=None):
        path = write(text)
        Path("plan").write_text(json.dumps(plan or {}))
        status = sweep([str(path), "--start_with", STAND_IN, *flags])
        return status, capfd.readouterr().out

    return start


def ids(text=SWEEP):
    return [run.id for run in known(text)]


def known(text=SWEEP):
    Path("other.yaml").write_text(f"output: runs/sweeps/sweep\n{text}")
    return expand.runs_of(sweep_file.read(Path("other.yaml")))


def started():
    return [json.loads(line) for line in Path("started.jsonl").read_text().splitlines()]


def test_sweep_when_all_runs_finish_then_each_was_started_once_and_another_time_adds_nothing(start):
    status, out = start(SWEEP)
    assert status == 0
    assert "3 of 3 runs are finished" in out
    assert [line["id"] for line in started()] == ids()
    assert started()[0]["argv"][:3] == ["-m", "prefopt", "train"]
    manifest = Path("runs/sweeps/sweep/manifest.jsonl")
    before = (manifest.read_text(), manifest.stat().st_mtime_ns)
    assert [json.loads(line)["id"] for line in before[0].splitlines()] == ids()
    assert start(SWEEP)[0] == 0
    assert len(started()) == 3
    assert (manifest.read_text(), manifest.stat().st_mtime_ns) == before
    # more runs in the file: those alone are started
    assert start(SWEEP.replace("2]", "2, 3]"))[0] == 0
    assert len(started()) == 4


@pytest.mark.parametrize("name", ["manifest.jsonl", "results.csv", "results.md"])
def test_sweep_when_its_folder_holds_a_file_of_another_then_that_is_left_alone(name, start):
    folder = Path("runs/sweeps/sweep")
    folder.mkdir(parents=True)
    (folder / name).write_text('{"mine": 1}\n')
    for begin in (lambda: start(SWEEP), lambda: sweep(["results", "sweep.yaml"])):
        with pytest.raises(PrefoptError, match=name):
            begin()
    assert [path.name for path in folder.iterdir()] == [name]
    assert (folder / name).read_text() == '{"mine": 1}\n'


def test_sweep_when_its_table_was_asked_for_before_then_it_starts_all_the_same(write, start):
    write(SWEEP)
    assert sweep(["results", "sweep.yaml"]) == 0
    assert start(SWEEP)[0] == 0


def test_run_when_it_fails_then_the_others_finish_and_it_is_started_again_on_request_only(write, start):
    write(SWEEP)
    poisoned = ids()[1]
    status, out = start(SWEEP, plan={poisoned: [2, 0]})
    assert status == 1
    assert f"{poisoned}: failed: there is poison in the pairs" in out
    assert "2 of 3 runs are finished, 1 failed; --retry true restarts them" in out
    assert start(SWEEP, plan={poisoned: [2, 0]})[0] == 1
    assert len(started()) == 3
    assert f"failed: {poisoned}: " in start(SWEEP, "--dry_run", "true", plan={poisoned: [2, 0]})[1]
    assert f"pending: {poisoned}: " in start(SWEEP, "--retry", "true", "--dry_run", "true", plan={poisoned: [2, 0]})[1]
    assert start(SWEEP, "--retry", "true", plan={poisoned: [2, 0]})[0] == 0
    assert [line["id"] for line in started()[3:]] == [poisoned]


def test_run_when_it_is_killed_then_the_signal_is_named(write, start):
    write(SWEEP)
    status, out = start(SWEEP, plan={ids()[0]: ["vanish"]})
    assert status == 1
    assert f"{ids()[0]}: failed: killed by SIGKILL" in out


def test_run_when_it_leaves_unfinished_then_it_is_started_again_but_not_for_ever_if_it_saves_nothing(write, start):
    write(SWEEP)
    first, second, _ = ids()
    status, out = start(SWEEP, plan={first: [75, 75, 75, 75, 0], second: [75, 74, 74, 74, 74]})
    assert status == 1
    counts = [sum(line["id"] == name for line in started()) for name in (first, second)]
    assert counts == [5, 4]
    assert f"{second}: failed: exited unfinished 3 times in a row without having saved" in out


STARTED = """
fixed: {method: dpo, model.path: base, data.train: pairs.jsonl, train.max_steps: 4}
start: {method: sft}
grid: {seed: [0, 1]}
"""


def test_run_when_another_makes_its_model_then_it_waits_for_its_end(write, start):
    assert start(STARTED, "--slots", "3")[0] == 0
    first, *others = started()
    assert first["id"].startswith("sft-")
    assert len(others) == 2
    assert all(first["ended"] < other["began"] for other in others)


def test_run_when_the_one_it_starts_from_fails_then_it_is_not_started_and_the_table_says_why(write, start, capfd):
    write(STARTED)
    status, _ = start(STARTED, plan={ids(STARTED)[0]: [2]})
    assert status == 1
    assert len(started()) == 1
    assert sweep(["status", "sweep.yaml"]) == 0
    table = capfd.readouterr().out
    assert "3 runs: 2 pending, 1 failed" in table
    assert table.count(f"waits for {ids(STARTED)[0]}, which failed") == 2
    assert "there is poison in the pairs" in table


def test_slots_share_cores_and_gpus_and_no_two_runs_have_the_same(write, start, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    write(SWEEP)
    plan = {name: ["meet"] for name in ids()[:2]}
    assert start(SWEEP.replace("2]", "2, 3]"), "--gpus_per_run", "2", plan=plan)[0] == 0
    lines = started()
    assert {line["CUDA_VISIBLE_DEVICES"] for line in lines} == {"4,5", "6,7"}
    for one in lines:
        assert one["OMP_NUM_THREADS"] == str(len(one["cores"]))
        at_once = [o for o in lines if o is not one and o["began"] < one["ended"] and one["began"] < o["ended"]]
        assert all(one["CUDA_VISIBLE_DEVICES"] != other["CUDA_VISIBLE_DEVICES"] for other in at_once)


def test_dealing_of_a_machine():
    four = [Slot((0, 1), ("a",)), Slot((2, 3), ("b",))]
    assert slots_of(None, 1, [0, 1, 2, 3], ["a", "b"]) == four
    assert slots_of(None, 2, [0, 1], ["a", "b", "c"]) == [Slot((0, 1), ("a", "b"))]
    assert slots_of(None, 1, [0, 1, 2], []) == [Slot((0, 1, 2))]
    assert slots_of(2, 1, [0, 1, 2], []) == [Slot((0,)), Slot((1, 2))]
    assert slots_of(3, 1, [0, 1], ["a"]) == [Slot((0,), ("a",)), Slot((0,), ("a",)), Slot((1,), ("a",))]
    with pytest.raises(ConfigError, match="--gpus_per_run: found 3, but this machine has 2 GPUs"):
        slots_of(None, 3, [0], ["a", "b"])


@pytest.fixture
def sweeping(write):
    """A sweep in a process of its own: two of its runs go on until they are asked to stop."""
    write(SWEEP)
    names = ids()
    Path("plan").write_text(json.dumps({name: ["wait", 0] for name in names[:2]}))
    command = [
        sys.executable,
        str(ROOT / "scripts" / "sweep.py"),
        "sweep.yaml",
        "--start_with",
        STAND_IN,
        "--slots",
        "2",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    waiting = [Path("runs/sweeps/sweep/runs") / name / "waiting" for name in names[:2]]
    end = time.monotonic() + 30
    while not all(path.exists() for path in waiting):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
    yield process
    process.kill()
    process.communicate()


def test_sweep_when_asked_to_stop_then_its_runs_save_and_the_same_command_continues(sweeping, start, capfd):
    assert sweep(["status", "sweep.yaml"]) == 0
    assert sweep(["cancel", "sweep.yaml"]) == 0
    assert f"requested process {sweeping.pid} to stop" in capfd.readouterr().out
    out, _ = sweeping.communicate(timeout=30)
    assert sweeping.returncode == 75
    assert "0 of 3 runs are finished; the same command resumes" in out
    assert [line["status"] for line in started()] == [75, 75]
    status, _ = start(SWEEP, plan={name: ["wait", 0] for name in ids()[:2]})
    assert status == 0
    assert [line["status"] for line in started()] == [75, 75, 0, 0, 0]


def test_sweep_when_another_one_works_on_it_then_it_is_refused(sweeping, start):
    with pytest.raises(Exception, match=r"runs/sweeps/sweep: another run is writing here \(process "):
        start(SWEEP)


def test_sweep_when_killed_then_it_goes_on_once_its_orphans_have_let_go(sweeping, start):
    sweeping.send_signal(signal.SIGKILL)
    sweeping.wait()
    orphan = OutputLock(Path("runs/sweeps/sweep/runs") / ids()[0])
    orphan.acquire()
    state = RunStates(Path("runs/sweeps/sweep")).state(known()[0], {})
    assert state == "running"
    threading.Timer(1, orphan.release).start()
    status, out = start(SWEEP, plan={name: ["wait", 0] for name in ids()[:2]})
    assert status == 0
    assert f"{ids()[0]}: waiting: a process of an earlier attempt still writes" in out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["sweep.yaml", "--slot", "2"], "--slot: unknown option of sweep; did you mean 'slots'?"),
        (["sweep.yaml", "--slots", "0"], "--slots: found 0, expected a number > 0"),
        (["sweep.yaml", "--launcher", "k8s"], "--launcher: found 'k8s', expected one of local, slurm"),
        (["sweep.yaml", "--sbatch", "--nodes=2"], "--sbatch: --launcher local does not read it; remove it"),
        (
            ["sweep.yaml", "--start_with", "torchrunn -x"],
            "--start_with: found 'torchrunn', which is not a program on this machine",
        ),
        (["status", "sweep.yaml", "--retry", "true"], "--retry: 'status' does not read it; remove it"),
        (["statsu", "sweep.yaml"], "sweep: found statsu sweep.yaml, expected one sweep file; did you mean 'status'?"),
        (["status"], "sweep: found no file, expected one sweep file"),
        (["swep.yaml"], "swep.yaml: No such file or directory; did you mean 'sweep.yaml'?"),
        (["task", "x"], "sweep task: found x, expected a manifest and a line number"),
        (["task", "x.jsonl", "0"], "x.jsonl: No such file or directory; start the sweep first"),
    ],
)
def test_mistake_on_the_command_line_is_one_line(write, argv, expected):
    write(SWEEP)
    with pytest.raises(Exception) as found:
        sweep(argv)
    assert str(found.value) == expected


def test_real_runs_two_at_a_time_end_in_one_table(write, worlds, capfd, monkeypatch):
    """The whole way: two runs over as many pairs, one of them at a rate at which nothing stays finite."""
    monkeypatch.setenv("PREFOPT_CACHE", str(worlds))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write("""
        fixed: {method: dpo, testbed.eval_pairs: 16, train.global_batch: 16, train.micro_batch: 16}
        list:
          - {optim.lr: 1e-3}
          - {optim.lr: 1e30}
        budget: {match: pairs, value: 48}
    """)
    assert sweep(["sweep.yaml", "--dry_run", "true"]) == 0
    assert not Path("runs").exists()
    assert sweep(["sweep.yaml", "--slots", "2"]) == 1
    out = capfd.readouterr().out
    assert "the loss or its gradient is not finite" in out or "weights that are not finite" in out
    rows = Path("runs/sweeps/sweep/results.csv").read_text().splitlines()
    assert rows[0].startswith("run,optim.lr,loss,")
    assert [row.split(",")[1] for row in rows[1:]] == ["0.001"]
    assert ",3,48," in rows[1]
    page = Path("runs/sweeps/sweep/results.md").read_text()
    assert "1 of 2 runs are finished" in page
    assert sweep(["status", "sweep.yaml"]) == 0
    assert "2 runs: 1 done, 1 failed" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_real_sweep_when_stopped_or_killed_then_the_same_command_ends_with_the_same_weights(how, write):
    write("""
        fixed: {method: dpo, testbed.eval_pairs: 16, train.global_batch: 16, train.micro_batch: 16, train.save_every: 7}
        grid: {seed: [0, 1]}
        budget: {match: steps, value: 150}
    """)
    sweep_of = [sys.executable, str(ROOT / "scripts" / "sweep.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    Path("straight.yaml").write_text(f"output: straight\n{Path('sweep.yaml').read_text()}")
    subprocess.run([*sweep_of, "straight.yaml", "--slots", "2"], env=environment, check=True)
    process = subprocess.Popen([*sweep_of, "sweep.yaml", "--slots", "2"], env=environment)
    runs = [Path(json.loads(line)["output"]) for line in Path("straight/manifest.jsonl").read_text().splitlines()]
    metrics = [Path("runs/sweeps/sweep/runs") / run.name / "metrics.jsonl" for run in runs]
    end = time.monotonic() + 120
    while not all(path.exists() and path.read_text().count("\n") > 10 for path in metrics):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(getattr(signal, how))
    assert process.wait(60) == (75 if how == "SIGTERM" else -signal.SIGKILL)
    assert not any((path.parent / "model").exists() for path in metrics)
    subprocess.run([*sweep_of, "sweep.yaml", "--slots", "2"], env=environment, check=True)
    for run, path in zip(runs, metrics, strict=True):
        log = Path("runs/sweeps/sweep/logs") / f"{run.name}.log"
        assert "resuming from" in log.read_text()
        weights = [folder / "model" / "model.safetensors" for folder in (run, path.parent)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
