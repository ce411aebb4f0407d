"""YAML files that cannot be read, or that grow without bound, are refused in one short line."""

import os
from pathlib import Path

import pytest

from prefopt.errors import ConfigError
from prefopt.settings import parse
from tests.settings.helpers import REAL, message


def test_yaml_when_missing_then_the_nearest_file_is_offered(write):
    write("seed: 1", "tdpo.yaml")
    found = message(*REAL, "--config", "tdpoo.yaml")
    assert found == "--config tdpoo.yaml: No such file or directory; did you mean 'tdpo.yaml'?"
    assert message(*REAL, "--config", ".") == "--config .: Is a directory"


def test_yaml_when_not_text_then_says_so(write):
    Path("x.yaml").write_bytes(b"seed: \xff")
    assert message(*REAL, "--config", "x.yaml") == "--config x.yaml: not a text file (byte 7 is not UTF-8)"


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)


MERGED = "m0: &m0 {x0: 1, y0: 1}\n" + "".join(
    f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}], x{n}: 1}}\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, r"more than 200,000 values after expanding aliases"),
        (MERGED, r"more than 200,000 values after expanding aliases"),
        ("a: &a [*a]", r"alias '\*a' refers to a value that contains it"),
        ("a: &a {b: *a}", r"alias '\*a' refers to a value that contains it"),
        ("a: &a\n  <<: *a", r"alias '\*a' refers to a value that contains it"),
        ("a: *b", r"found undefined alias|undefined alias"),
        ("a: " + "[" * 5000, r"nested more than 100 levels deep"),
        ("a: " + "{b: " * 5000, r"nested more than 100 levels deep"),
        ("- " * 5000 + "x", r"nested more than 100 levels deep"),
        ("seed: 1\nseed: 2", r"key 'seed' given twice"),
        ("1: 2", r"found 1, expected text as a key \(put it in quotes\)"),
        ("true: 2", r"found True, expected text as a key"),
        ("? [a]\n: 2", r"found \['a'\], expected text as a key"),
        ("seed: !!python/object:os.system {}", r"could not determine a constructor for the tag"),
        ("seed: !!int x", r"cannot be read as int \(ValueError\)"),
        ("output: 2020-99-99", r"cannot be read as timestamp \(ValueError\)"),
        ("output: !!bool maybe", r"cannot be read as bool \(KeyError\)"),
        ("seed: " + "9" * 5000, r"cannot be read as int \(ValueError\)"),
        ("seed: 0x" + "f" * 5000, r"cannot be read as int \(ValueError\)"),
        ("seed: " + "9" * 400, r"found 9+, expected an integer$"),
        ("data: {max_length: 99999999999999999999}", r"found 9+, expected an integer below 2\^63$"),
        ("optim: {lr: " + "9" * 400 + "}", r"found 9+, expected a number that fits in a float$"),
        ('output: "a\\0b"', r"found 'a\\x00b', expected text without a NUL character$"),
        ('output: "a\\udce9"', r"expected text that can be written as UTF-8$"),
        ("seed: \0", r"special characters are not allowed|unacceptable character"),
        ("\t- x", r"not readable as YAML"),
        ("x" * 4_000_001, r"found 4,000,001 characters, expected at most 4,000,000"),
    ],
    ids=lambda value: value[:24],
)
def test_yaml_when_it_cannot_be_meant_then_one_short_line_says_why(tmp_path, text, words):
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        parse(["--method", "dpo", "--config", str(tmp_path / "odd.yaml")])
    assert str(caught.value).startswith(str(tmp_path / "odd.yaml"))
    assert len(str(caught.value)) < 700


def test_yaml_when_it_has_aliases_and_merges_then_they_are_read(tmp_path):
    (tmp_path / "good.yaml").write_text(
        "generate:\n  args:\n    a: &a {x: 1, y: 1}\n    b: &b {<<: *a, y: 2}\n    deep: {c: &c {<<: [*b, *a], z: 3}}\n"
        "    e: {<<: *c, z: 4}\n    f: *c\n"
    )
    args = parse(["--method", "sppo", "--rounds.count", "1", "--config", str(tmp_path / "good.yaml")]).generate.args
    c = {"x": 1, "y": 2, "z": 3}
    assert args == {"a": {"x": 1, "y": 1}, "b": {"x": 1, "y": 2}, "deep": {"c": c}, "e": c | {"z": 4}, "f": c}


@pytest.mark.parametrize(
    ("kind", "words"), [("pipe", "is a named pipe"), ("device", "is a device"), ("nul", "holds a NUL character")]
)
def test_config_when_it_is_no_regular_file_then_it_is_not_waited_for(tmp_path, kind, words):
    path = {"pipe": str(tmp_path / "pipe"), "device": "/dev/zero", "nul": "a\0b"}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(ConfigError, match=rf"^--config .*{words}"):
        parse(["--method", "dpo", "--config", path])
