from types import SimpleNamespace

import pytest

from prefopt.generation.ends import Ends, end_tokens
from tests.helpers import CHATML, byte_bpe_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_bpe_tokenizer(["say hello world Human: hi Grüße"] * 3, 290)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_end_tokens_are_those_of_the_generation_config_and_of_the_tokenizer(tokenizer):
    eos = tokenizer.eos_token_id
    for named, expected in ((None, {eos}), (4, {4, eos}), ([4, 5], {4, 5, eos})):
        assert end_tokens(SimpleNamespace(eos_token_id=named), tokenizer) == expected


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (CHATML.replace("<|im_end|>", "</s>"), "</s>"),
        (CHATML.replace("<|im_end|>", ""), "</s>"),
        ("{{ raise_exception('no turns') }}", "</s>"),
    ],
    ids=["its own", "EOS", "none", "refuses"],
)
def test_the_chat_templates_own_terminator_is_one(template, end):
    tokenizer = byte_bpe_tokenizer(["hello"], 290, chat_template=template)
    expected = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)}
    assert end_tokens(SimpleNamespace(eos_token_id=None), tokenizer) == expected


def test_a_terminator_ends_and_is_no_text(tokenizer):
    ends = Ends(tokenizer, {tokenizer.eos_token_id})
    tokens = [*ids(tokenizer, " hello"), tokenizer.eos_token_id]
    assert ends.reached(tokens)
    assert not ends.reached(tokens[:-1])
    done = ends.completion(tokens, [-0.5] * len(tokens))
    assert (done.token_ids, done.text, done.finish_reason) == (tuple(tokens), " hello", "stop")
    assert done.logps == (-0.5,) * len(tokens)
    assert ends.completion(tokens[:-1]).finish_reason == "length"


def test_a_stop_text_ends_at_the_token_that_completes_it_and_is_cut_off(tokenizer):
    ends = Ends(tokenizer, {tokenizer.eos_token_id}, ("Human:", "üß"))
    for text, kept in ((" hello Human: hi", " hello "), (" Grüße world", " Gr")):
        tokens = ids(tokenizer, text)
        first = next(n for n in range(1, len(tokens) + 1) if ends.reached(tokens[:n]))
        stop = text[len(kept) :][: 6 if "Human" in text else 2]
        assert kept + stop in tokenizer.decode(tokens[:first])
        assert kept + stop not in tokenizer.decode(tokens[: first - 1])
        done = ends.completion(tokens[:first])
        assert (done.text, done.finish_reason) == (kept, "stop")


def test_a_stop_text_that_is_a_special_token_ends_by_its_id(tokenizer):
    ends = Ends(tokenizer, {tokenizer.eos_token_id}, ("<|im_end|>", "world"))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (ends.tokens, ends.texts) == ({tokenizer.eos_token_id, end}, ("world",))
    assert ends.completion([*ids(tokenizer, " hi"), end]).text == " hi"


def test_special_tokens_inside_are_no_text(tokenizer):
    ends = Ends(tokenizer, {tokenizer.eos_token_id})
    middle = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert ends.completion([*ids(tokenizer, " hi"), middle, *ids(tokenizer, " hello")]).text == " hi hello"
