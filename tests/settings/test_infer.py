"""Settings of the `infer` command: short flags, defaults that follow from the strategy, one line for each mistake."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from prefopt import __main__ as main
from prefopt import registry
from prefopt.errors import ConfigError
from prefopt.settings.infer import differences, infer_help, parse_infer

MODEL = ["--model", "path/to/model"]


def refusal(*argv):
    with pytest.raises(ConfigError) as error:
        parse_infer(argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_model_is_short_for_its_path_beside_other_settings_of_it():
    for flags in (MODEL, ["--model.path", "path/to/model"]):
        config = parse_infer([*flags, "--model.dtype", "bfloat16", "--prompt", "x"])
        assert (config.model.path, config.model.dtype) == ("path/to/model", "bfloat16")


def test_a_file_says_the_same_and_flags_take_precedence(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "model: path/to/model\nprompt: x\nstrategy: revision\nn: 3\njudge:\n  kind: length\n"
    )
    config = parse_infer(["--config", str(tmp_path / "c.yaml"), "--n", "4", "--model.dtype", "float64"])
    assert (config.model.path, config.strategy, config.n, config.depth) == ("path/to/model", "revision", 4, 2)
    assert config.model.dtype == "float64"
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert parse_infer(["--config", str(tmp_path / "again.yaml")]) == config


@pytest.mark.parametrize(
    ("flags", "n", "depth"),
    [
        ([], 1, 0),
        (["--strategy", "best_of_n"], 5, 0),
        (["--strategy", "best_of_n", "--n", "8"], 8, 0),
        (["--strategy", "test_time_po"], 5, 2),
        (["--strategy", "revision", "--n", "1", "--depth", "0"], 1, 0),
    ],
)
def test_samples_and_steps_follow_from_the_strategy(flags, n, depth):
    config = parse_infer(flags)
    assert (config.n, config.generate.n, config.depth) == (n, n, depth)


def test_without_a_model_the_testbed_answers_with_its_own_judge_and_sizes():
    config = parse_infer(["--strategy", "best_of_n"])
    assert (config.judge.kind, config.generate.max_tokens, config.limit) == ("world", 4, 64)
    assert parse_infer(["--generate.max_tokens", "9"]).generate.max_tokens == 9
    assert parse_infer([*MODEL, "--prompt", "x"]).generate.max_tokens == 512


def test_a_model_can_answer_the_testbeds_prompts_where_the_testbed_judges():
    config = parse_infer([*MODEL, "--judge.kind", "world", "--testbed.world", "cyclic"])
    assert (config.on_testbed, config.typed, config.limit, config.generate.max_tokens) == (True, False, 64, 4)


def test_the_same_settings_have_the_same_folder_and_others_another():
    flags = [*MODEL, "--prompts", "p.jsonl", "--strategy", "best_of_n", "--judge.kind", "length"]
    name = parse_infer(flags).output
    assert re.fullmatch(r"runs/infer-p-best_of_n-[0-9a-f]{8}", name)
    assert parse_infer([*flags, "--thought", "show"]).output == name
    assert parse_infer([*flags, "--seed", "1"]).output != name
    assert parse_infer([*MODEL, "--prompts", "p.jsonl"]).output == ""


def test_what_may_change_between_attempts_is_no_difference():
    old = parse_infer([*MODEL, "--prompt", "x"]).to_dict()
    new = parse_infer([*MODEL, "--prompt", "x", "--thought", "show", "--generate.concurrency", "3"]).to_dict()
    assert differences(old, new) == []
    new = parse_infer([*MODEL, "--prompt", "x", "--generate.top_p", "0.5"]).to_dict()
    assert differences(old, new) == ["generate.top_p: 1.0 -> 0.5"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--strategi", "plain"], r"--strategi: unknown setting; did you mean 'strategy'\?"),
        (
            ["--generate.temprature", "1"],
            r"--generate.temprature: unknown setting; did you mean 'generate.temperature'",
        ),
        (["--generate", "1"], r"--generate: 'generate' is a group; name a setting in it, such as generate\."),
        (["--optim.lr", "1"], r"--optim.lr: unknown setting"),
        (["--strategy", "best_of_m"], r"unknown strategy 'best_of_m'; did you mean 'best_of_n'\?"),
        (["--strategy", "tpo"], r"'tpo' is ambiguous; it could mean thought_po or test_time_po"),
        (
            ["--method", "test_time_po"],
            r"answers prompts without training; use scripts/infer.py --strategy test_time_po",
        ),
        (["--method", "dpo"], r"--method: inference trains no model; name a trained one"),
        (["--generate.n", "3"], r"--generate.n: the number of samples is the setting n of inference"),
        (["--n", "0"], r"n: found 0, expected a number >= 1"),
        (["--n", "many"], r"--n: found 'many', expected"),
        (["--depth", "-1", "--strategy", "revision"], r"depth: found -1, expected a number >= 0"),
        (
            ["--n", "2"],
            r"n: found 2, but strategy 'plain' uses one sample; choose another \(--strategy best_of_n or revision or",
        ),
        (["--strategy", "best_of_n", "--depth", "1"], r"depth: found 1, but strategy 'best_of_n' does not revise"),
        (["--thought", "maybe"], r"--thought: found 'maybe', expected one of hide, show"),
        (["--model"], r"--model.path: found True, expected text or none"),
        (["--retries", "-1"], r"retries: found -1"),
        (["--seed", "-1"], r"seed: found -1, expected a number >= 0 and < 2147483648"),
        (["--limit", "0"], r"limit: found 0, expected a number >= 1, or none"),
        (["--quoted_tokens", "0"], r"quoted_tokens: found 0"),
        (["--generate.top_p", "2"], r"generate.top_p: found 2.0, expected a number > 0 and <= 1"),
        (["--prompts", "p.jsonl"], r"--prompts: given without --model"),
        ([*MODEL, "--prompts", "p", "--prompt", "x"], r"--prompt: given with --prompts; leave one out"),
        ([*MODEL, "--prompt", " "], r"prompt: found ' ', expected text that is not empty"),
        ([*MODEL, "--testbed.world", "cyclic"], r"testbed: given with --model"),
        ([*MODEL, "--output", "x"], r"--output: given without prompts; name them"),
        (
            [*MODEL, "--prompt", "x", "--strategy", "best_of_n"],
            r"judge.kind: not given, expected the judge",
        ),
        ([*MODEL, "--prompt", "x", "--judge.kind", "world"], r"--prompt: given .*the testbed has its own prompts"),
        (
            [*MODEL, "--prompt", "x", "--strategy", "best_of_n", "--judge.kind", "length", "--output", "a.jsonl"],
            r"--output a.jsonl: strategy 'best_of_n' with a judge writes several files; expected a folder",
        ),
        (["--generate.logprobs", "true"], r"--generate.logprobs: unknown setting"),
        (["--model.gradient_checkpointing", "true"], r"--model.gradient_checkpointing: unknown setting"),
        (["--model.router_aux_weight", "0.1"], r"--model.router_aux_weight: unknown setting"),
        (["--threads", "0"], r"threads: found 0, expected a number >= 1"),
        (["--testbed.pairs", "5"], r"--testbed.pairs: unknown setting"),
        ([*MODEL, "--prompt", "x", "--quoted_tokens", "9"], r"quoted_tokens: found 9, but strategy 'plain' does not"),
        ([*MODEL, "--prompt", "x", "--critique_tokens", "9"], r"critique_tokens: found 9, but strategy 'plain'"),
        (["--strategy", "best_of_n", "--templates", "d"], r"templates: found 'd', but strategy 'best_of_n' with a"),
        (["--strategy", "best_of_n", "--retries", "9"], r"retries: found 9, but strategy 'best_of_n' with a judge"),
        (["plain"], r"found 'plain', expected a flag"),
        (["--config", "nowhere.yaml"], r"--config nowhere.yaml: No such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(flags, words):
    assert re.search(words, refusal(*flags)), refusal(*flags)


def test_every_config_of_the_command_parses():
    for path in (Path(__file__).parents[2] / "configs" / "infer").glob("*.yaml"):
        flags = ["--config", str(path), *MODEL, "--prompts", "p.jsonl", "--judge.kind", "length"]
        assert parse_infer(flags).strategy == path.stem


def test_help_lists_every_setting_once_and_every_strategy():
    text = infer_help()
    for flag in ("--model DIR", "--strategy", "--n INT", "--depth", "--thought", "--generate.engine", "--judge.kind"):
        assert text.count(f"\n  {flag}") == 1, flag
    assert "--generate.n " not in text
    for flag in ("--model.path", "--generate.logprobs", "--model.gradient_checkpointing", "--testbed.pairs"):
        assert flag not in text
    for name in registry.strategies():
        assert f"\n  {name} " in text


def test_help_and_mistakes_import_no_torch():
    code = (
        "import sys; from prefopt.cli import infer; status = infer(sys.argv[1:]); print(status, 'torch' in sys.modules)"
    )
    for flags, status in ((["--help"], 0), (["--strategi", "x"], 2), ([*MODEL, "--strategy", "tpo"], 2)):
        done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == f"{status} False", done.stdout + done.stderr


def test_the_command_is_one_of_prefopts():
    assert "prefopt infer" in main.USAGE
    assert main.COMMANDS["infer"].__name__ == "infer"
