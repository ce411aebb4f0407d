"""`data.weight_column`: a pair of weight 2 counts like two of it, one of weight 0 like none."""

from dataclasses import replace

import pytest
import torch

from prefopt.errors import ConfigError
from prefopt.settings import parse
from tests.invariant.methods import methods
from tests.invariant.steps import Bench, difference, random_pairs, two_models
from tests.training.architectures import tiny_model

METHODS = {name: method for name, method in methods().items() if not method.needs.batch_values}
WEIGHTS = [2.0, 0.0, 1.0, 3.0, 1.0]


@pytest.mark.parametrize("name", METHODS)
def test_step_when_pairs_have_weights_then_it_is_that_of_as_many_copies(name, runtime):
    # GPT-NeoX: Llama's norms compute in float32
    method, models = METHODS[name], [tiny_model("gpt-neox", seed).double() for seed in (1, 0)]
    rows = random_pairs(method.needs.columns, len(WEIGHTS))
    weighted = [replace(row, columns={**row.columns, "w": w}) for row, w in zip(rows, WEIGHTS, strict=True)]
    copies = [row for row, w in zip(rows, WEIGHTS, strict=True) for _ in range(int(w))]
    expected = Bench(runtime, method, models).step(copies, 3)
    bench = Bench(runtime, method, models)
    bench.run.batcher.weights = "w"
    for micro in (5, 2):
        gap, where = difference(expected, bench.step(weighted, micro))
        assert gap <= 1e-9, (micro, where)


def test_weights_when_there_is_no_file_then_are_refused():
    with pytest.raises(ConfigError, match=r"^data.weight_column: given with the testbed, whose pairs have no such"):
        parse(["--method", "dpo", "--data.weight_column", "w"])


def test_evaluation_when_pairs_have_weights_then_its_loss_is_their_weighted_mean(runtime, tmp_path):
    method, models = METHODS["dpo"], two_models(torch.float64)
    rows = random_pairs(method.needs.columns, len(WEIGHTS))
    plain = Bench(runtime, method, models)
    losses = [plain.evaluate([row], 1, tmp_path)["loss"] for row in rows]
    bench = Bench(runtime, method, models)
    bench.run.batcher.weights = "w"
    weighted = [replace(row, columns={**row.columns, "w": w}) for row, w in zip(rows, WEIGHTS, strict=True)]
    found = bench.evaluate(weighted, 2, tmp_path)["loss"]
    assert found == pytest.approx(sum(w * x for w, x in zip(WEIGHTS, losses, strict=True)) / sum(WEIGHTS))
