"""Batches of like length do not change what is learned: an epoch's gradients average to that of the whole set."""

import pytest

from prefopt.data import loader
from prefopt.data.loader import FileBatches
from prefopt.data.mixture import Mixture
from prefopt.training.normalizers import counted_terms
from tests.invariant.methods import counted_in_every_way, methods
from tests.invariant.oracle import oracle_step
from tests.invariant.steps import Bench, gradient_gaps, random_pairs
from tests.training.architectures import tiny_model

METHODS = {name: method for name, method in methods().items() if not method.needs.batch_values}
COUNTED = counted_in_every_way(METHODS)
each_method = pytest.mark.parametrize("name", METHODS)
each_count = pytest.mark.parametrize("name", [name for name in METHODS if name in COUNTED])


@pytest.fixture(scope="module")
def models():
    """GPT-NeoX: Llama's norms compute in float32, whose rounding is another one when a loss is divided by three."""
    return [tiny_model("gpt-neox", seed).double() for seed in (1, 0)]


@pytest.fixture
def epoch(runtime, models, monkeypatch):
    """How far the average of an epoch's gradients is from the gradient of the whole set, the worst tensor of it."""
    monkeypatch.setattr(loader, "POOL", 2)

    def run(method, pairs, corrected=True):
        rows = random_pairs(method.needs.columns, pairs, seed=1)
        batches = FileBatches(rows, 4, 0, "rows", group_by_length=True)
        bench = Bench(runtime, method, models, grouped=rows if corrected else None)
        average = {}
        for step in range(batches.steps_per_epoch):
            batch = batches.global_batch(step)
            for key, gradient in bench.step(batch, 4)[1].items():
                average[key] = average.get(key, 0) + gradient * len(batch) / len(rows)
        whole = oracle_step(*models, method, rows)[1]
        return max(gradient_gaps(whole, average).values())

    return run


def counts_pairs(method, runtime, models):
    bench = Bench(runtime, method, models)
    batch = bench.run.batcher.collate(random_pairs(method.needs.columns))
    terms = counted_terms(method, batch)
    return all(bool((term.count == 1).all()) for term in terms)


@each_method
def test_epoch_when_grouped_then_its_average_gradient_is_that_of_the_whole_set(name, epoch):
    """The smaller batch is taken at its size: that its pairs weigh more is made up for by the chance to be in it."""
    assert epoch(METHODS[name], 11) <= 1e-9


@each_count
def test_epoch_when_steps_of_a_token_budget_are_grouped_then_their_average_gradient_is_that_of_the_whole_set(
    name, runtime, models, monkeypatch
):
    """A step of short pairs has more of them; divided by as many as a step has on average, none weighs more."""
    monkeypatch.setattr(loader, "POOL", 2)
    method = METHODS[name]
    rows = random_pairs(method.needs.columns, 11, seed=1)
    batches = FileBatches(rows, 4, 0, "rows", group_by_length=True, tokens_per_batch=100)
    bench, average, steps = Bench(runtime, method, models, grouped=rows), {}, batches.steps_per_epoch
    assert len({len(batches.global_batch(step)) for step in range(steps)}) > 1
    for step in range(steps):
        for key, gradient in bench.step(batches.global_batch(step), 4, batches.counted_pairs(step))[1].items():
            average[key] = average.get(key, 0) + gradient / steps
    whole = oracle_step(*models, method, rows)[1]
    assert max(gradient_gaps(whole, average).values()) <= 1e-9


@each_count
def test_epoch_when_sources_have_weights_and_batches_are_grouped_then_each_source_counts_by_its_weight(
    name, runtime, models, monkeypatch
):
    """The average is the gradient of a set that holds the pairs of each source as often as two epochs draw them."""
    monkeypatch.setattr(loader, "POOL", 2)
    method = METHODS[name]
    rows = random_pairs(method.needs.columns, 12, seed=1)
    mixture = Mixture([0, 4, 12], [2, 1], 0)  # 8 draws of the 4, 4 of the 8: two epochs see each of these once
    batches = FileBatches(rows, 4, 0, "rows", True, None, mixture)
    bench, average, steps = Bench(runtime, method, models), {}, 2 * batches.steps_per_epoch
    bench.trainer.normalizers.per_pair = bench.trainer.normalizers.averages(batches.grouped)
    for step in range(steps):
        for key, gradient in bench.step(batches.global_batch(step), 4)[1].items():
            average[key] = average.get(key, 0) + gradient / steps
    whole = oracle_step(*models, method, rows[:4] * 4 + rows[4:])[1]
    assert max(gradient_gaps(whole, average).values()) <= 1e-9


@each_count
def test_epoch_when_a_batch_is_divided_by_its_own_count_then_terms_that_count_tokens_are_biased(
    name, epoch, runtime, models
):
    gap = epoch(METHODS[name], 8, corrected=False)
    assert gap <= 1e-9 if counts_pairs(METHODS[name], runtime, models) else gap > 0.01
