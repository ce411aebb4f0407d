import base64
import io
import json
import re
import sys
import urllib.parse

import pytest

from prefopt import settings as config
from prefopt.errors import PrefoptError
from prefopt.redaction import escaped, guarded_output, hidden, markdown_cell, printable


@pytest.fixture(autouse=True)
def nothing_learnt(monkeypatch):
    monkeypatch.setattr("prefopt.redaction._named", set())
    monkeypatch.setattr("prefopt.redaction._learned", set())


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("http://anna:pass@host:8000/v1", "http://***@host:8000/v1"),
        ("https://token@host/v1?model=a", "https://***@host/v1?model=a"),
        ("https://host/v1?api_key=abc&model=a", "https://host/v1?api_key=***&model=a"),
        ("https://host/v1?model=a&access_token=abc#x", "https://host/v1?model=a&access_token=***#x"),
        ("https://host/a@b", "https://host/a@b"),
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ({"hf_token": "abc", "max_tokens": 5, "n": 1}, {"hf_token": "***", "max_tokens": 5, "n": 1}),
        ({"generate": {"api_key_env": "MY_KEY"}}, {"generate": {"api_key_env": "MY_KEY"}}),
        ({"kernel": {"token_tile": None}, "tokenizer": "x"}, {"kernel": {"token_tile": None}, "tokenizer": "x"}),
        ({"password": None, "args": ["--key", "http://a:b@c"]}, {"password": None, "args": ["--key", "http://***@c"]}),
    ],
)
def test_secrets_are_hidden_and_nothing_else(value, shown):
    assert hidden(value) == shown


def test_values_of_variables_with_keys_are_hidden_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "sk-1234567890")
    monkeypatch.setenv("OTHER", "plain-1234567890")
    monkeypatch.setenv("USE_TOKEN", "true")
    found = hidden({"a": ["x sk-1234567890 y"], "b": "plain-1234567890 true"})
    assert found == {"a": ["x *** y"], "b": "plain-1234567890 true"}
    assert hidden("plain-1234567890", ["OTHER"]) == "***"


# A key wherever it stands ---------------------------------------------------------------------------------------------

KEY = "s3cr3t/key+with=signs&more"


@pytest.mark.parametrize(
    "form",
    [
        str,
        lambda key: urllib.parse.quote(key, safe=""),
        lambda key: urllib.parse.quote(key, safe="").replace("%2B", "%2b").replace("%2F", "%2f").replace("%3D", "%3d"),
        urllib.parse.quote_plus,
        lambda key: json.dumps({"error": {"message": f'bad "{key}"'}}),
        lambda key: base64.b64encode(key.encode()).decode(),
        lambda key: "Basic " + base64.b64encode(f"u:{key}".encode()).decode(),
        lambda key: base64.urlsafe_b64encode(f"user:{key}\n".encode()).decode(),
        lambda key: f"['--key={key}']",
    ],
)
def test_a_key_is_hidden_in_each_form_that_a_server_may_echo_it_in(monkeypatch, form):
    monkeypatch.setenv("MY_API_KEY", KEY)
    shown = printable(f"401: wrong key {form(KEY)}, said the server")
    assert "***" in shown
    for part in (KEY, "s3cr3t", "czNjcjN0", "MzY3IzdC", "zY3IzdC"):
        assert part not in shown
    assert shown.startswith("401: wrong key ")
    assert shown.endswith(", said the server")


@pytest.mark.parametrize(
    ("name", "value", "is_hidden"),
    [
        ("OPENAI_API_KEY", "abcdefgh", True),
        ("OPENAI_API_KEY_2", "abcdefgh", True),
        ("HF_TOKEN", "short-1", True),
        ("WANDB_API_KEY", "EMPTY", False),
        ("AWS_SECRET_ACCESS_KEY", "abcdefgh", True),
        ("DB_PASSWORD", "hunter2", True),
        ("DATABASE_URL", "postgres://me:abcdefgh@host/db", True),
        ("TOKENIZERS_PARALLELISM", "abcdefgh", False),
        ("HF_TOKEN_PATH", "/home/me/token", False),
        ("MONKEY", "abcdefgh", False),
    ],
)
def test_which_variables_hold_secrets(monkeypatch, name, value, is_hidden):
    monkeypatch.setenv(name, value)
    secret = value.rpartition("@")[0].rpartition(":")[2] or value
    assert (printable(f"so: {secret}.") == "so: ***.") == is_hidden


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer abc.def-123456",
        "{'authorization': 'Basic dXNlcjpwYXNz'}",
        '{"x-api-key": "abc123"}',
        "x hf_abcdefghijklmnopqrstuvwxyz12 y",
        "sk-proj-abcdefghijklmnop123456",
        "got bearer abcdefghij1234567890",
        "https://host/v1?sig=abc123",
    ],
)
def test_what_has_the_form_of_a_secret_is_hidden_though_nobody_named_it(text):
    shown = printable(text)
    assert "***" in shown
    assert not re.search("abc|dXNl|cde", shown)


def test_a_variable_that_settings_name_and_a_setting_with_a_name_of_a_key_are_secrets_from_then_on(monkeypatch):
    monkeypatch.setenv("LAB_WORD", "open-sesame-1")
    assert "open-sesame-1" in printable("open-sesame-1")
    argv = ["--method", "sppo", "--rounds.count", "1", "--generate.args.hf_token", "token-in-settings"]
    config.parse([*argv, "--judge.api_key_env", "LAB_WORD"])
    assert printable("open-sesame-1, token-in-settings") == "***, ***"


# Characters that steer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb\x07", r"a\x1b[2Jb\x07"),
        ("a\nb\r\nc\td", r"a\nb\r\nc\td"),
        ("\x9b31m\x85\x7f", r"\x9b31m\x85\x7f"),
        ("\u202eevil\u202c \u2066x\u2069", r"\u202eevil\u202c \u2066x\u2069"),
        ("a\u200bb\ufeff\u00adc", r"a\u200bb\ufeff\xadc"),
        ("x\u2028y\u2029z", r"x\u2028y\u2029z"),
        ("\ud800 \udcff", r"\ud800 \udcff"),
        ("\U000e0041\U0001f600", "\\U000e0041\U0001f600"),
        ("Ünï漢字 ع é 👍🏽❤️", "Ünï漢字 ع é 👍🏽❤️"),
    ],
)
def test_characters_that_are_not_seen_are_escapes_and_all_others_stay(text, shown):
    assert escaped(text) == shown
    assert str(PrefoptError(text)) == shown
    assert "\n" not in markdown_cell(text)
    shown.encode("utf-8")


def test_a_text_of_several_lines_keeps_them_and_one_for_reading_keeps_joiners():
    assert printable("a\n\tb\x1b", lines=True) == "a\n\tb\\x1b"
    assert printable("می\u200cشود \u200b", joiners=True) == "می\u200cشود \\u200b"


def test_a_cell_of_markdown_stays_one_whatever_it_holds():
    assert markdown_cell("a|b\n<script>`x`") == r"a\|b\\n\<script\>\`x\`"


def test_a_very_long_value_does_not_make_a_very_long_line(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", KEY)
    text = str(PrefoptError("x: found '" + "9" * 1985 + KEY + "9" * 10**6 + "', expected a number"))
    assert len(text) < 5000
    assert text.endswith("', expected a number")
    assert "s3cr" not in text


# Streams --------------------------------------------------------------------------------------------------------------


def test_guarded_output_hides_what_any_library_prints_and_dies_of_no_character(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", KEY)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    stream = sys.stdout
    with guarded_output(), guarded_output():
        print(f"debug: {KEY} \ud800 é")
        sys.stdout.writelines([KEY])
        sys.stdout.flush()
        assert sys.stdout.encoding == "ascii"
    assert sys.stdout is stream
    assert raw.getvalue() == b"debug: *** \\ud800 \\xe9\n***"
