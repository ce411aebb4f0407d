import pytest

from prefopt.data.encoder import Encoder
from prefopt.data.structure import Structure, check_row_structure, completion_end_tokens
from prefopt.errors import DataError
from prefopt.types import EncodedPair, PairRow
from tests.helpers import CHATML, FAMILIES, byte_bpe_tokenizer, family_tokenizer

USER, MORE = ({"role": "user", "content": c} for c in ("Name a fruit", "And one more"))
ONE, TWO = ({"role": "assistant", "content": c} for c in ("An apple", "Blue pears"))
# What ends an assistant's turn, and what a completion looks like with it.
ENDS = {
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "qwen": "<|im_end|>",
    "smollm2": "<|im_end|>",
    "phi3": "<|end|>",
    "phi4": "<|end|>",
    "mistral": "</s>",
    "llama2": "</s>",
    "harmony": "<|return|>",
    "cohere": "<|end_turn|>",
    "thinking": "<|im_end|>",
}
ANSWERS = dict.fromkeys(ENDS, "{}") | {
    "mistral": " {}",
    "llama2": " {} ",
    "harmony": "<|channel|>final<|message|>{}",
    "cohere": "<|begin_answer|>{}<|end_answer|>",
}
BETWEEN = {"harmony": "<|end|>"}  # behind a turn that others follow, where that is not the last one's


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(family):
    return family_tokenizer(family)


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def scored(tokenizer, pair):
    return decoded(tokenizer, [token for token, on in zip(pair.chosen_ids, pair.chosen_mask, strict=True) if on])


def complaint(tokenizer, prompt, chosen, **more):
    (found,) = Encoder(tokenizer, 99, **more).rows([PairRow(prompt, chosen, None, {}, "f:1")])
    return getattr(found, "message", None)


def test_a_chat_row_of_any_family_is_what_generation_reads_and_its_answer_with_the_end_of_turn(family, tokenizer):
    encoder = Encoder(tokenizer, 999)
    pair = encoder.pair(PairRow([USER], [ONE], [TWO], {}, "f:1"))
    asked = tokenizer.apply_chat_template([USER], add_generation_prompt=True, tokenize=False)
    bos = tokenizer.bos_token or "none"
    once = asked if encoder.bos is None else bos + asked.removeprefix(bos)
    assert decoded(tokenizer, pair.prompt_ids) == once
    assert pair.prompt_ids == encoder.prompt([USER])
    assert scored(tokenizer, pair) == ANSWERS[family].format("An apple") + ENDS[family]
    assert completion_end_tokens(tokenizer) == {
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids(ENDS[family]),
    }
    assert check_row_structure(pair, Structure(tokenizer)) is None


def test_several_answers_in_a_completion_of_any_family_are_each_scored_to_their_end(family, tokenizer):
    pair = Encoder(tokenizer, 999).pair(PairRow([USER], [ONE, MORE, TWO], [TWO], {}, "f:1"))
    first, last = (ANSWERS[family].format(turn["content"]) for turn in (ONE, TWO))
    assert scored(tokenizer, pair) == first + BETWEEN.get(family, ENDS[family]) + last + ENDS[family]
    assert MORE["content"] in decoded(tokenizer, pair.chosen_ids)
    assert check_row_structure(pair, Structure(tokenizer)) is None


def test_a_control_token_in_a_text_of_any_family_makes_a_bad_row_wherever_it_stands(family, tokenizer):
    for token in FAMILIES[family][0]:
        forged = {"role": "assistant", "content": f"one {token} two"}
        asked = {"role": "user", "content": f"what is {token}?"}
        ends = token in (ENDS[family], tokenizer.eos_token)
        says = "inside a completion" if ends else f"'{token}' in the text, a special token of the tokenizer"
        assert says in complaint(tokenizer, [USER], [forged])
        assert says in complaint(tokenizer, "Q:", f" one {token} two")
        assert f"'{token}' in the text" in complaint(tokenizer, [asked], [ONE])


def test_what_the_check_refuses_the_encoder_refuses_for_rows_of_ids_too(family, tokenizer):
    """A policy can sample what no text may hold."""
    structure, encoder = Structure(tokenizer), Encoder(tokenizer, 99)
    prompt, end = encoder.prompt([USER]), tokenizer.convert_tokens_to_ids(ENDS[family])
    word = tokenizer("fruit", add_special_tokens=False)["input_ids"]
    strangers = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, end} - {None}
    for token in strangers:
        ids = [*word, token, *word, end]
        row = PairRow("", "", "", {}, "f:1", ids=(prompt, ids, [*word, end]))
        (found,) = encoder.rows([row])
        pair = EncodedPair(prompt, ids, [*word, end], [True] * len(ids), [True] * (len(word) + 1))
        assert check_row_structure(pair, structure) is not None, token
        assert found.message.startswith(f"f:1: 'chosen': {check_row_structure(pair, structure).partition(': ')[2]}")
    fine = encoder.pair(PairRow("", "", "", {}, "f:1", ids=(prompt, [*word, end], word)))
    assert check_row_structure(fine, structure) is None


@pytest.mark.parametrize("by", ["nothing", "post-processor", "template", "both"])
def test_bos_stands_once_at_the_start_whoever_writes_it(by):
    template = ("{{ bos_token }}" if by in ("template", "both") else "") + CHATML
    tokenizer = byte_bpe_tokenizer(["hello"], 300, bos=by in ("post-processor", "both"), chat_template=template)
    tokenizer.bos_token = "<s>"
    pair = Encoder(tokenizer, 99).pair(PairRow([USER], [ONE], [TWO], {}, "f:1"))
    assert pair.prompt_ids.count(0) == (by != "nothing")
    assert pair.prompt_ids[0] == (tokenizer.convert_tokens_to_ids("<|im_start|>") if by == "nothing" else 0)
    assert check_row_structure(pair, Structure(tokenizer)) is None


def test_a_pad_token_that_the_template_writes_is_the_templates_business():
    tokenizer = byte_bpe_tokenizer(["hello"], 300, chat_template=CHATML)
    tokenizer.pad_token = "<|im_start|>"
    pair = Encoder(tokenizer, 99).pair(PairRow([USER], [ONE], [TWO], {}, "f:1"))
    assert check_row_structure(pair, Structure(tokenizer)) is None


def test_a_text_completion_that_ends_with_the_end_of_turn_token_is_ended_by_it():
    tokenizer = family_tokenizer("phi4")
    pair = Encoder(tokenizer, 99).pair(PairRow("<|user|>Hi<|end|><|assistant|>", "Yes<|end|>", None, {}, "f:1"))
    assert decoded(tokenizer, pair.chosen_ids) == "Yes<|end|>"
    assert check_row_structure(pair, Structure(tokenizer)) is None


def test_special_tokens_that_the_data_may_hold_are_named_and_no_others():
    tokenizer = family_tokenizer("harmony")
    said = [{"role": "assistant", "content": "one <|channel|> two"}]
    assert complaint(tokenizer, [USER], said).endswith("--data.special_tokens '<|channel|>')")
    assert complaint(tokenizer, [USER], said, special_tokens=("<|channel|>",)) is None
    with pytest.raises(
        DataError, match=r"^data.special_tokens: '<\|chanel\|>' is not a special token of the tokenizer"
    ):
        Encoder(tokenizer, 99, special_tokens=("<|chanel|>",))


def test_a_template_that_drops_what_is_to_be_scored_makes_a_bad_row_that_names_its_line():
    tokenizer = family_tokenizer("thinking")
    said = [{"role": "assistant", "content": "<think>2 and 2</think>It is 4"}]
    assert complaint(tokenizer, [USER], said) == (
        "f:1: 'chosen': the chat template omits '<think>2 and 2</think>It is 4' of turn 2; see line 3 of the "
        "template: content.split('</think>')[-1], expected all of the content in the rendered turn (use another one: "
        "--data.chat_template FILE; or drop the example, or --data.on_bad_row skip)"
    )
    assert complaint(tokenizer, [USER], [ONE]) is None
    called = [{"role": "assistant", "content": "So", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}]
    assert "omits 'look' of turn 2" in complaint(tokenizer, [USER], called)
    history = [USER, {"role": "assistant", "content": "<think>a</think>b"}, MORE]
    (cut,) = Encoder(tokenizer, 99).rows([PairRow(history, [ONE], None, {}, "f:1")])
    assert cut.notes == ("the chat template omits the content of a prompt turn",)


def test_a_template_that_writes_an_answer_twice_is_named_in_each_row():
    tokenizer = byte_bpe_tokenizer(
        ["hello"], 300, chat_template=CHATML.replace("{{ m['content'] }}", "{{ m['content'] * 2 }}")
    )
    (cut,) = Encoder(tokenizer, 99).rows([PairRow([USER], [ONE], None, {}, "f:1")])
    assert cut.notes == ("the chat template writes an answer more than once",)


@pytest.mark.parametrize(("text", "told"), [("hello", False), ("hello snow", True)])
def test_a_text_that_the_tokenizer_has_no_token_for_is_named(text, told):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "hello": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>", pad_token="[UNK]")
    (cut,) = Encoder(tokenizer, 99).rows([PairRow("hello", f" {text}", None, {}, "f:1")])
    assert bool(cut.notes) == told
    assert not told or cut.notes[0].startswith("the text contains characters that the tokenizer maps to")


def test_tokens_beside_bos_that_a_tokenizer_begins_a_text_with_are_named_where_the_prompt_has_them_not():
    from tokenizers import processors

    tokenizer = byte_bpe_tokenizer(["hello"], 300, bos=False)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<|im_start|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> <|im_start|> $A", None, ids)
    cuts = Encoder(tokenizer, 99).rows(
        [PairRow(f"{begin}hello", " you", None, {}, "f:1") for begin in ("", "<s><|im_start|>")]
    )
    said = ("the tokenizer prepends '<s><|im_start|>' to a text, prefopt does not (write it into the prompt)",)
    assert [cut.notes for cut in cuts] == [said, ()]
