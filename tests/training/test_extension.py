"""A finished run whose length is raised goes on from its last state, and says what becomes of the schedule."""

import json
import shutil
import signal

import pytest
from safetensors.torch import load_file

from prefopt.training.metrics import read_lines

SHORT = {"train__max_steps": 4, "train__save_every": 2, "eval__every": 2, "eval__max_pairs": 4}
LONG = SHORT | {"train__max_steps": 6}


def weights(folder):
    return {name: tensor.tolist() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.fixture
def train(server, command, tmp_path):
    def train(name, status=0, fault=None, **flags):
        ended = server.train(command("dpo", tmp_path / name, **flags), fault)
        assert ended.status == status, ended.err
        return ended.out + ended.err

    return train


def test_finished_run_under_a_constant_rate_when_extended_then_is_the_longer_run(train, tmp_path):
    constant = {"optim__schedule": "constant", "optim__warmup_steps": 1}
    train("straight", **LONG, **constant)
    train("run", **SHORT, **constant)
    before = weights(tmp_path / "run/model")
    said = train("run", **LONG, **constant)
    assert "extended at step 4 (train.max_steps: 4 -> 6): the constant schedule continues as in a run" in said
    assert weights(tmp_path / "run/model") == weights(tmp_path / "straight/model") != before
    assert weights(tmp_path / "run/model_step_00000004") == before
    steps = [line["step"] for line in read_lines(tmp_path / "run/metrics.jsonl") if line["split"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_run_when_killed_while_it_is_extended_then_ends_as_the_extended_one(train, tmp_path):
    run, select = tmp_path / "run", {"eval__select": "loss"}
    train("run", **SHORT, **select)
    kill = {"at": "prefopt.training.extension:_move_model_aside", "when": "before", "count": 1, "do": "SIGKILL"}
    train("run", status=-signal.SIGKILL, fault=kill, **LONG, **select)
    said = train("run", **LONG, **select)
    assert "this run is finished" not in said
    (record,) = json.loads((run / "run_card.json").read_text())["extended"]
    rates = {
        line["step"]: line["learning_rate"] for line in read_lines(run / "metrics.jsonl") if line["split"] == "train"
    }
    # warm-up of one step (10% of 6), then 1e-2 x (1 - 3/5) at step 5, where a run of 4 steps ended at 1e-2 x (1 - 2/3)
    assert (rates[4], rates[5]) == (pytest.approx(1e-2 / 3), pytest.approx(4e-3))
    assert "step 4 had the learning rate 0.003333, step 5 has 0.004" in record["schedule"]
    assert "would have had other learning rates until step 4" in record["schedule"]
    assert record["schedule"] in (run / "model/README.md").read_text()
    assert "this run is finished" in train("run", **LONG, **select)

    # what cannot be extended is one line, and nothing is lost
    kept = (run / "run_card.json").read_bytes()
    assert "the length of a finished run can only be raised" in train("run", status=2, **SHORT, **select)
    other = LONG | {"train__max_steps": 9, "optim__lr": 0.5}
    assert "holds a run with other settings (optim.lr: 0.01 -> 0.5; train" in train("run", 2, **other, **select)
    shutil.rmtree(run / "checkpoints")
    said = train("run", 2, **LONG | {"train__max_steps": 9}, **select)
    assert f"{run}/checkpoints/step_00000006: is missing; extending a run needs its last checkpoint" in said
    assert (run / "run_card.json").read_bytes() == kept
    assert (run / "model/manifest.json").exists()
