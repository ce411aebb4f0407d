"""`prefopt data`: the report and some rows, in the terminal or on a page; mistakes are one line."""

import contextlib
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from prefopt import registry
from prefopt.errors import ConfigError
from prefopt.settings.data import data_help, parse_data

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def data(server, tmp_path):
    """Runs the command in an empty folder."""

    def data(*argv):
        return server.train([*map(str, argv)], command="data", cwd=tmp_path)

    return data


def test_data_prints_what_training_prints_and_some_rows(data, server, command, task, tmp_path):
    ended = data(task.pairs, "--model.path", task.model, "--examples", 2)
    assert ended.status == 0, ended.err
    report, _, rows = ended.out.partition("\n\n")
    dry = server.train(command("dpo", tmp_path / "run", dry_run="true"))
    assert report in dry.out
    assert rows.count(f"{task.pairs}:1: prompt ") == rows.count(f"{task.pairs}:26: prompt ") == 1
    assert "⟦ red 0‹</s>›⟧" in rows
    assert "‹<s>›Human: name colour 0." in rows
    assert "\x1b" not in ended.out


def test_data_when_several_sources_are_named_then_reports_each(data, task, tmp_path):
    lines = task.pairs.read_text().splitlines(keepends=True)
    for name, part in (("a.jsonl", lines[:20]), ("b.jsonl", [*lines[20:], "{\n"])):
        (tmp_path / name).write_text("".join(part))
    ended = data("a.jsonl,b.jsonl", "--tokenizer", task.model, "--examples", 0)
    assert ended.status == 0, ended.err
    assert "data a.jsonl: 20 examples read, 20 kept, 0 dropped\n" in ended.out
    assert "data b.jsonl: 31 examples read, 30 kept, 1 dropped\n" in ended.out
    assert "⟦" not in ended.out


def test_data_when_a_page_is_asked_for_then_it_is_written_whole(data, task, tmp_path):
    ended = data(task.pairs, "--model.path", task.model, "--html", "page.html")
    assert ended.status == 0, ended.err
    assert ended.out.endswith("written: page.html\n")
    text = (tmp_path / "page.html").read_text()
    assert text.startswith("<!doctype html>")
    assert text.endswith("</html>\n")
    assert text.count("<article>") == 3
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.parametrize("method", registry.names())
def test_data_when_a_method_is_named_then_rows_are_what_it_reads(method, data, task):
    ended = data(task.pairs, "--model.path", task.model, "--method", method, "--examples", 1)
    assert ended.status == 0, ended.err
    needs = registry.get(method)().needs
    assert ("\n rejected " in ended.out) == (needs.rows == "pairs")
    assert all(f"\n {column.name} = " in ended.out for column in needs.columns)


@pytest.mark.parametrize("no_color", ["", "1"])
def test_data_when_in_a_terminal_then_has_colours_unless_none_are_wanted(no_color, server, task, tmp_path):
    ours, theirs = pty.openpty()
    out = b""

    def read():
        nonlocal out
        with contextlib.suppress(OSError):  # the other end is closed
            while block := os.read(ours, 4096):
                out += block

    reader = threading.Thread(target=read)
    reader.start()
    (tmp_path / "terminal.py").write_text(
        "import os, runpy, sys\n"
        f"os.dup2(os.open({os.ttyname(theirs)!r}, os.O_WRONLY | os.O_NOCTTY), 1)\n"
        f"os.environ.update(NO_COLOR={no_color!r}, TERM='xterm')\n"
        "sys.argv[0] = 'prefopt'\n"
        "runpy.run_module('prefopt', run_name='__main__', alter_sys=True)\n"
    )
    argv = ["data", task.pairs, "--tokenizer", task.model, "--examples", "1"]
    ended = server.python([str(tmp_path / "terminal.py"), *map(str, argv)], tmp_path)
    os.close(theirs)
    reader.join()
    os.close(ours)
    assert ended.status == 0, ended.err
    assert (b"\x1b[1;32m" in out) == (not no_color)
    assert ("⟦".encode() in out) == bool(no_color)


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (
            ["--model.path", "{m}"],
            "no data given, expected a file, folder or Hub id: prefopt data pairs.jsonl --model.path DIR",
        ),
        (["{d}"], "the tokenizer is not given; expected either --model.path DIR or --tokenizer DIR"),
        (
            ["{d}", "--model.path", "{m}", "--tokenizer", "{m}"],
            "the tokenizer is given by both --tokenizer and --model.path; expected either --model.path DIR or "
            "--tokenizer DIR",
        ),
        (["{d}", "--tokeniser", "{m}"], "--tokeniser: unknown setting; did you mean 'tokenizer'?"),
        (["{d}", "--model.path", "{m}", "--examples", "-1"], "--examples: found -1, expected a number >= 0"),
        (["{d}", "--model.path", "{m}", "--html", "page.txt"],
         "--html: found 'page.txt', expected a file name such as page.html"),
        (["{d}", "--model.path", "{m}", "--html", "no/page.html"],
         "--html: the folder of 'no/page.html' does not exist"),
        (["{d}", "--model.path", "{m}", "--data.max_length", "1"],
         "--data.max_length: found 1, expected a number >= 2"),
        (["{d}", "--model.path", "{m}", "--data.weights", "1"], "--data.weights: unknown setting"),
        (["{d}", "--model.path", "{m}", "--method", "dpoo"], "unknown method 'dpoo'; did you mean 'dpo'?"),
        (["pairs.json", "--model.path", "{m}"], "pairs.json: no such file or folder"),
        (["{d},", "--model.path", "{m}"], "found '{d},', expected names of sources separated by commas"),
        (["{d}", "--tokenizer", "./nothing"], "tokenizer: './nothing' does not exist, expected the folder of a model"),
        (["{d}", "--tokenizer", "{empty}"], "tokenizer: '{empty}' is a folder without a tokenizer"),
    ],
)  # fmt: skip
def test_data_when_asked_wrongly_then_one_line_says_so(argv, found, data, task, tmp_path):
    (tmp_path / "empty").mkdir()
    names = {"d": task.pairs, "m": task.model, "empty": tmp_path / "empty"}
    ended = data(*(word.format(**names) for word in argv))
    assert ended.status == 2, ended.out
    assert ended.err.startswith(f"error: {found.format(**names)}")
    assert ended.err.count("\n") == 1


def test_data_when_a_row_is_bad_and_that_is_an_error_then_it_is_named(data, task, tmp_path):
    (tmp_path / "bad.jsonl").write_text(task.pairs.read_text() + "{\n")
    ended = data("bad.jsonl", "--model.path", task.model, "--data.on_bad_row", "error")
    assert ended.status == 2
    assert ended.err.startswith("error: bad.jsonl:51: broken JSON")


def test_help_names_every_setting():
    text = data_help()
    for flag in (
        "--tokenizer",
        "--examples",
        "--html",
        "--method",
        "--data.max_length",
        "--data.columns.KEY",
        "--model.path",
    ):
        assert f"  {flag} " in text
    assert "--model.dtype" not in text
    assert max(map(len, text.splitlines())) <= 170


def test_help_and_mistakes_cost_no_heavy_import():
    code = (
        "import sys; from prefopt.__main__ import main; a = main(['data', '--help']); b = main(['data', 'x.jsonl']); "
        "print(a, b, {'torch', 'transformers', 'datasets', 'pyarrow'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("0 2 set()\n"), done.stdout + done.stderr


def test_settings_when_named_then_are_read():
    found = parse_data(["a,b", "c.jsonl", "--tokenizer", "t", "--data.columns.chosen", "best", "--examples", "5"])
    assert found.sources == ("a", "b", "c.jsonl")
    assert (found.data.columns, found.examples) == ({"chosen": "best"}, 5)
    with pytest.raises(ConfigError, match=r"^found 'c.jsonl', expected a flag"):
        parse_data(["a", "--examples", "5", "c.jsonl"])


def test_split_of_a_run_when_its_card_is_of_the_first_version_then_is_kept(tmp_path):
    """A new run takes the newest one."""
    from prefopt.data import split
    from prefopt.run.card import CARD, split_version
    from prefopt.storage import write_sealed

    assert split_version(tmp_path) == split.VERSION
    (tmp_path / "metrics.jsonl").touch()
    card = {"config": {}, "model": {}, "reference": None}
    for version in (1, 2):
        write_sealed(tmp_path / CARD, card | {"data": {"eval": f"abc-0.05{split.mark(version)}"}})
        assert split_version(tmp_path) == version


def test_settings_of_rows_are_those_of_training_under_the_same_defaults():
    """What one command accepts, the other does; only bad rows are counted here and an error there."""
    from dataclasses import asdict

    from prefopt.settings import DataConfig
    from prefopt.settings.data import PreviewDataConfig

    ours, theirs = asdict(PreviewDataConfig()), asdict(DataConfig())
    assert {key for key, value in ours.items() if theirs[key] != value} == {"on_bad_row"}
    assert {*theirs} - {*ours} <= {"train", "eval", "weights", "weight_column", "eval_fraction"}
