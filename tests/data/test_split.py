import copy

import pytest

from prefopt.data.encode import encode_file
from prefopt.data.split import mark, prompt_keys, shared_prompts, split_by_prompt, version_of
from prefopt.errors import DataError
from prefopt.types import EncodedPair
from tests.data.conftest import PAIR


def pairs(number):
    return [EncodedPair([0, i % (number // 2)], [i], None, [True], None) for i in range(number)]


def test_split_when_prompts_repeat_then_none_is_on_both_sides_and_no_row_is_lost():
    rows = pairs(2000)
    train, held_out = split_by_prompt(rows, 0.1)
    assert shared_prompts(train, held_out) == 0
    assert sorted(pair.chosen_ids for pair in [*train, *held_out]) == [pair.chosen_ids for pair in rows]
    assert 140 <= len(held_out) <= 260
    assert train[:2] == [train[0], train[1]]
    assert len(train[1:3]) == 2


def test_split_when_rows_are_added_then_no_row_changes_its_side_and_a_seed_changes_many():
    few, many = split_by_prompt(pairs(2000)[:500], 0.3)[1], split_by_prompt(pairs(2000), 0.3)[1]
    assert [p for p in many if p.chosen_ids[0] < 500] == list(few)
    assert list(split_by_prompt(pairs(2000), 0.3, seed=1)[1]) != list(many)


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_split_when_the_hash_leaves_a_side_empty_then_one_prompt_goes_there(fraction):
    train, held_out = split_by_prompt(pairs(8), fraction)
    assert len(train) >= 1
    assert len(held_out) >= 1


def test_split_when_it_cannot_be_made_then_one_line_says_so():
    with pytest.raises(DataError) as error:
        split_by_prompt(pairs(2), 0.5)
    assert str(error.value) == "a split by prompt needs two prompts, found 1 (give held-out pairs: --data.eval)"
    with pytest.raises(DataError, match=r"^data.eval_fraction: found 1, expected a number between 0 and 1$"):
        split_by_prompt(pairs(8), 1.0)


def test_split_when_truncation_cuts_one_prompt_in_two_ways_then_it_is_still_one_prompt(write, tokenizer):
    rows = [{**PAIR, "prompt": "Question " * 9 + str(i % 5), "chosen": " a" * (1 + i)} for i in range(20)]
    encoded = encode_file(write(*rows), tokenizer, max_length=30, cache_dir="cache").pairs
    assert len({tuple(pair.prompt_ids) for pair in encoded}) > 5
    assert len(set(prompt_keys(encoded))) == 5
    assert list(prompt_keys(encoded)) == [pair.prompt_key for pair in encoded]
    train, held_out = split_by_prompt(encoded, 0.4)
    assert shared_prompts(train, held_out) == 0
    assert shared_prompts(encoded, held_out) == len(held_out)


def test_split_when_another_tokenizer_or_template_reads_the_file_then_the_same_prompts_are_held_out(
    write, tokenizer, bare_tokenizer
):
    """Chat rows through two templates, and one whose runs began before there were two versions."""
    rows = [
        {"prompt": [{"role": "user", "content": f"q{i}"}], "chosen": "a", "rejected": "b", "id": i} for i in range(60)
    ]
    other = copy.deepcopy(tokenizer)
    other.chat_template = other.chat_template.replace("<|im_start|>", "<|im_start|>the ")
    path, held = write(*rows), {}
    for version in (1, 2):
        for name, one in (("first", tokenizer), ("second", other)):
            pairs = encode_file(path, one, max_length=60, cache_dir="cache").pairs
            _, rest = split_by_prompt(pairs, 0.3, version=version)
            held[version, name] = [pair.where for pair in rest]
    assert held[2, "first"] == held[2, "second"] != held[1, "first"]
    assert held[1, "first"] != held[1, "second"]


def test_version_of_a_split_when_a_card_names_none_then_is_the_first():
    assert [version_of(f"abc-0.05{mark(version)}") for version in (1, 2)] == [1, 2]
    assert version_of("none") == 1
