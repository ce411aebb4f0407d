"""The two sequences of a pair for a judge that reads both completions: what stands where, is cut, or is refused."""

import json
from dataclasses import replace

import pytest

from prefopt.data.comparison import FIRST, SECOND, BothOrders, encoder_for, plain_text
from prefopt.data.encode import encode_file
from prefopt.data.encoder import Encoder
from prefopt.data.rows import BadRow
from prefopt.data.structure import Structure, check_row_structure
from prefopt.errors import DataError
from prefopt.types import Needs, PairRow
from tests.helpers import byte_bpe_tokenizer

ROW = PairRow("Name a colour.", " red it is", " no", {"margin": 2.0}, "rows:1")


@pytest.fixture(scope="module", params=[True, False], ids=["adds BOS", "no BOS"])
def tokenizer(request):
    return byte_bpe_tokenizer(["Name a colour. red it is no"], vocab_size=300, bos=request.param)


def cut(encoder, row=ROW):
    (found,) = encoder.rows([row])
    return found


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_both_orders_when_all_fits_then_the_text_is_the_template(tokenizer):
    found = cut(BothOrders(tokenizer, 200))
    pair, bos = found.pair, "<s>" if tokenizer.bos_token else ""
    assert decoded(tokenizer, pair.prompt_ids) == f"{bos}Name a colour."
    assert decoded(tokenizer, pair.chosen_ids) == f"{FIRST}red it is{SECOND}no</s>"
    assert decoded(tokenizer, pair.rejected_ids) == f"{FIRST}no{SECOND}red it is</s>"
    assert check_row_structure(pair, Structure(tokenizer)) is None
    assert pair.chosen_mask == [True] * len(pair.chosen_ids)
    assert (found.cut_prompt, found.cut_completion, found.unterminated) == (False, False, 0)
    assert found.lengths == (len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids))
    assert (pair.columns, pair.where) == (ROW.columns, ROW.where)
    assert pair.prompt_key == Encoder(tokenizer, 200).pair(ROW).prompt_key, "held out like the rows of other methods"


def test_both_orders_when_a_completion_is_in_either_place_then_it_has_the_same_tokens(tokenizer):
    encoder = BothOrders(tokenizer, 200)
    one, other = encoder.pair(ROW), encoder.pair(replace(ROW, chosen=ROW.rejected, rejected=ROW.chosen))
    assert (one.chosen_ids, one.rejected_ids) == (other.rejected_ids, other.chosen_ids)


def test_both_orders_when_the_prompt_is_long_then_it_loses_its_head_and_the_completions_nothing(tokenizer):
    row = replace(ROW, prompt="long " * 80 + "end")
    whole = cut(BothOrders(tokenizer, 2000), row)
    found = cut(BothOrders(tokenizer, 100), row)
    assert (found.cut_prompt, found.cut_completion) == (True, False)
    assert found.lengths == whole.lengths
    assert found.pair.chosen_ids == whole.pair.chosen_ids
    assert len(found.pair.prompt_ids) + len(found.pair.chosen_ids) == 100
    assert decoded(tokenizer, found.pair.prompt_ids).endswith("long end")
    if tokenizer.bos_token:
        assert found.pair.prompt_ids[0] == tokenizer.bos_token_id
    assert check_row_structure(found.pair, Structure(tokenizer)) is None


@pytest.mark.parametrize(("chosen", "rejected"), [(90, 90), (90, 3), (3, 90)])
def test_both_orders_when_completions_are_long_then_the_longer_one_loses_its_tail(chosen, rejected, tokenizer):
    row = replace(ROW, prompt="p " * 40, chosen="abc " * chosen, rejected="xyz " * rejected)
    found = cut(BothOrders(tokenizer, 120), row)
    assert found.cut_completion
    texts = [decoded(tokenizer, ids).removesuffix("</s>") for ids in (found.pair.chosen_ids, found.pair.rejected_ids)]
    first, second = texts[0].removeprefix(FIRST).split(SECOND)
    assert texts[1] == f"{FIRST}{second}{SECOND}{first}", "both orders are cut alike"
    if min(chosen, rejected) == 3:
        assert min(first, second, key=len) in (("xyz " * 3).strip(), ("abc " * 3).strip()), "the short one is whole"
    else:
        assert abs(len(first) - len(second)) <= 8
    assert len(found.pair.prompt_ids) + len(found.pair.chosen_ids) in (119, 120)


def test_both_orders_when_there_is_no_room_then_it_says_how_much_is_needed(tokenizer):
    with pytest.raises(
        DataError, match=r"^data.max_length: found 8, expected at least \d+: a sequence holds the prompt"
    ):
        BothOrders(tokenizer, 8)


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [("  ", "empty completion"), ("</s>", "empty completion"), ("a</s>b", "EOS inside the completion")],
)
def test_both_orders_when_a_completion_cannot_be_read_then_the_row_is_bad(chosen, reason, tokenizer):
    found = cut(BothOrders(tokenizer, 200), replace(ROW, chosen=chosen))
    assert isinstance(found, BadRow)
    assert found.reason == reason


def test_both_orders_when_turns_are_messages_then_they_are_written_out(tokenizer):
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    assert plain_text([user]) == "Hi"
    assert plain_text([user, answer, user]) == "user: Hi\n\nassistant: Hello\n\nuser: Hi"
    row = PairRow([user, answer, user], [answer], [{**answer, "content": "Bye"}], {}, "rows:1")
    pair = BothOrders(tokenizer, 200).pair(row)
    assert decoded(tokenizer, pair.chosen_ids) == f"{FIRST}Hello{SECOND}Bye</s>"


def test_both_orders_when_a_pair_was_encoded_before_then_it_is_reread_to_the_same(tokenizer):
    row = replace(ROW, chosen="red", rejected="no")
    encoder = BothOrders(tokenizer, 200)
    before = Encoder(tokenizer, 200).pair(replace(row, prompt=row.prompt + "\n"))
    again = encoder.reread(before)
    assert again.chosen_ids == encoder.pair(row).chosen_ids
    assert again.rejected_ids == encoder.pair(row).rejected_ids
    assert again.prompt_ids == before.prompt_ids


def test_encode_file_when_both_orders_then_cuts_are_counted_and_the_cache_is_its_own(tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": "p", "chosen": "yes", "rejected": "no"},
        {"prompt": "q " * 99 + ":", "chosen": " a", "rejected": " b"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {
        kind: encode_file(path, tokenizer, max_length=90, kind=kind, cache_dir=tmp_path / "cache")
        for kind in (BothOrders, Encoder)
    }
    assert made[BothOrders].fingerprint != made[Encoder].fingerprint
    report = made[BothOrders].report
    assert (report.cut_prompts, report.cut_completions) == (1, 0)
    assert SECOND in decoded(tokenizer, made[BothOrders].pairs[0].chosen_ids)


def test_encoder_is_the_one_that_the_needs_name():
    assert encoder_for(Needs("none")) is Encoder
    assert encoder_for(Needs("none", output="scores", sequences="both_orders")) is BothOrders
