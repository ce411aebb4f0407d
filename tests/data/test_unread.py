"""What a data file holds and nobody reads: a line of the report each."""

import pytest

from prefopt.data.encode import encode_file
from prefopt.data.rows import RowReader

PAIR = {"prompt": "Q:", "chosen": " a", "rejected": " b"}
USER = {"role": "user", "content": "Name a colour."}
CHAT = {
    "chosen": [USER, {"role": "assistant", "content": "Blue"}],
    "rejected": [USER, {"role": "assistant", "content": "x"}],
}
HH = "\n\nHuman: hi\n\nAssistant:"


def notes(path, *, chat=False, **settings):
    reader = RowReader(path, **settings)
    assert all(hasattr(row, "chosen") for row in reader)
    return reader.unread.notes(chat=chat)


@pytest.mark.parametrize(
    ("record", "note"),
    [
        ({**PAIR, "system": "Be kind."}, "'system' is ignored in 2 examples"),
        ({**PAIR, "images": ["x.png"]}, "'images' is ignored in 2 examples (prefopt trains on text only)"),
        ({**PAIR, "tools": [{"name": "look"}]}, "'tools' is ignored in 2 examples of text"),
        ({**PAIR, "chat_template_kwargs": {"a": 1}}, "'chat_template_kwargs' is ignored in 2 examples of text"),
        ({**PAIR, "instruction": "Add."}, "'instruction' is ignored in 2 examples"),
        (
            {**CHAT, "functions": [{"name": "look"}]},
            "'functions' is ignored in 2 examples (chat templates read 'tools')",
        ),
        ({**CHAT, "template_args": {"a": 1}}, "'template_args' is ignored in 2 examples"),
        (
            {**CHAT, "chosen": [USER, {"role": "assistant", "content": "Blue", "weight": 0}]},
            "'weight' of a turn is ignored in 2 examples (the loss reads every assistant turn of a completion)",
        ),
        ({**CHAT, "chosen": [USER, {"role": "assistant", "content": "Blue", "weight": 1}]}, None),
        (
            {**PAIR, "chosen": "Q: a", "rejected": "Q: b"},
            "2 examples whose completions repeat the prompt at the beginning",
        ),
        (
            {**PAIR, "prompt": '[{"role": "user", "content": "q"}]'},
            "2 examples with text that looks like a list of",
        ),
        ({**PAIR, "prompt": "a\r\nb"}, "2 examples with CRLF line ends, which become tokens"),
        ({**CHAT, "prompt": "SUMMARISE"}, "'prompt' is ignored in 2 examples, whose conversation has another question"),
        ({**CHAT, "prompt": "Name  a colour."}, None),
        (
            {
                "prompt": [USER, {"role": "assistant", "content": "It is"}],
                "chosen": [{"role": "assistant", "content": "It is blue"}],
                "rejected": [{"role": "assistant", "content": "It is 5"}],
            },
            "2 examples whose completions repeat the beginning of the answer that the prompt ends with",
        ),
        ({**CHAT, "tools": [{"name": "look"}], "system": None, "images": []}, None),
        ({**PAIR, "label": False, "score": 1.0, "id": "x"}, None),
        ({**PAIR, "prompt": HH}, None),
    ],
)
def test_report_when_a_column_or_a_prompt_is_not_read_then_one_line_says_so(write, record, note):
    found = notes(write(record, record))
    assert len(found) == (note is not None)
    assert not found or found[0].startswith(note)


def test_report_when_a_completion_is_labelled_false_then_one_line_says_so(write):
    rows = [{"prompt": "Q:", "completion": " a", "label": label} for label in (True, False)]
    (found,) = notes(write(*rows), need_rejected=False)
    assert found.startswith("'label' is ignored: 1 example with a false label")


def test_report_when_prompt_messages_are_repeated_then_they_are_read_once(write):
    reader = RowReader(write({**CHAT, "prompt": [USER]}))
    (row,) = reader
    assert (row.prompt, row.chosen) == ([USER], CHAT["chosen"][1:])
    assert dict(reader.formats) == {"messages, prompt repeated in the completions": 1}


def test_report_when_dialogues_are_text_and_there_is_a_template_then_it_warns(write, tokenizer, bare_tokenizer):
    path = write({**PAIR, "prompt": HH}, {"chosen": HH + " a", "rejected": HH + " b"})
    settings = {"max_length": 40, "cache_dir": "cache"}
    assert [note for note in encode_file(path, bare_tokenizer, **settings).report.notes if "dialogues" in note] == []
    for _ in range(2):
        (note,) = encode_file(path, tokenizer, **settings).report.notes
        assert note.startswith("warning: 2 examples with dialogues of '\\n\\nHuman:' and '\\n\\nAssistant:' are")
    turned = encode_file(path, tokenizer, dialogues="messages", **settings)
    assert turned.report.notes == ()
    text = tokenizer.decode(turned.pairs[0].prompt_ids)
    assert text == "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
