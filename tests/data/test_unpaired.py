"""Mismatched completions: of another prompt, the same whatever batches, order and epochs."""

import numpy as np
import pytest

from prefopt.data.pairs import pair_metadata
from prefopt.data.unpaired import Mismatched, UnpairedStream, encoded_as_two, partners, rotated
from prefopt.errors import DataError
from prefopt.types import EncodedPair


def example(prompt, completion, masked=()):
    ids = list(range(10, 10 + completion))
    mask = [i not in masked for i in range(completion)]
    return EncodedPair([0, prompt], ids, None, mask, None, {"label": 1.0}, f"f:{prompt}")


def test_partner_is_the_next_one_with_another_prompt():
    assert partners(np.array([1, 1, 2, 3])).tolist() == [2, 2, 3, 0]
    assert partners(np.array([1, 2, 1])).tolist() == [1, 2, 1]
    assert partners(np.array([5, 5])).tolist() == [0, 1]


def test_every_example_gets_a_completion_of_another_prompt_and_always_the_same():
    pairs = [example(i % 5, 3 + i) for i in range(23)]
    view, again = Mismatched(pairs, 100), Mismatched(pairs, 100)
    lengths = {3 + i: i % 5 for i in range(23)}
    for i, pair in enumerate(view):
        assert lengths[len(pair.rejected_ids)] != i % 5
        assert pair == again[i]
        assert (pair.prompt_ids, pair.chosen_ids) == (pairs[i].prompt_ids, pairs[i].chosen_ids)
    assert len({len(pair.rejected_ids) for pair in view}) > 15, "completions are spread, not a few of them repeated"


def test_metadata_are_those_of_the_examples():
    pairs = [example(i % 3, 2 + i, masked=(0, 2)) for i in range(9)]
    view = Mismatched(pairs, 8)
    for name, of in {
        "rejected": lambda pair: len(pair.rejected_ids),
        "rejected_loss_tokens": lambda pair: sum(pair.rejected_mask),
        "chosen": lambda pair: len(pair.chosen_ids),
    }.items():
        assert pair_metadata(view, name, 2, 9).tolist() == [of(pair) for pair in view[2:9]]
    assert max(len(pair.prompt_ids) + len(pair.rejected_ids) for pair in view) == 8


def test_one_prompt_alone_is_refused():
    with pytest.raises(DataError, match=r"f\.jsonl: all 3 examples have the same prompt, expected two prompts"):
        Mismatched([example(1, 2), example(1, 3), example(1, 4)], 10, "f.jsonl")


def test_stream_reads_pairs_as_two_examples_with_partners_of_their_step():
    class Pairs:
        fingerprint = order_hash = "x"
        steps = epochs = None

        def counted_pairs(self, step):
            return 2

        def global_batch(self, step):
            return [
                EncodedPair([0, p], [1, 2], [3], [True, True], [True], {"weight": 1.0}, f"{step}:{p}") for p in (7, 8)
            ]

    rows = UnpairedStream(Pairs(), 10, True).global_batch(3)
    assert [(row.chosen_ids, row.columns["label"], row.where) for row in rows] == [
        ([1, 2], 1.0, "3:7"),
        ([3], 0.0, "3:7"),
        ([1, 2], 1.0, "3:8"),
        ([3], 0.0, "3:8"),
    ]
    assert [row.rejected_ids for row in rows] == [[1, 2]] * 4
    assert UnpairedStream(Pairs(), 10, False).global_batch(0) == [
        one for pair in Pairs().global_batch(0) for one in encoded_as_two(pair)
    ]
    assert rotated([], 10) == []
