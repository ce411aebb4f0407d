"""Which pairs make up which step, in random order and grouped by length."""

import random
from itertools import chain

import pytest
import torch

from prefopt.data import loader
from prefopt.data.loader import FileBatches, padded_length
from prefopt.types import EncodedPair

each_order = pytest.mark.parametrize("grouped", [False, True], ids=["random", "grouped"])


def pairs(n, seed=0):
    draw = random.Random(seed)

    def ids():
        return [5] * draw.randint(1, 60)

    return [EncodedPair(ids(), ids(), ids(), [], [], where=str(i)) for i in range(n)]


def batches(n=45, size=4, seed=3, grouped=True, lengths=0):
    return FileBatches(pairs(n, lengths), size, seed, "rows", group_by_length=grouped)


def padded_share(found):
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
    assert padded_share(grouped) < padded_share(batches(n=400, grouped=False)) / 4
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
