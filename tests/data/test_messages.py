"""What a chat message may be in a data file, and dialogues as messages."""

import copy

import pytest

from prefopt.data.encode import encode_file
from prefopt.data.messages import dialogue_turns, read_messages
from prefopt.data.rows import read_rows
from prefopt.errors import DataError

USER = {"role": "user", "content": "q"}
ONE, TWO = ({"role": "assistant", "content": c} for c in "ab")
CALL = {"name": "look", "arguments": {"x": "sky"}}


def one(path, **settings):
    report = read_rows(path, **settings)
    (row,), (form,) = report.rows, report.formats
    return row, form


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "user", "content": "q", "turn": 3, "redacted": False, "name": None, "extra": {"a": [1.5, None]}},
         {"role": "user", "content": "q", "turn": 3, "redacted": False, "extra": {"a": [1.5, None]}}),
        ({"role": "assistant", "content": "a", "tool_calls": []}, ONE),
        ({"role": "assistant", "content": "a", "tool_calls": None}, ONE),
        ({"role": "assistant", "content": "a", "tool_calls": ""}, ONE),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]},
         {"role": "assistant", "content": None, "tool_calls": [CALL]}),
        ({"role": "assistant", "tool_calls": '[{"name": "look", "arguments": "{\\"x\\": \\"sky\\"}"}]'},
         {"role": "assistant", "content": None, "tool_calls": [CALL]}),
        ({**ONE, "tool_calls": [{"id": "1", "function": {**CALL, "arguments": "x"}}]},
         {**ONE, "tool_calls": [{"id": "1", "function": {**CALL, "arguments": "x"}}]}),
        ({"role": "tool", "content": "blue", "tool_call_id": "1"}, {"role": "tool", "content": "blue",
                                                                    "tool_call_id": "1"}),
        ({"role": "user", "content": [{"type": "text", "text": "q"}, {"text": "r", "image_url": None}, "s"]},
         {"role": "user", "content": "qrs"}),
        ({"from": "human", "value": "q"}, USER),
        ({"from": "gpt", "value": "a", "weight": 1}, {**ONE, "weight": 1}),
        ({"from": "system", "value": "be kind"}, {"role": "system", "content": "be kind"}),
    ],
)  # fmt: skip
def test_message_when_it_holds_more_than_text_then_the_template_is_given_it(message, expected):
    assert read_messages([message], "prompt") == [expected]


DEEP = {"a": 1}
for _ in range(80):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ({**USER, "content": [{"type": "image_url", "image_url": "x"}]},
         "'prompt[0].content[0]': a part of type 'image_url', expected text parts only"),
        ({**USER, "content": [{"type": "text", "text": "q"}, {"type": "image"}]},
         "'prompt[0].content[1]': a part of type 'image', expected text parts only"),
        ({**USER, "content": None}, "'prompt[0]': a message with 'role', expected 'role' and 'content'"),
        ({**USER, "content": 7}, "'prompt[0].content': found the number 7, expected a string"),
        ({**USER, "role": 7}, "'prompt[0].role': found the number 7, expected a string"),
        ({"from": "narrator", "value": "q"}, "'prompt[0].from': found 'narrator', expected human, gpt, system or tool"),
        ({**ONE, "tool_calls": "look()"}, "'prompt[0].tool_calls': text that is not JSON, expected tool calls as"),
        ({**ONE, "tool_calls": CALL}, "'prompt[0].tool_calls': found an object, expected a list of objects"),
        ({**ONE, "tool_calls": ["look"]}, "'prompt[0].tool_calls': a list of other things than objects, expected"),
        ({**USER, "meta": DEEP}, "'prompt[0].meta': more than 64 levels, expected at most 64"),
        ({**USER, "meta": ["\ud800"]}, "'prompt[0].meta': half of a surrogate pair, expected valid Unicode"),
    ],
)  # fmt: skip
def test_message_when_it_cannot_be_read_then_one_line_names_the_place(write, message, found):
    with pytest.raises(DataError) as error:
        read_rows(write({"prompt": [message, USER], "chosen": "a", "rejected": "b"}))
    assert str(error.value).startswith(f"pairs.jsonl:1: {found}")


def test_rows_when_of_sharegpt_then_read_as_messages(write):
    human, good, bad = ({"from": who, "value": text} for who, text in (("human", "q"), ("gpt", "a"), ("gpt", "b")))
    expected = ([USER], [ONE], [TWO])
    for record in (
        {"conversations": [human], "chosen": good, "rejected": bad},
        {"conversations": [human], "chosen": [good], "rejected": [bad]},
        {"chosen": [human, good], "rejected": [human, bad]},
        {"prompt": [human], "chosen": "a", "rejected": "b"},
    ):
        row, _ = one(write(record))
        assert (row.prompt, row.chosen, row.rejected) == expected
    row, form = one(write({"conversations": [human, good, human, bad]}), need_rejected=False)
    assert (row.prompt, row.chosen, form) == ([USER], [ONE, USER, TWO], "messages, prompt up to the first answer")


def test_rows_when_of_instructions_then_they_are_a_users_turn(write):
    asked = [{"role": "user", "content": "Add.\n\n1 and 2"}]
    pair = {"instruction": "Add.", "input": "1 and 2", "chosen": "a", "rejected": "b"}
    row, form = one(write(pair))
    assert (row.prompt, row.chosen, row.rejected, form) == (asked, [ONE], [TWO], "messages, explicit prompt")
    row, _ = one(write({"instruction": "Add.", "input": "", "output": "a"}), need_rejected=False)
    assert (row.prompt, row.chosen) == ([{"role": "user", "content": "Add."}], [ONE])
    row, _ = one(write({"instruction": "Add.", "input": None}), need_rejected=False, prompts_only=True)
    assert (row.prompt, row.chosen) == ([{"role": "user", "content": "Add."}], None)


def test_rows_when_the_template_is_given_arguments_then_the_row_carries_them(write):
    tools = [{"type": "function", "function": {"name": "look"}}]
    pair = {"prompt": [USER], "chosen": [ONE], "rejected": [TWO]}
    row, _ = one(write({**pair, "tools": tools, "chat_template_kwargs": {"enable_thinking": False}}))
    assert row.template_args == {"tools": tools, "enable_thinking": False}
    row, _ = one(write({**pair, "tools": '[{"type": "function", "function": {"name": "look"}}]', "documents": []}))
    assert row.template_args == {"tools": tools}
    for bad, found in (
        ({"tools": "look"}, "'tools': text that is not JSON"),
        ({"tools": ["look"]}, "'tools': found a list, expected a list of objects"),
        ({"chat_template_kwargs": [1]}, "'chat_template_kwargs': found a list, expected an object"),
        (
            {"chat_template_kwargs": {"tokenize": True}},
            "'chat_template_kwargs': found 'tokenize', expected arguments",
        ),
    ):
        with pytest.raises(DataError) as error:
            read_rows(write({**pair, **bad}))
        assert str(error.value).startswith(f"pairs.jsonl:1: {found}")


def test_rows_when_an_answer_is_a_call_without_text_then_it_is_no_empty_completion(write):
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    row, _ = one(write({"prompt": [USER], "chosen": [call], "rejected": [TWO]}))
    assert row.chosen == [call]


# Dialogues.

HH = "\n\nHuman: hi\n\nstill me: \n\nAssistant: hello\n\nHuman: Assistant: is a word\n\nAssistant:"


def test_dialogue_when_it_becomes_turns_then_only_the_markers_part_them():
    assert dialogue_turns(HH.removesuffix("\n\nAssistant:"), "chosen") == [
        {"role": "user", "content": "hi\n\nstill me:"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "Assistant: is a word"},
    ]


def test_rows_when_dialogues_are_wanted_as_messages_then_they_are_turns_with_the_same_key(write):
    turns = dialogue_turns(HH.removesuffix("\n\nAssistant:"), "chosen")
    whole = {"chosen": HH + " a", "rejected": HH + " b"}
    for record in (whole, {"prompt": HH, "chosen": " a", "rejected": " b"}):
        row, form = one(write(record), dialogues="messages")
        assert (row.prompt, row.chosen, row.rejected) == (turns, [ONE], [TWO])
        assert form.startswith("messages, from text, ")
        as_text, _ = one(write(record))
        assert as_text.prompt == HH
        assert as_text.prompt_key == row.prompt_key
    row, _ = one(write({"prompt": HH}), dialogues="messages", need_rejected=False, prompts_only=True)
    assert row.prompt == turns
    row, form = one(write({"prompt": "Q:", "chosen": " a", "rejected": " b"}), dialogues="messages")
    assert (row.prompt, form) == ("Q:", "text, explicit prompt")


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"chosen": HH + " a\n\nHuman: x", "rejected": HH + " b"},
         "'chosen': a completion with another turn after the answer, expected the assistant's answer only"),
        ({"chosen": "Note." + HH + " a", "rejected": "Note." + HH + " b"},
         "'prompt': text before the first turn, expected a dialogue that begins with '\\n\\nHuman:'"),
        ({"prompt": HH + " x\n\nAssistant:", "chosen": " a", "rejected": " b"},
         "'prompt': two assistant turns at its end, expected a human turn before the last one"),
        ({"chosen": HH + " a", "rejected": HH + "a "}, "'rejected': the same as 'chosen', expected two different"),
    ],
)  # fmt: skip
def test_dialogue_when_it_is_none_of_turns_then_the_row_is_bad(write, record, found):
    with pytest.raises(DataError) as error:
        read_rows(write(record), dialogues="messages")
    assert str(error.value).startswith(f"pairs.jsonl:1: {found}")


def test_dialogue_when_its_line_ends_are_of_two_characters_then_they_are_named(write):
    text = HH.replace("\n", "\r\n")
    with pytest.raises(DataError, match=r"^pairs.jsonl:1: 'chosen': a dialogue with CRLF line ends"):
        read_rows(write({"chosen": text + " a", "rejected": text + " b"}))


def test_call_without_text_when_the_template_wants_a_string_then_it_is_given_an_empty_one(write, tokenizer):
    """And one that asks whether there is content is given none; so are tools, and a prompt that begins the answer."""
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    row = {"prompt": [USER, call, {"role": "tool", "content": "t"}, {"role": "assistant", "content": "So "}]}
    path = write({**row, "chosen": "a", "rejected": "b", "tools": [{"name": "look"}]})
    template = (
        "{% for t in tools %}[{{ t.name }}]{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role + ':' + m.content }}"
        "{% for c in m.tool_calls %}({{ c.name }} {{ c.arguments.x }}){% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    for with_it, without in ((template, ""), (template.replace("m.content", "(m.content or 'none')"), "none")):
        other = copy.deepcopy(tokenizer)
        other.chat_template = with_it
        encoded = encode_file(path, other, max_length=120, cache_dir="cache")
        (pair,) = encoded.pairs
        assert other.decode(pair.prompt_ids).removeprefix("<s>") == (
            f"[look]<|im_start|>user:q<|im_end|><|im_start|>assistant:{without}(look sky)<|im_end|><|im_start|>tool:t"
            "<|im_end|><|im_start|>assistant:So "
        )
        assert other.decode(pair.chosen_ids) == "a<|im_end|>"
        assert dict(encoded.report.formats) == {"messages, explicit prompt, the prompt begins the answer": 1}
