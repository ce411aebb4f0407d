"""How commands end: one line and a status, whatever happens in them."""

import errno
import os
import re
from pathlib import Path

import pytest

from prefopt import cli, exits
from prefopt.__main__ import COMMANDS, main
from prefopt.errors import ConfigError

PARSERS = {
    "train": "prefopt.settings.parse",
    "rounds": "prefopt.settings.parse",
    "infer": "prefopt.settings.infer.parse_infer",
    "data": "prefopt.settings.data.parse_data",
    "plan": "prefopt.settings.plan.parse_plan",
    "methods": "prefopt.run.methods_command.methods_table",
    "sweep": "prefopt.sweeps.command.sweep",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("prefopt.training.launcher.RANK_0_GRACE", 0)
    return tmp_path / "cache"


def raises(error):
    def run(*_):
        raise error

    return run


def report_of(line):
    (path,) = re.findall(r"a report is in (\S+)\)", line)
    return Path(path).read_text()


@pytest.mark.parametrize("rank", ["0", "3"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_when_something_unforeseen_happens_then_one_line_names_the_report(monkeypatch, capsys, name, rank):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("SOME_API_KEY", "sk-of-mine-1")
    monkeypatch.setattr(PARSERS[name], raises(KeyError("no\nsuch sk-of-mine-1\x1b")))
    assert main([name, "--output", "x", "--generate.args.token=abc", "--hf_token", "def"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    place = "rank 3: " if rank == "3" else ""
    assert err.startswith(f"error: {place}{name} failed: KeyError: 'no\\nsuch ***\\x1b' (unexpected; a report is in")
    assert err.count("\n") == 1
    report = report_of(err)
    assert "Traceback (most recent call last)" in report
    assert f"command: prefopt {name} --output x '--generate.args.token=***' --hf_token '***'" in report
    assert f"rank {rank} of 1" in report
    assert re.search(r"versions: python 3\.\d+.*torch \d", report)
    assert not re.search("sk-of|abc|def\n|\x1b", report)


def test_the_report_lies_in_the_output_folder_with_the_settings(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("prefopt.training.signals.Stop.install", raises(RuntimeError("odd")))
    (tmp_path / "run").mkdir()
    assert cli.train(["--method", "dpo", "--output", str(tmp_path / "run"), "--optim.args.token", "se-cret"]) == 1
    report = report_of(capsys.readouterr().err)
    assert [*(tmp_path / "run").glob("crash-*-rank0-*.txt")]
    assert "token: '***'" in report
    assert "  lr: 0.002" in report
    assert "se-cret" not in report


def test_the_traceback_is_printed_where_debugging_is_asked_for(monkeypatch, capsys):
    monkeypatch.setenv(exits.DEBUG, "1")
    assert exits.exit_status("train", [], raises(RuntimeError("odd"))) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    assert exits.exit_status("train", [], raises(ConfigError("odd"))) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize("leaves", [KeyboardInterrupt, SystemExit(75), SystemExit(0)])
def test_what_asks_to_leave_is_no_failure(leaves):
    with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
        exits.exit_status("train", [], raises(leaves))
    assert getattr(caught.value, "code", 75) in (0, 75)


@pytest.mark.parametrize(
    "number", ["EACCES", "EPERM", "EROFS", "ENAMETOOLONG", "ENOTDIR", "EISDIR", "ELOOP", "ENOSPC", "EIO", "ESTALE"]
)
def test_a_file_that_cannot_be_used_is_a_users_line(capsys, number):
    code = getattr(errno, number)
    assert exits.exit_status("train", [], raises(OSError(code, os.strerror(code), "a\nb.txt"))) == 2
    _, err = capsys.readouterr()
    assert err.startswith(f"error: a\\nb.txt: {os.strerror(code)}; ")
    assert err.count("\n") == 1


def test_no_report_can_be_written_then_the_line_says_how_to_see_it(monkeypatch, capsys):
    monkeypatch.setenv("PREFOPT_CACHE", "/proc/none")
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/proc/none")
    assert exits.exit_status("plan", [], raises(ValueError())) == 1
    assert capsys.readouterr().err == (
        "error: plan failed: ValueError (unexpected; no report could be written; PREFOPT_DEBUG=1 shows the traceback)\n"
    )


def test_an_unknown_command_is_shown_without_what_steers(capsys):
    assert main(["tra\x1b[2Jin"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown command 'tra\\x1b[2Jin'")
