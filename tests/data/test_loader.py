"""Which pairs make up which step, in random order and grouped by length."""

import random
from itertools import chain, pairwise

import pytest
import torch

from prefopt.data import loader
from prefopt.data.loader import FileBatches, padded_length
from prefopt.data.pairs import input_tokens
from prefopt.errors import DataError
from prefopt.types import EncodedPair

each_order = pytest.mark.parametrize("grouped", [False, True], ids=["random", "grouped"])


def pairs(n, seed=0):
    draw = random.Random(seed)

    def ids():
        return [5] * draw.randint(1, 60)

    return [EncodedPair(ids(), ids(), ids(), [], [], where=str(i)) for i in range(n)]


def batches(n=45, size=4, seed=3, grouped=True, lengths=0):
    return FileBatches(pairs(n, lengths), size, seed, "rows", group_by_length=grouped)


def padding_fraction(found):
    rows = [[padded_length(pair) for pair in found.global_batch(step)] for step in range(found.steps_per_epoch)]
    return 1 - sum(map(sum, rows)) / sum(len(row) * max(row) for row in rows)


def test_length_is_the_prompts_and_the_longer_completions():
    assert padded_length(EncodedPair([1, 2], [3], [4, 5, 6], [], [])) == 5
    assert padded_length(EncodedPair([1, 2], [3, 4], None, [], [])) == 4


@each_order
def test_epoch_when_it_ends_then_each_pair_was_in_one_batch_and_one_batch_was_smaller(grouped, monkeypatch):
    monkeypatch.setattr(loader, "POOL", 3)
    order = batches(grouped=grouped).order(2)
    assert sorted(row for batch in order for row in batch) == list(range(45))
    assert sorted(map(len, order)) == [1] + [4] * 11


def test_order_when_not_grouped_then_is_the_permutation_of_seed_and_epoch():
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 2)
    assert list(chain(*batches(grouped=False).order(2))) == torch.randperm(45, generator=generator).tolist()


@each_order
def test_step_when_asked_for_alone_then_is_the_one_of_a_run_from_the_start(grouped):
    straight = batches(grouped=grouped)
    steps = [straight.global_batch(step) for step in range(30)]
    assert all(batches(grouped=grouped).global_batch(step) == steps[step] for step in (29, 0, 13))


@each_order
def test_order_when_epoch_or_seed_differ_then_differs(grouped):
    found = batches(grouped=grouped)
    assert found.order(0) != found.order(1) != batches(grouped=grouped, seed=4).order(1)
    assert found.order_hash != batches(grouped=grouped, seed=4).order_hash
    assert found.order_hash != batches(grouped=not grouped).order_hash
    assert found.order_hash == batches(grouped=grouped).order_hash


def test_batches_when_grouped_then_are_of_like_length_and_in_no_order_of_length():
    grouped = batches(n=400)
    assert padding_fraction(grouped) < padding_fraction(batches(n=400, grouped=False)) / 4
    longest = [max(map(padded_length, grouped.global_batch(step))) for step in range(grouped.steps_per_epoch)]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def test_smaller_batch_when_grouped_then_its_pairs_and_its_place_do_not_depend_on_lengths():
    """Its pairs weigh more than others; drawn after sorting, short or long ones would be in it more often."""
    found = [batches(n=47, lengths=seed) for seed in (0, 1)]
    places = []
    for epoch in range(20):
        one, other = (
            [(place, batch) for place, batch in enumerate(each.order(epoch)) if len(batch) < 4] for each in found
        )
        assert one == other
        places.append(one[0][0])
    assert len(set(places)) > 5


def test_file_when_smaller_than_a_batch_then_is_one_batch():
    assert [sorted(batch) for batch in batches(n=3).order(0)] == [[0, 1, 2]]


# Steps of so many tokens.


def budgeted(budget=400, n=45, seed=3, grouped=False):
    return FileBatches(pairs(n), 4, seed, "rows", group_by_length=grouped, tokens_per_batch=budget)


def tokens_of(found, step):
    return int(input_tokens(found.global_batch(step)).sum())


@each_order
def test_epoch_when_steps_have_a_budget_then_each_pair_is_in_one_step_and_none_exceeds_it(grouped, monkeypatch):
    monkeypatch.setattr(loader, "POOL", 3)
    found = budgeted(grouped=grouped)
    for epoch in range(3):
        assert sorted(chain(*found.order(epoch))) == list(range(45))
    steps = range(found.steps(3))
    assert all(0 < tokens_of(found, step) <= 400 for step in steps)
    assert len({len(found.global_batch(step)) for step in steps}) > 2


def test_step_when_it_has_a_budget_then_takes_pairs_until_the_next_one_has_no_room():
    found = budgeted()
    order, tokens = found.order(1), input_tokens(found.pairs)
    assert list(chain(*order)) == list(chain(*batches(grouped=False).order(1))), "the order is the shuffling's"
    for batch, following in pairwise(order):
        assert tokens[batch].sum() + tokens[following[0]] > 400


def test_step_when_the_budget_is_met_exactly_then_takes_the_pair():
    same = [EncodedPair([5] * 2, [5] * 3, [5] * 3, [], [], where=str(i)) for i in range(6)]  # ten tokens each
    assert [len(batch) for batch in FileBatches(same, 4, 0, "rows", tokens_per_batch=20).order(0)] == [2, 2, 2]
    assert [len(batch) for batch in FileBatches(same, 4, 0, "rows", tokens_per_batch=29).order(0)] == [2, 2, 2]
    assert [len(batch) for batch in FileBatches(same, 4, 0, "rows", tokens_per_batch=10).order(0)] == [1] * 6


@each_order
def test_steps_when_epochs_differ_in_number_then_are_counted_through(grouped, monkeypatch):
    monkeypatch.setattr(loader, "POOL", 3)
    found = budgeted(grouped=grouped)
    each = [len(found.order(epoch)) for epoch in range(6)]
    assert len(set(each)) > 1, "all epochs are of one length, nothing is shown"
    assert [found.steps(epochs) for epochs in range(7)] == [sum(each[:epochs]) for epochs in range(7)]
    assert found.steps(2.5) == sum(each[:2]) + -(-each[2] // 2)
    assert found.steps_per_epoch == each[0]
    for step in range(sum(each)):
        assert found.steps(found.epochs(step) - 1e-12) <= step + 1
        epoch = int(found.epochs(step))
        assert found.global_batch(step) == [found.pairs[i] for i in found.order(epoch)[step - sum(each[:epoch])]]
    assert [found.epochs(sum(each[:epochs])) for epochs in range(6)] == list(range(6))


@each_order
def test_step_with_a_budget_when_asked_for_alone_then_is_the_one_of_a_run_from_the_start(grouped):
    straight = budgeted(grouped=grouped)
    steps = [straight.global_batch(step) for step in range(straight.steps(3))]
    for step in (len(steps) - 1, 0, len(steps) // 2):
        assert budgeted(grouped=grouped).global_batch(step) == steps[step]


@each_order
def test_order_with_a_budget_when_epoch_seed_or_budget_differ_then_differs(grouped):
    found = budgeted(grouped=grouped)
    assert found.order(0) != found.order(1)
    hashes = {found.order_hash, budgeted(grouped=grouped, seed=4).order_hash, budgeted(500, grouped=grouped).order_hash}
    assert len(hashes | {budgeted(grouped=not grouped).order_hash}) == 4


def test_batches_with_a_budget_when_grouped_then_are_of_like_length():
    random, grouped = (budgeted(2000, 400, grouped=grouped) for grouped in (False, True))
    assert padding_fraction(grouped) < padding_fraction(random) / 3


def test_budget_when_a_pair_alone_exceeds_it_then_the_longest_is_named():
    rows = pairs(45)
    tokens = input_tokens(rows)
    longest = int(tokens.argmax())
    with pytest.raises(DataError) as error:
        FileBatches(rows, 4, 0, "rows", tokens_per_batch=int(tokens.max()) - 1)
    assert str(error.value) == (
        f"train.tokens_per_batch: found {tokens.max() - 1}, but {longest} alone has {tokens.max()} tokens in its "
        "sequences, expected at least as many (raise it, or lower data.max_length)"
    )
    assert FileBatches(rows, 4, 0, "rows", tokens_per_batch=int(tokens.max())).steps_per_epoch > 1
