"""Help pages: every setting is on them, lines wrap, one group can be printed alone, and reading them is cheap."""

import subprocess
import sys

import pytest

from prefopt import registry, settings
from prefopt.__main__ import main
from prefopt.errors import ConfigError
from prefopt.settings import help_text, parse
from prefopt.settings.data import data_help
from prefopt.settings.infer import infer_help
from prefopt.settings.nested import flatten
from prefopt.settings.plan import plan_help


@pytest.mark.parametrize("method", registry.names())
def test_help_names_every_setting_and_is_short(method, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    short = help_text(["--method", method, "--help"])
    assert len(short.splitlines()) < 140
    assert "rounds: Iterative training in rounds of generate, judge, pair, train." in short
    assert "--judge.kind" not in short
    assert "--judge.kind" in help_text(["--method", method, "--rounds.count", "1", "--help"])
    for group in settings.FOLDED:
        assert f"(--help {group} lists its settings)" in short
        asked = help_text(["--help", group, "--method", method])
        assert f"  --{group}." in asked
        assert f"  --{group}." not in short
    text = help_text(["--method", method, "--help", "all"])
    words = {line.split()[0] for line in text.splitlines() if line.startswith("  --")}
    flags = {word.removesuffix(".KEY") for word in words}  # a mapping takes any key of one's own
    known = set(flatten(parse(["--method", method]).to_dict())) - {"method.name"}
    assert {f"--{key}" for key in known} | {"--method", "--config"} >= flags
    assert {f"--{key}" for key in known} <= flags


def test_help_on_what_is_no_group_names_the_nearest_one():
    with pytest.raises(
        ConfigError, match=r"^--help: found 'lorra', expected run, method, model, .* or all; did you mean 'lora'\?"
    ):
        help_text(["--help", "lorra"])


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--method", "tdpo", "--help"],
        ["--help", "all"],
        ["--method", "dpoo"],
        ["--method", "dpo", "--method.alpha", "1"],
        ["--method", "dpo", "--model.path", "/no/such", "--data.train", "x.jsonl"],
    ],
)
def test_help_and_config_errors_import_nothing_heavy(argv):
    heavy = "('torch', 'transformers', 'accelerate', 'datasets', 'numpy', 'matplotlib')"
    code = (
        "import sys\nfrom prefopt.cli import train\nstatus = train(sys.argv[1:])\n"
        f"loaded = [name for name in {heavy} if name in sys.modules]\n"
        "print('loaded', loaded, 'status', status)"
    )
    ran = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == f"loaded [] status {0 if '--help' in argv else 2}"
    assert len(ran.stderr.splitlines()) == (0 if "--help" in argv else 1)


def test_help_when_only_a_config_names_the_method_then_lists_its_settings(tmp_path):
    (tmp_path / "c.yaml").write_text("method: tdpo\n")
    assert "--method.alpha" in help_text(["--config", str(tmp_path / "c.yaml"), "--help"])


@pytest.mark.parametrize("width", [60, 200])
@pytest.mark.parametrize(
    "page",
    [
        lambda: help_text(["--help", "all", "--method", "thought_po"]),
        lambda: help_text(["--help", "method"]),
        infer_help,
        data_help,
        plan_help,
    ],
    ids=["train", "methods", "infer", "data", "plan"],
)
def test_help_wraps_to_the_width_of_the_terminal_with_an_aligned_text(page, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = page().splitlines()
    assert max(map(len, lines)) <= width
    assert max(map(len, lines)) > 0.8 * width
    columns = {len(line) - len(line.lstrip()) for line in lines if line.startswith("      ") and "|" not in line}
    assert len(columns - {7}) <= 1, columns  # 7: usage lines


@pytest.mark.parametrize("group", ["run", "model", "lora", "data", "train", "judge", "testbed"])
def test_help_of_a_group_prints_that_group_alone(group):
    lines = help_text(["--help", group, "--method", "dpo"]).splitlines()
    titles = [line for line in lines if line and not line.startswith(" ")]
    assert [title.partition(":")[0] for title in titles] == [group]
    flags = [line.split()[0] for line in lines if line.startswith("  --")]
    assert flags
    assert all(flag.startswith(f"--{group}.") != (group == "run") for flag in flags)


def test_help_of_method_prints_its_settings_or_without_one_the_methods():
    assert help_text(["--method", "tdpo", "--help", "method"]).startswith("method tdpo: Token-level DPO")
    listed = help_text(["--help", "method"])
    assert all(f"\n  {name}" in listed for name in registry.names())
    assert "--method." not in listed


@pytest.mark.parametrize("command", ["train", "rounds", "infer", "data", "sweep", "plan"])
def test_help_names_the_command_as_it_was_started(command, monkeypatch, capsys):
    for started, shown in (("prefopt", f"prefopt {command}"), (f"x/{command}.py", f"python scripts/{command}.py")):
        monkeypatch.setattr(sys, "argv", [started])
        assert main([command, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: {shown} ")


def test_help_of_a_group_is_that_of_its_command():
    assert infer_help(["--help", "model"]).startswith("model: ")
    assert "--generate." not in infer_help(["--help", "model"])
    assert data_help(["--help", "data"]).startswith("data: ")
    assert plan_help(["--help", "lora"]) == help_text(["--help", "lora"])
