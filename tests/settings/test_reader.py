"""Flags and YAML keys become settings, or an error of one line."""

import pytest

from prefopt import registry
from prefopt.errors import ConfigError
from prefopt.settings import parse
from tests.settings.helpers import REAL, message

NAMES = ", ".join(registry.names())


def test_yaml_when_a_number_has_an_exponent_alone_then_it_is_a_number(write):
    config = parse([*REAL, *write("optim: {lr: 1e-6, args: {eps: 1e-7, betas: [0.9, 9e-1]}}")])
    assert config.optim.lr == 1e-6
    assert config.optim.args == {"eps": 1e-7, "betas": [0.9, 0.9]}


def test_yaml_when_keys_are_dotted_or_nested_then_both_are_read(write):
    config = parse([*REAL, *write("optim.lr: 2\noptim: {clip: 3}\nmethod.beta: 4\n")])
    assert (config.optim.lr, config.optim.clip, config.method.beta) == (2, 3, 4)


def test_flags_when_of_mappings_then_reach_their_keys():
    flags = ["--data.columns.chosen", "good", "--optim.args.eps", "1e-6", "--optim.args.betas=[0.8,0.9]"]
    config = parse([*REAL, *flags])
    assert config.data.columns == {"chosen": "good"}
    assert config.optim.args == {"eps": 1e-6, "betas": [0.8, 0.9]}


@pytest.mark.parametrize(
    ("words", "value"),
    [("--dry_run", True), ("--dry_run true", True), ("--dry-run=False", False), ("--dry_run --seed 1", True)],
)
def test_flags_when_bool_then_may_stand_alone(words, value):
    assert parse([*REAL, *words.split()]).dry_run is value


def test_flags_when_none_is_one_of_the_choices_then_it_is_that_choice():
    given = [*("--method", "dpo", "--method.variant", "bco"), "--method.delta"]
    assert [parse([*given, value]).method.delta for value in ("none", "null")] == ["none", None]


def test_flags_when_optional_then_none_is_a_value():
    assert parse([*REAL, "--train.max_steps", "7"]).train.max_steps == 7
    assert parse([*REAL, "--train.max_steps", "none"]).train.max_steps is None
    with pytest.raises(ConfigError, match=r"^seed: found -3, expected a number >= 0 and < 2147483648$"):
        parse([*REAL, "--seed", "-3"])  # read as a value, not as another flag


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], f"--method: not given, expected one of {NAMES} (or a dotted module path)"),
        (["--methd", "dpo"], "--methd: unknown setting; did you mean 'method'?"),
        (["--method"], f"--method: expected a method's name: {NAMES}"),
        (["--method", "dpoo"], f"unknown method 'dpoo'; did you mean 'dpo'? known: {NAMES} (or a dotted module path)"),
        (["--method", "xyz"], f"unknown method 'xyz'; known: {NAMES} (or a dotted module path)"),
        (["dpo"], "found 'dpo', expected a flag such as --optim.lr 1e-6"),
        (
            ["--method", "sft", *REAL[2:], "--reference.cache", "logps"],
            "reference.cache: found 'logps', but method 'sft' reads no reference; leave it out",
        ),
        (
            ["--method", "tdpo", *REAL[2:], "--reference.cache", "logps"],
            "reference.cache: found 'logps', but method 'tdpo' reads the reference's full distribution at every token; "
            "expected hidden, or none for a live reference",
        ),
        (
            ["--method", "dpo", "--reference.cache", "logps"],
            "reference.cache: found 'logps', but no pair of the testbed's stream repeats; set the size of a fixed "
            "training set (--testbed.pairs 40000), or leave it out",
        ),
        (
            [*REAL, "--reference.cache", "logps", "--reference.sync_every", "8"],
            "reference.cache: given with reference.sync_every, but a reference that changes cannot be cached; leave "
            "one out",
        ),
        (
            [*REAL, "--reference.sync_weight", "0.5"],
            "reference.sync_weight: found 0.5 without reference.sync_every; set that too, or leave it out",
        ),
        (
            [*REAL, "--reference.sync_every", "8", "--reference.sync_weight", "1.5"],
            "reference.sync_weight: found 1.5, expected a number > 0 and <= 1",
        ),
        (
            [*REAL, "--reference.cache", "logps", "--reference.cache_dtype", "float32"],
            "reference.cache_dtype: applies to hidden states only, found reference.cache 'logps'; leave it out",
        ),
        ([*REAL, "--", "x"], "found '--', expected a flag such as --optim.lr 1e-6"),
        ([*REAL, "--seed", "1", "2"], "found '2', expected a flag such as --optim.lr 1e-6"),
        ([*REAL, "--seed", "1", "--seed", "1"], "--seed: given twice"),
        ([*REAL, "--optim.lrr", "1"], "--optim.lrr: unknown setting; did you mean 'optim.lr'?"),
        ([*REAL, "--beta", "1"], "--beta: unknown setting; did you mean 'method.beta'?"),
        ([*REAL, "--zzz", "1"], "--zzz: unknown setting; --help lists them all"),
        ([*REAL, "--method.eta", "1"], "--method.eta: method 'dpo' has no 'eta'; it belongs to rebel, reward_rpo"),
        ([*REAL, "--optim", "3"], "--optim: 'optim' is a group; name a setting in it, such as optim.name"),
        ([*REAL, "--optim", "3", "--optim.lr", "1"], "--optim.lr: 'optim' is given as a value and as a group"),
        ([*REAL, "--config"], "--config: found no value, expected a YAML file"),
        ([*REAL, "--seed"], "--seed: found no value, expected an integer"),
        ([*REAL, "--seed", "1.5"], "--seed: found '1.5', expected an integer"),
        ([*REAL, "--seed", "none"], "--seed: found 'none', expected an integer"),
        ([*REAL, "--optim.lr", "fast"], "--optim.lr: found 'fast', expected a number"),
        ([*REAL, "--optim.lr"], "--optim.lr: found no value, expected a number"),
        ([*REAL, "--optim.lr", "nan"], "optim.lr: found nan, expected a number > 0"),
        ([*REAL, "--optim.lr", "inf"], "optim.lr: found inf, expected a number > 0"),
        ([*REAL, "--train.max_steps", "many"], "--train.max_steps: found 'many', expected an integer or none"),
        ([*REAL, "--train.max_steps", "0"], "train.max_steps: found 0, expected a number > 0, or none"),
        ([*REAL, "--train.micro_batch", "0"], "train.micro_batch: found 0, expected a number > 0"),
        ([*REAL, "--dry_run", "maybe"], "--dry_run: found 'maybe', expected true or false or config"),
        ([*REAL, "--data.columns", "x"], "--data.columns: found 'x', expected a mapping of keys to values"),
        (
            [*REAL, "--optim.args.betas", "[0.9"],
            "--optim.args.betas: found '[0.9', expected a number, a word or a list such as [0.9, 0.95]",
        ),
        (
            [*REAL, "--optim.schedule", "cosin"],
            "--optim.schedule: found 'cosin', expected one of linear, cosine, constant; did you mean 'cosine'?",
        ),
        ([*REAL, "--method.beta", "-1"], "method.beta: found -1.0, expected a finite number > 0"),
        (
            [*REAL, "--optim.name", "adamv"],
            "optim.name: found 'adamv', expected one of adamw, adamw_8bit, paged_adamw_8bit, adafactor, rmsprop, sgd "
            "or a dotted path; did you mean 'adamw'?",
        ),
        ([*REAL, "--data.eval_fraction", "1"], "data.eval_fraction: found 1.0, expected a number >= 0 and < 1"),
        (
            [*REAL, "--train.schedule_epochs", "0.5"],
            "train.schedule_epochs: found 0.5, expected at least train.epochs (1.0)",
        ),
        (
            REAL[:4],
            "model.path: given without data.train; name the pairs to train on (--data.train FILE), or leave both out "
            "for the testbed",
        ),
        (
            REAL[:2] + REAL[4:],
            "data.train: given without model.path; name the model to train (--model.path DIR), or leave both out for "
            "the testbed",
        ),
        (
            [*REAL[:2], "--data.eval", "e"],
            "data.eval: given without data.train, but the testbed generates its own held-out pairs",
        ),
    ],
    ids=lambda value: " ".join(value)[-30:] if isinstance(value, list) else "",
)
def test_flags_when_wrong_then_one_line_names_the_setting_and_a_fix(argv, expected):
    assert message(*argv) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {lrr: 1}", "x.yaml: optim.lrr: unknown setting; did you mean 'optim.lr'?"),
        ("config: y.yaml", "x.yaml: config: unknown setting; --help lists them all"),
        ("method: {eta: 1}", "x.yaml: method.eta: method 'dpo' has no 'eta'; it belongs to rebel, reward_rpo"),
        ("method: 3", "x.yaml: method: found 3, expected a name or a group of settings"),
        ("optim: [1]", "x.yaml: optim: 'optim' is a group; name a setting in it, such as optim.name"),
        ("optim: {lr: fast}", "x.yaml: optim.lr: found 'fast', expected a number"),
        ("optim: {lr: [1]}", "x.yaml: optim.lr: found [1], expected a number"),
        ("seed: 1\nseed: 2", "x.yaml:2: not readable as YAML: key 'seed' given twice"),
        ("seed: 1\noptim: {lr: 1\nseed: 2", "x.yaml:3: not readable as YAML: expected ',' or '}', but got ':'"),
        ("[1]: 2", "x.yaml:1: not readable as YAML: found [1], expected text as a key (put it in quotes)"),
        ("- 1", "x.yaml: found a list, expected keys such as 'method:' and 'optim:'"),
    ],
)
def test_yaml_when_wrong_then_one_line_names_the_file(text, expected, write):
    assert message(*REAL, *write(text)) == expected


def test_method_of_a_user_when_a_setting_has_no_default_then_it_must_be_given(tmp_path, monkeypatch):
    (tmp_path / "own_method.py").write_text(
        "from dataclasses import dataclass\nfrom prefopt.method import Method\n\n"
        "@dataclass(frozen=True)\nclass Own(Method):\n    strength: float\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert message("--method", "own_method.Own") == "method.strength: not given, expected a number"
    assert parse(["--method", "own_method.Own", "--method.strength", "2"]).method.strength == 2.0


def test_yaml_when_a_key_is_dotted_and_nested_then_it_is_given_twice(tmp_path):
    (tmp_path / "c.yaml").write_text("optim.lr: 1e-6\noptim: {lr: 1e-5}\n")
    with pytest.raises(ConfigError, match=r"^optim.lr: given twice in one file$"):
        parse(["--method", "dpo", "--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize("key", ["seed", "train.max_steps", "optim.lr", "data.max_length"])
@pytest.mark.parametrize("value", ["9" * 400, "9" * 5000, "-" + "9" * 400, "1e400", "nan", "-inf"])
def test_flag_when_its_number_is_beyond_all_bounds_then_one_line_says_so(key, value):
    with pytest.raises(ConfigError, match=rf"^(--)?{key}: found .*, expected "):
        parse(["--method", "dpo", f"--{key}={value}"])


def test_flag_when_its_name_has_thousands_of_parts_then_it_is_unknown():
    with pytest.raises(ConfigError, match=r"unknown setting"):
        parse(["--method", "dpo", "--" + "a." * 5000 + "b", "1"])
