import pytest

from prefopt.data.chat import render
from prefopt.data.rows import RowProblem
from prefopt.errors import DataError
from tests.helpers import CHATML, byte_bpe_tokenizer

SYSTEM, USER, OTHER = ({"role": r, "content": c} for r, c in (("system", "s"), ("user", "q"), ("user", "r")))
FIRST, SECOND = ({"role": "assistant", "content": c} for c in ("one", "two"))


def chat(template):
    return byte_bpe_tokenizer(["abc"], vocab_size=300, chat_template=template)


def test_render_when_text_then_it_is_left_alone(tokenizer):
    side = render("a:", " b", tokenizer)
    assert (side.text, side.prompt, side.spans, side.terminated) == ("a: b", "a:", ((2, 4),), False)


def test_render_when_messages_then_the_line_break_after_the_terminator_is_left_out():
    side = render([SYSTEM, USER], [FIRST], chat(CHATML))
    assert side.prompt == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert side.text == side.prompt + "one<|im_end|>"
    assert side.terminated


def test_render_when_several_turns_then_only_the_assistants_are_scored():
    side = render([USER], [FIRST, OTHER, SECOND], chat(CHATML))
    assert [side.text[begin:end] for begin, end in side.spans] == ["one<|im_end|>", "two<|im_end|>"]
    assert side.text.endswith("two<|im_end|>")


def test_render_when_the_template_writes_no_terminator_then_it_is_not_claimed():
    plain = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    side = render([USER], [FIRST], chat(plain + "{% if add_generation_prompt %}assistant: {% endif %}"))
    assert (side.text, side.terminated) == ("user: q\nassistant: one\n", False)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (
            "{{ messages | length }}" + CHATML,
            "f:1: 'chosen': the chat template renders the prompt of turn 2 differently when more turns follow, "
            "expected a template that renders a prompt as a prefix of the conversation (use another one: "
            "--data.chat_template FILE)",
        ),
        (
            CHATML.replace("assistant\n{%", "assistant\n<think>{%"),
            "f:1: 'chosen': the chat template renders the prompt of turn 2 differently when more turns follow, "
            "expected a template that renders a prompt as a prefix of the conversation (use another one: "
            "--data.chat_template FILE)",
        ),
        (
            "{{ raise_exception('no system turn') }}",
            "f:1: 'chosen': the chat template raised: no system turn, expected an example that it accepts "
            "(drop the example, or --data.on_bad_row skip)",
        ),
        (
            "x",
            "f:1: 'chosen': the chat template renders nothing, expected a non-empty completion "
            "(drop the example, or --data.on_bad_row skip)",
        ),
    ],
)
def test_render_when_the_template_does_not_fit_then_the_row_is_bad(template, complaint):
    with pytest.raises(RowProblem) as problem:
        render([USER], [FIRST], chat(template))
    assert problem.value.at("f:1").message == complaint


def test_render_when_the_template_rewrites_an_earlier_turn_then_the_row_is_bad():
    # Some templates drop the thought of every turn but the last.
    last = "{% for m in messages %}[{{ m['content'] if loop.last else m['content'][:1] }}]{% endfor %}"
    with pytest.raises(RowProblem, match="template rewrites the prompt"):
        render([USER], [FIRST, OTHER, SECOND], chat(last))


def test_render_when_there_is_no_template_then_one_line_names_the_setting(bare_tokenizer):
    with pytest.raises(DataError) as error:
        render([USER], [FIRST], bare_tokenizer)
    assert str(error.value) == (
        "the data has chat messages and the tokenizer has no chat template, expected one (--data.chat_template FILE)"
    )
