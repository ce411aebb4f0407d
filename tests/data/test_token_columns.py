"""Lists with a number per loss token, from the file to the batch."""

import json

import pytest
import torch

from prefopt.data.collate import collate
from prefopt.data.encode import encode_file
from prefopt.data.encoder import Encoder
from prefopt.data.layouts import LAYOUTS
from prefopt.data.rows import read_rows
from prefopt.errors import DataError
from prefopt.types import PairRow, TokenColumn
from tests.data.conftest import PAIR

COLUMN = TokenColumn("weights")
USER = {"role": "user", "content": "Name a fruit"}
ONE, TWO = ({"role": "assistant", "content": c} for c in ("An apple", "Blue pears"))


def encoded(name, tokenizer, tmp_path, *columns, max_length=99, **more):
    return encode_file(
        name, tokenizer, max_length=max_length, extra_tokens=columns, cache_dir=tmp_path / "cache", **more
    )


def numbered(tokenizer, record, max_length=99):
    """The record with 0.5, 1.5, ... for each loss token, and the same shifted by 100 on the rejected side."""
    row = PairRow(record["prompt"], record["chosen"], record["rejected"], {}, "f:1")
    pair = Encoder(tokenizer, max_length).pair(row)
    lengths = sum(pair.chosen_mask), sum(pair.rejected_mask)
    lists = ([first + i + 0.5 for i in range(n)] for first, n in zip((0, 100), lengths, strict=True))
    return record | dict(zip(COLUMN.keys, lists, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lists_when_collated_then_are_in_the_order_of_the_labels(layout, tokenizer, write, tmp_path):
    turns = {"prompt": [USER], "chosen": [ONE, USER, TWO], "rejected": [TWO]}
    rows = [numbered(tokenizer, record) for record in (PAIR, turns)]
    pairs = encoded(write(*rows), tokenizer, tmp_path, COLUMN).pairs
    batch = collate(pairs[:], pad_id=2, token_columns=("weights",), layout=layout)
    values = batch.token_columns["weights"]
    assert values.dtype == torch.float64
    assert values.shape == batch.labels.shape
    for sequence in range(4):
        expected = rows[sequence % 2][COLUMN.keys[sequence // 2]]
        assert values[batch.sequence_index == sequence].tolist() == expected


def test_lists_when_there_is_no_pair_then_are_empty():
    assert collate([], pad_id=2, token_columns=("weights",)).token_columns["weights"].shape == (0,)


def test_lists_when_a_completion_is_truncated_then_are_truncated_too(tokenizer, write, tmp_path):
    row = numbered(tokenizer, PAIR | {"chosen": " good and blue and clear"})
    (pair,) = encoded(write(row), tokenizer, tmp_path, COLUMN, max_length=8, overlong="truncate_completion").pairs[:]
    assert len(pair.chosen_ids) < len(row["chosen_weights"])
    assert pair.token_columns["chosen_weights"] == row["chosen_weights"][: len(pair.chosen_ids)]


@pytest.mark.parametrize("change", [-1, 1])
def test_lists_when_of_another_length_then_one_line_names_place_and_numbers(change, tokenizer, write, tmp_path):
    row = numbered(tokenizer, PAIR)
    tokens = len(row["rejected_weights"])
    row["rejected_weights"] = [1.0] * (tokens + change)
    with pytest.raises(DataError) as error:
        encoded(write(row), tokenizer, tmp_path, COLUMN)
    assert str(error.value) == (
        f"pairs.jsonl:1: 'rejected_weights': {tokens + change} numbers, expected {tokens}, one per loss token of the "
        "completion with its end token (compute them from the same tokenizer's ids, or drop the example, or "
        "--data.on_bad_row skip)"
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "'chosen_weights': missing, expected a list of numbers; the example has"),
        (0.5, "'chosen_weights': found the number 0.5, expected a list of numbers, one per loss token"),
        ([1.0, "x"], "'chosen_weights': found a string at index 1, expected a list of numbers"),
        ([True], "'chosen_weights': found the truth value true at index 0, expected a list of numbers"),
        ([1.0, float("nan")], "'chosen_weights': found nan at index 1, expected finite numbers"),
        ([1e400], "'chosen_weights': found inf at index 0, expected finite numbers"),
    ],
)
def test_lists_when_bad_then_one_line_says_so(value, said, write):
    name = write(PAIR | {"chosen_weights": value, "rejected_weights": [1.0]})
    (bad,) = read_rows(name, extra_tokens=(COLUMN,), on_bad_row="skip").bad
    assert said in bad.message


def test_lists_when_the_keys_have_other_names_or_are_json_text_then_they_are_read(write):
    name = write(PAIR | {"w": [1, 2], "rejected_weights": json.dumps([3.5])})
    (row,) = read_rows(name, extra_tokens=(COLUMN,), columns={"chosen_weights": "w"}).rows
    assert row.token_columns == {"chosen_weights": [1.0, 2.0], "rejected_weights": [3.5]}


def test_cache_when_no_lists_are_asked_for_then_it_is_that_of_before(tokenizer, write, tmp_path):
    row = numbered(tokenizer, PAIR)
    name = write(row)
    with_lists, without = (encoded(name, tokenizer, tmp_path, *columns) for columns in ((COLUMN,), ()))
    assert len(list((tmp_path / "cache").glob("*/rows.arrow"))) == 2
    assert with_lists.fingerprint != without.fingerprint
    assert without.pairs[0].token_columns == {}
    plain = encoded(write(PAIR, name="plain.jsonl"), tokenizer, tmp_path)
    assert plain.fingerprint == without.fingerprint
    row["chosen_weights"][0] += 1
    assert encoded(write(row), tokenizer, tmp_path, COLUMN).fingerprint != with_lists.fingerprint


def test_collate_when_a_list_does_not_fit_then_it_raises(tokenizer, write, tmp_path):
    (pair,) = encoded(write(numbered(tokenizer, PAIR)), tokenizer, tmp_path, COLUMN).pairs[:]
    pair.token_columns["chosen_weights"].append(0.0)
    with pytest.raises(ValueError, match="one number per loss token"):
        collate([pair], pad_id=2, token_columns=("weights",))
