"""A user's own method trains as docs/adding_a_method.md says: its code block is the file, its command is run."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from prefopt import registry
from prefopt.training.metrics import read_lines
from prefopt.training.runtime import Runtime
from tests.invariant.oracle import oracle_step
from tests.invariant.steps import Bench, difference, random_pairs, two_models

PAGE = (Path(__file__).resolve().parents[1] / "docs/adding_a_method.md").read_text()
CODE = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
COMMAND = re.search(r"```bash\n(.*?)```", PAGE, re.DOTALL)[1].replace("\\\n", " ").strip()
SHORT = ["--train.max_steps", "4", "--train.global_batch", "8", "--train.micro_batch", "3", "--eval.every", "4"]
SHORT += ["--optim.lr", "1e-2", "--data.eval_fraction", "0.2"]


@pytest.fixture(scope="module")
def folder(task, tmp_path_factory):
    """The folder that the page describes."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_lab").mkdir()
    (folder / "my_lab/my_method.py").write_text(CODE)
    rows = [json.loads(line) for line in task.pairs.read_text().splitlines()]
    keys = ("prompt", "chosen", "rejected")
    plain = [{**{key: row[key] for key in keys}, "margin": 0.1 * (i % 5)} for i, row in enumerate(rows)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    (folder / "path/to").mkdir(parents=True)
    (folder / "path/to/model").symlink_to(task.model)
    return folder


@pytest.fixture
def method(folder, monkeypatch):
    """The method's class, imported as the command would."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    yield registry.get("my_lab.my_method")
    for name in ("my_lab.my_method", "my_lab"):
        sys.modules.pop(name, None)


def test_own_method_when_the_pages_command_is_typed_then_it_trains(folder, server, task):
    program, *argv = shlex.split(COMMAND)
    assert program == "prefopt"
    done = server.python(["-m", "prefopt", *argv, *SHORT], folder)
    assert done.status == 0, done.out + done.err
    assert "method my_lab.my_method (beta 1.5, nll_weight 0.1)" in done.out.splitlines()[0]

    output = folder / "runs/mine"
    card = json.loads((output / "run_card.json").read_text())
    assert card["config"]["method"] == {"name": "my_lab.my_method", "beta": 1.5, "nll_weight": 0.1}
    assert card["reference"] is None
    lines = read_lines(output / "metrics.jsonl")
    steps = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss/preference"] + 0.1 * line["loss/nll"], rel=1e-6)
        assert {"my_method/gap", "accuracy/logit", "logps/chosen"} <= line.keys()
        assert not any(key.startswith(("kl/", "rewards/")) for key in line), "there is no reference"
    evals = [line for line in lines if line["split"] == "eval"]
    assert evals[-1]["loss"] < evals[0]["loss"]
    before, after = load_file(task.model / "model.safetensors"), load_file(output / "model/model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_own_method_when_a_row_has_no_margin_or_another_name_for_it_then_that_is_said_or_taken(
    folder, task, server, method
):
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    bad = folder / "bad.jsonl"
    bad.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "margin"}) + "\n" for row in rows))
    flags = ["--method", "my_lab.my_method", "--model.path", str(task.model), "--dry_run", "true"]
    ended = server.train([*flags, "--data.train", "bad.jsonl"], cwd=folder)
    assert ended.status == 2
    assert ended.err.startswith("error: bad.jsonl:1: 'margin'")
    for row in rows:
        row["score_gap"] = row.pop("margin")
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert server.train([*flags, "--data.train", "bad.jsonl"], cwd=folder).status == 0


def test_own_method_when_a_setting_is_wrong_then_one_line_says_so(folder, server):
    flags = ["--method", "my_lab.my_method", "--dry_run", "true"]
    ended = server.train([*flags, "--method.beta", "-1"], cwd=folder)
    assert (ended.status, ended.err) == (2, "error: method.beta: found -1.0, expected a finite number > 0\n")
    ended = server.train([*flags, "--method.nll_wieght", "1"], cwd=folder)
    assert ended.status == 2
    assert ended.err.endswith("unknown setting; did you mean 'method.nll_weight'?\n")


def test_own_method_when_asked_for_help_then_its_settings_are_listed(folder, server):
    ended = server.train(["--method", "my_lab.my_method", "--help"], cwd=folder)
    assert "Length-normalised preference with a margin per pair" in ended.out
    assert re.search(r"--method.nll_weight FLOAT +Weight of the likelihood term; >= 0. \[0.1\]", ended.out)


def test_own_method_when_a_step_is_cut_then_loss_and_gradients_are_those_of_the_formulas(method):
    torch.set_num_threads(1)
    models, pairs = two_models(torch.float64), random_pairs(method().needs.columns)
    bench = Bench(Runtime(Accelerator(cpu=True)), method(), models)
    expected = oracle_step(*models, method(), pairs)
    for micro in (8, 3, 1):
        assert difference(expected, bench.step(pairs, micro))[0] <= 1e-9
