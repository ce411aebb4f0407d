"""Views of pairs: what they say of their rows as arrays is what the rows themselves say."""

import pickle

import numpy as np
import pytest

from prefopt.data import encode, pairs
from prefopt.data.encode import encode_file
from prefopt.data.loader import padded_length
from prefopt.data.pairs import Concatenated, ConvertedPairs, Subset, input_tokens, padded_lengths, pair_metadata
from prefopt.types import Column
from tests.data.conftest import PAIR

USER, ANSWER, OTHER = (
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "a b"), ("assistant", "b"))
)
NAMES = ("prompt", "chosen", "rejected", "chosen_loss_tokens", "rejected_loss_tokens", "prompt_key", "column.win")


@pytest.fixture
def mapped(write, tokenizer, monkeypatch):
    """11 rows in pieces of 4, some of them dialogues whose masks have holes."""
    monkeypatch.setattr(encode, "_BATCH", 4)
    monkeypatch.setattr(pairs, "BLOCK", 3)
    rows = [{**PAIR, "prompt": f"Question {i % 7}:", "chosen": " yes" * (1 + i), "win": i / 10} for i in range(8)]
    rows += [{"prompt": [USER], "chosen": [ANSWER, USER, OTHER], "rejected": [OTHER], "win": 0.5} for _ in range(3)]
    path = write(*rows[::2], *rows[1::2])
    return encode_file(path, tokenizer, max_length=24, extra=(Column("win"),), cache_dir="cache").pairs


@pytest.fixture(params=["mapped", "subset", "concatenated", "subset of concatenated"])
def view(request, mapped):
    two = Concatenated([mapped, Subset(mapped, np.array([0, 3, 4, 9]))])
    return {
        "mapped": mapped,
        "subset": Subset(mapped, np.array([1, 2, 5, 10])),
        "concatenated": two,
        "subset of concatenated": Subset(two, np.array([0, 7, 8, 10, 11, 12, 14])),
    }[request.param]


@pytest.mark.parametrize("name", NAMES)
def test_metadata_of_a_view_are_those_of_its_rows(view, name):
    rows = list(view)
    assert len(rows) == len(view)
    for begin, end in ((0, len(rows)), (1, 4), (3, len(rows)), (2, 2)):
        found = pair_metadata(view, name, begin, end)
        assert found.tolist() == pair_metadata(rows, name, begin, end).tolist(), (begin, end)
    assert pair_metadata(view, name, 0, len(rows)).dtype == pair_metadata(rows, name, 0, len(rows)).dtype


def test_scored_tokens_when_a_dialogue_has_turns_of_others_then_are_fewer_than_its_tokens(mapped):
    tokens, scored = (pair_metadata(mapped, name, 0, len(mapped)) for name in ("chosen", "chosen_loss_tokens"))
    assert (scored <= tokens).all()
    assert (scored < tokens).sum() == 3


def test_lengths_of_a_view_are_those_of_its_rows(view):
    assert padded_lengths(view).tolist() == [padded_length(pair) for pair in view]
    assert input_tokens(view).tolist() == [
        2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in view
    ]


def test_fed_tokens_when_there_is_no_rejected_side_then_the_prompt_counts_once(write, tokenizer):
    found = encode_file(write(PAIR), tokenizer, max_length=24, need_rejected=False, cache_dir="cache").pairs
    assert input_tokens(found).tolist() == [len(found[0].prompt_ids) + len(found[0].chosen_ids)]


def test_view_when_indexed_then_is_a_sequence_like_a_list(view):
    rows = list(view)
    assert view[1:5:2] == rows[1:5:2]
    assert view[-1] == rows[-1]
    assert [*pickle.loads(pickle.dumps(view))] == rows
    for outside in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            view[outside]


def test_converted_pairs_are_converted_when_read(mapped):
    asked = []
    view = ConvertedPairs(mapped, lambda pair: asked.append(pair) or pair)
    assert len(view) == 11
    assert asked == []
    assert view[2] == mapped[2]
    assert asked == [mapped[2]]
