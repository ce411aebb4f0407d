"""A mixture-of-experts whose routers are balanced, trained by two ranks: the run of one process."""

import pytest
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from prefopt.training.metrics import read_lines
from tests.dist.test_backends import alone, update_gap, weights  # noqa: F401 - a fixture
from tests.dist.test_towers import SGD
from tests.training.test_experts import SIZES


@pytest.fixture(scope="module")
def mixtral(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral") / "model"
    sizes = {**SIZES, "vocab_size": len(task.tokenizer), "num_hidden_layers": 1, "max_position_embeddings": 512}
    MixtralForCausalLM(MixtralConfig(**sizes)).save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("backend", [pytest.param("ddp", marks=pytest.mark.slow), "zero3", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_router_loss_of_two_processes_is_that_of_one(backend, server, command, alone, mixtral, tmp_path):  # noqa: F811
    settings = {**SGD, "model__path": mixtral, "model__router_aux_weight": 0.5}
    straight = alone("dpo", **settings)
    ended = server.train(command("dpo", tmp_path / "run", **settings), ranks=2, backend=backend)
    assert ended.status == 0, ended.err
    lines = [read_lines(output / "metrics.jsonl") for output in (tmp_path / "run", straight)]
    for mine, other in zip(*lines, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5), mine["step"]
        assert ("aux_loss" in mine) == ("aux_loss" in other) == (mine["split"] == "train")
        if "aux_loss" in other:
            assert mine["aux_loss"] == pytest.approx(other["aux_loss"], rel=1e-5)
    assert any(line.get("aux_loss", 0) > 0.9 for line in lines[0])
    start = load_file(mixtral / "model.safetensors")
    assert update_gap(weights(straight), weights(tmp_path / "run"), start) <= 1e-3
