"""The passes of each process: every pair in one of them, as many tokens for each."""

from itertools import pairwise

import numpy as np
import pytest

from prefopt.training.micro_batches import micro_batches


def lengths(n, seed=0):
    return np.random.default_rng(seed).integers(1, 300, n).astype(np.int32)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 64, 129])
def test_passes_are_disjoint_cover_all_and_are_as_many_for_each(n, world):
    rows = lengths(n)
    shares = micro_batches(rows, 2 * rows, 8, world)
    assert len(shares) == world
    assert {len(share) for share in shares} == {max(1, -(-n // (8 * world)))}, "no more passes than are needed"
    assert sorted(int(i) for share in shares for mine in share for i in mine) == list(range(n))
    assert all(len(mine) <= 8 for share in shares for mine in share)


def test_passes_when_one_process_then_are_the_sorted_rows_in_even_cuts():
    rows = np.array([3, 9, 9, 1, 5], np.int32)
    assert [mine.tolist() for mine in micro_batches(rows, rows, 2, 1)[0]] == [[1], [2, 4], [0, 3]]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_tokens_when_shared_out_then_are_about_as_many_for_each(world):
    for seed in range(20):
        rows = lengths(64, seed)
        tokens = [sum(int(rows[mine].sum()) for mine in share) for share in micro_batches(rows, rows, 8, world)]
        assert max(tokens) <= 1.1 * min(tokens), (seed, tokens)


def test_tokens_when_one_pair_is_very_long_then_the_other_process_takes_the_short_ones():
    rows = np.array([100] + [10] * 9, np.int32)
    first, second = (sorted(np.concatenate(share)) for share in micro_batches(rows, rows, 10, 2))
    assert first == [0]
    assert second == list(range(1, 10))


def test_rows_of_a_pass_are_of_like_length():
    rows = lengths(128)
    for share in micro_batches(rows, rows, 8, 2):
        for longer, shorter in pairwise(share):
            assert rows[longer].min() >= rows[shorter].max()
