import datetime
import signal
import threading

import pytest

from prefopt.data import templates
from prefopt.data.encode import encode_file
from prefopt.data.encoder import Encoder, pad_token
from prefopt.data.templates import Rendering, check_template, read_template, reads_clock
from prefopt.errors import DataError, TrainError
from prefopt.settings import DataConfig
from prefopt.types import PairRow
from tests.data.conftest import PAIR
from tests.helpers import CHATML, byte_bpe_tokenizer, family_tokenizer

USER = {"role": "user", "content": "Name a fruit"}
ONE, TWO = ({"role": "assistant", "content": c} for c in ("An apple", "Blue pears"))
DATED = "{{ strftime_now('%d %b %Y, %-d %H:%M:%S, %%d') }}\n" + CHATML
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DAY = datetime.date(2026, 7, 4)


def chat(template=CHATML):
    return byte_bpe_tokenizer(["hello"], 300, chat_template=template)


def text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def row(prompt, chosen, rejected=None, **more):
    return PairRow(prompt, chosen, rejected, {}, "f:1", **more)


# The date


def test_a_template_that_reads_the_clock_is_told_one_day_and_no_hour():
    tokenizer = chat(DATED)
    assert reads_clock(tokenizer)
    assert not reads_clock(chat("{# strftime_now #}" + CHATML))
    said = Rendering(date=DAY).render(tokenizer, [USER])
    assert said.startswith("04 Jul 2026, 4 00:00:00, %d\n<|im_start|>user")
    plain = chat("\n  {% if true %}x{% endif %}\n{{ strftime_now('%Y') }}|" + CHATML)
    today = plain.apply_chat_template([USER], tokenize=False)
    assert Rendering().render(plain, [USER]) == today  # the clock in front of a template moves no white space


def test_the_day_is_the_settings_or_the_runs_and_stands_in_the_key_of_the_cache_and_is_said_once(write, tmp_path):
    tokenizer = chat(DATED)
    by_run = Rendering.of(DataConfig(), tokenizer, DAY)
    assert by_run.date == DAY
    assert Rendering.of(DataConfig(template_date="2020-02-02"), tokenizer, DAY).date == datetime.date(2020, 2, 2)
    assert Rendering.of(DataConfig(), chat(), DAY).date is None
    assert by_run.lines(tokenizer) == ["the chat template reads today's date, which is 2026-07-04 throughout this run"]
    path = write({"prompt": [USER], "chosen": [ONE], "rejected": [TWO]})
    asked = [
        encode_file(path, tokenizer, max_length=200, cache_dir="c", rendering=Rendering(date=day)).fingerprint
        for day in (DAY, DAY, DAY + datetime.timedelta(days=1))
    ]
    assert asked[0] == asked[1] != asked[2]


def test_no_other_global_of_a_template_reads_a_clock():
    from transformers.utils.chat_template_utils import _compile_jinja_template

    known = {"range", "dict", "lipsum", "cycler", "joiner", "namespace", "raise_exception", "strftime_now"}
    assert set(_compile_jinja_template(CHATML).environment.globals) == known


# Arguments


def test_arguments_of_the_run_and_of_a_row_reach_the_template_and_the_rows_win():
    thinks = "{% if enable_thinking is defined and not enable_thinking %}<no thought>{% endif %}"
    tools = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    tokenizer = chat(tools + CHATML.replace("assistant\n{%", "assistant\n" + thinks + "{%"))
    encoder = Encoder(tokenizer, 999, rendering=Rendering({"enable_thinking": False}))
    assert text(tokenizer, encoder.prompt([USER])).endswith("assistant\n<no thought>")
    assert text(tokenizer, encoder.prompt([USER], {"enable_thinking": True})).endswith("assistant\n")
    mine = row([USER], [ONE], [TWO], template_args={"enable_thinking": True, "tools": [{"name": "look"}]})
    assert text(tokenizer, encoder.pair(mine).prompt_ids).startswith('<s>{"name": "look"}\n<|im_start|>user')
    (bad,) = encoder.rows([row([USER], [ONE], template_args={"add_generation_prompt": True})])
    assert "'add_generation_prompt'" in bad.message


def test_arguments_stand_in_the_key_of_the_cache(write):
    tokenizer = chat("{{ style }}" + CHATML)
    path = write({"prompt": [USER], "chosen": [ONE], "rejected": [TWO]})
    found = {
        encode_file(path, tokenizer, max_length=99, cache_dir="c", rendering=Rendering({"style": style})).fingerprint
        for style in ("a", "b", "a")
    }
    assert len(found) == 2


def test_tool_calls_without_content_and_answers_of_tools_are_rendered():
    calls = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    called = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "look", "arguments": {"a": 1}}}],
    }
    tokenizer = chat(calls)
    pair = Encoder(tokenizer, 999).pair(row([USER], [called, {"role": "tool", "content": "red"}, ONE], [ONE]))
    said = [token for token, on in zip(pair.chosen_ids, pair.chosen_mask, strict=True) if on]
    assert text(tokenizer, said) == '{"name": "look", "arguments": {"a": 1}}<|im_end|>An apple<|im_end|>'
    assert "red" in text(tokenizer, pair.chosen_ids)


# Time


def test_a_template_without_an_end_is_one_line_in_the_main_thread_and_in_others_and_signals_are_left_alone():
    before = signal.getsignal(signal.SIGALRM)
    found = []

    def attempt():
        with pytest.raises(DataError) as error:
            Encoder(chat(LOOP), 99, rendering=Rendering(seconds=0.1))
        found.append(str(error.value))

    attempt()
    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert found[0] == found[1]
    assert found[0].startswith(
        "the chat template takes longer than 0.1 s, even for one short exchange (use another one"
    )
    assert signal.getsignal(signal.SIGALRM) == before
    slow = chat(
        CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{% if 'slow' in m.content %}" + LOOP + "{% endif %}")
    )
    rows = [row([{"role": "user", "content": "slow"}], [ONE])] * 2 + [row([USER], [ONE])]
    encoder = Encoder(slow, 99, rendering=Rendering(seconds=0.1))
    reasons = [getattr(one, "reason", None) for one in encoder.rows(rows)]
    assert reasons == [templates.TOO_SLOW, templates.TOO_SLOW, None]
    with pytest.raises(
        DataError, match=r"takes longer than 0.1 s, .*; the chat template timed out for 2 examples before$"
    ):
        list(encoder.rows(rows))


# Files


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\x89PNG\r\n\xff", "byte 1 is not UTF-8, expected the text of a Jinja template"),
        (b"a\0b", "contains NUL bytes, expected the text of a Jinja template"),
        (b" \n", "is empty, expected a Jinja template"),
        (None, "No such file or directory"),
    ],
)
def test_a_file_that_is_no_template_is_refused_in_one_line(tmp_path, content, complaint):
    path = tmp_path / "t.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TrainError) as error:
        read_template(str(path), "data.chat_template", TrainError)
    assert str(error.value) == f"data.chat_template: '{path}': {complaint}"


def test_a_template_is_read_without_its_byte_order_mark(tmp_path):
    (tmp_path / "t.jinja").write_bytes("\ufeff{{ messages }}".encode())
    assert read_template(str(tmp_path / "t.jinja"), "data.chat_template", TrainError) == "{{ messages }}"


def test_a_folder_and_a_name_with_nul_are_refused_and_so_is_what_is_not_jinja_or_draws(tmp_path):
    with pytest.raises(TrainError, match="is not a file, expected a Jinja template"):
        read_template(str(tmp_path), "data.chat_template", TrainError)
    with pytest.raises(TrainError, match="embedded null byte"):
        read_template("a\0b", "data.chat_template", TrainError)
    with pytest.raises(TrainError, match=r"^k: line 2: .*, expected a Jinja template$"):
        check_template(chat("a\n{% for %}"), "k", TrainError)
    with pytest.raises(TrainError, match="uses random values"):
        check_template(chat("{{ [1, 2] | random }}"), "k", TrainError)


# What the encoder makes of it


def test_a_prompt_that_begins_the_answer_is_gone_on_with(tmp_path):
    for name in ("llama3", "qwen", "phi3", "gemma"):
        tokenizer = family_tokenizer(name)
        encoder = Encoder(tokenizer, 999)
        begun = {"role": "assistant", "content": "An"}
        pair = encoder.pair(row([USER, begun], [{"role": "assistant", "content": " apple"}], [TWO]))
        whole = encoder.pair(row([USER], [ONE], [TWO]))
        assert pair.prompt_ids == encoder.prompt([USER, begun])
        assert text(tokenizer, pair.prompt_ids).endswith("An")
        assert text(tokenizer, pair.prompt_ids + pair.chosen_ids) == text(
            tokenizer, whole.prompt_ids + whole.chosen_ids
        )


def test_a_chat_row_whose_token_would_span_the_boundary_is_tokenised_as_at_inference():
    from tokenizers import pre_tokenizers

    merged = byte_bpe_tokenizer(["a\n\n\n\n\nb"] * 9, 300, chat_template=CHATML)
    merged.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    newlines = {"role": "assistant", "content": "\nAn apple"}
    assert len(merged("\n\n", add_special_tokens=False)["input_ids"]) == 1
    encoder = Encoder(merged, 999)
    pair = encoder.pair(row([USER], [newlines], [TWO]))
    assert pair.prompt_ids == encoder.prompt([USER])
    assert text(merged, pair.chosen_ids) == "\nAn apple<|im_end|>"
    several = encoder.pair(row([USER], [newlines, USER, newlines], [TWO]))
    said = [token for token, on in zip(several.chosen_ids, several.chosen_mask, strict=True) if on]
    assert text(merged, said) == "\nAn apple<|im_end|>" * 2


@pytest.mark.parametrize(
    ("overlong", "prompt", "chosen", "rejected"),
    [("truncate_prompt", 1, 9, 2), ("truncate_completion", 7, 3, 2), ("drop", None, None, None)],
)
def test_what_goes_of_a_longer_pair_is_what_the_setting_says(bare_tokenizer, write, overlong, prompt, chosen, rejected):
    ids = [9, 10, 11, 12, 13, 14, 15], [20] * 11, [21] * 2
    (cut,) = Encoder(bare_tokenizer, 10, overlong=overlong).rows([row("", "", "", ids=ids)])
    if overlong == "drop":
        assert cut.reason == "longer than data.max_length"
    else:
        pair = cut.pair
        assert (len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) == (prompt, chosen, rejected)
        assert pair.prompt_ids == ids[0][-prompt:]
    path = write(*[{**PAIR, "prompt": f"Question {i}:"} for i in range(5)], {**PAIR, "chosen": " 1" * 90})
    report = encode_file(path, bare_tokenizer, max_length=40, overlong=overlong, cache_dir="c").report
    notes = "".join(report.notes)
    assert report.dropped == ({"longer than data.max_length": 1} if overlong == "drop" else {})
    assert ("warning: 16.7% of the pairs are truncated" in notes) == (overlong != "drop")
    assert ("the prompt is truncated to one token" in notes) == (overlong == "truncate_prompt")


def test_what_pads_has_a_row_in_the_model(tokenizer):
    assert pad_token(tokenizer, len(tokenizer)) == (2, None)
    tokenizer = byte_bpe_tokenizer(["hello"], 300)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert pad_token(tokenizer, rows) == (
        1,
        f"the pad token '<|pad|>' ({rows}) is outside the model's vocabulary; EOS '</s>' is used for padding",
    )


def test_an_argument_that_the_template_does_not_read_is_named():
    tokenizer = chat("{{ messages[0].content if enable_thinking else '' }}{# style #}")
    rendering = Rendering({"enable_thinking": True, "enable_thinkng": False, "style": 1})
    unread = "the chat template does not read it"
    assert rendering.lines(tokenizer) == [
        f"warning: data.template_args.enable_thinkng: {unread}; did you mean 'enable_thinking'?",
        f"warning: data.template_args.style: {unread}",
    ]
    tools = {"tools": [{"name": "look"}], "enable_thinking": False}
    row = PairRow([USER], [{"role": "assistant", "content": "x"}], None, {}, "f:1", template_args=tools)
    (cut,) = Encoder(
        byte_bpe_tokenizer(["hello"], 300, chat_template="{% if enable_thinking %}{% endif %}" + CHATML), 99
    ).rows([row])
    assert cut.notes == ("the chat template does not read the example's 'tools'",)
