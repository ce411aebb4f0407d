"""A multimodal wrapper trained on text by two ranks: the run of one, and a vision tower that is exported as it came."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefopt.training.metrics import read_lines
from tests.dist.test_backends import alone, update_gap  # noqa: F401 - a fixture
from tests.training.test_towers import TOWERS, tiny_gemma3

SGD = {"train__max_steps": 3, "train__save_every": 3, "eval__every": 3, "optim__name": "sgd", "optim__lr": 0.1}


@pytest.fixture(scope="module")
def wrapper(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrapper") / "model"
    tiny_gemma3(len(task.tokenizer)).save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)
    return folder


def loaded(folder):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model.state_dict()


@pytest.mark.parametrize("backend", ["ddp", "zero3", "fsdp2"])
def test_wrapper_is_trained_as_by_one_process_and_its_towers_are_exported_as_they_came(
    backend,
    server,
    command,
    alone,
    wrapper,
    tmp_path,  # noqa: F811
):
    settings = {**SGD, "model__path": wrapper}
    straight = alone("dpo", **settings)
    ended = server.train(command("dpo", tmp_path / "run", **settings), ranks=2, backend=backend)
    assert ended.status == 0, ended.err
    assert ended.out.count("which text does not use") == 1
    for mine, other in zip(*(read_lines(o / "metrics.jsonl") for o in (tmp_path / "run", straight)), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5), mine["step"]
    # by loading: under ZeRO-3 transformers writes the names that published checkpoints have
    start, expected, found = map(loaded, (wrapper, straight / "model", tmp_path / "run/model"))
    assert update_gap(expected, found, start) <= 1e-3
    of_towers = [name for name in start if name.startswith(TOWERS)]
    assert len(of_towers) > 10
    assert all(torch.equal(found[name], start[name]) for name in of_towers)
