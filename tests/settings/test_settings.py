"""Settings: what wins, what is refused and in which words, and that reading them is cheap."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from prefopt import registry, settings
from prefopt.errors import ConfigError
from prefopt.settings import from_dict, help_text, parse, sources
from prefopt.settings.nested import flatten

REAL = ["--method", "dpo", "--model.path", "m", "--data.train", "d.jsonl"]
NAMES = ", ".join(registry.names())


def message(*argv):
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    return str(caught.value)


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text, name="x.yaml"):
        Path(name).write_text(textwrap.dedent(text))
        return ["--config", name]

    return write


# What wins ------------------------------------------------------------------------------------------------------------


def test_settings_when_nothing_else_is_given_then_are_the_dataclass_defaults():
    config = parse(REAL)
    assert config.method == registry.get("dpo")()
    assert settings.overrides(config)[2:] == []
    assert (config.optim, config.train, config.eval) == (
        settings.OptimConfig(),
        settings.TrainConfig(),
        settings.EvalConfig(),
    )
    assert not config.on_testbed


def test_testbed_when_no_model_and_no_data_are_named_then_its_departures_stand_below_yaml_and_flags(write):
    config = parse(["--method", "dpo"])
    assert config.on_testbed
    departures = settings.TESTBED_DEFAULTS
    assert {
        group: departures[group].items() <= config.to_dict()[group].items() for group in departures
    } == dict.fromkeys(departures, True)
    assert config.optim.schedule != settings.OptimConfig().schedule
    file = write("method: {name: dpo, beta: 0.3}\noptim: {lr: 1e-3, clip: 2}\ntrain:\n")
    config = parse([*file, "--optim.lr", "1e-4"])
    assert (config.method.beta, config.optim.lr, config.optim.clip) == (0.3, 1e-4, 2.0)
    assert config.optim.schedule == departures["optim"]["schedule"]
    assert config.train.max_steps == departures["train"]["max_steps"]  # a group with nothing under it changes nothing


def test_yaml_when_a_number_has_an_exponent_alone_then_it_is_a_number(write):
    config = parse([*REAL, *write("optim: {lr: 1e-6, args: {eps: 1e-7, betas: [0.9, 9e-1]}}")])
    assert config.optim.lr == 1e-6
    assert config.optim.args == {"eps": 1e-7, "betas": [0.9, 0.9]}


def test_yaml_when_keys_are_dotted_or_nested_then_both_are_read(write):
    config = parse([*REAL, *write("optim.lr: 2\noptim: {clip: 3}\nmethod.beta: 4\n")])
    assert (config.optim.lr, config.optim.clip, config.method.beta) == (2, 3, 4)


def test_method_when_named_in_yaml_then_a_flag_may_name_another(write):
    assert parse(write("method: sft")).method_name == "sft"
    assert parse([*write("method: sft"), "--method", "dpo"]).method_name == "dpo"


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


def test_flags_when_optional_then_none_is_a_value():
    assert parse([*REAL, "--train.max_steps", "7"]).train.max_steps == 7
    assert parse([*REAL, "--train.max_steps", "none"]).train.max_steps is None
    with pytest.raises(ConfigError, match=r"^seed: found -3, expected a number >= 0 and < 2147483648$"):
        parse([*REAL, "--seed", "-3"])  # read as a value, not as another flag


@pytest.mark.parametrize("method", registry.names())
def test_resolved_config_when_written_then_gives_the_same_run_again(method, write):
    flags = ["--method", method, "--optim.args.eps", "1e-9", "--data.columns.chosen", "good", "--track.to", "wandb"]
    for task in (["--model.path", "m", "--data.train", "d"], []):
        config = parse([*flags, *task, "--seed", "5"])
        assert parse(write(config.to_yaml())) == config
        assert from_dict(config.to_dict()) == config
        assert settings.differences(config.to_dict(), yaml.safe_load(config.to_yaml())) == []


def test_output_when_not_given_then_the_same_settings_give_the_same_folder():
    config = parse(REAL)
    assert config.output.startswith("runs/d-dpo-")
    assert parse([*REAL, "--train.keep_last", "9", "--train.show_batch"]).output == config.output
    assert parse([*REAL, "--seed", "1"]).output != config.output


def test_differences_when_a_setting_may_change_then_it_is_not_among_them():
    old = parse(REAL).to_dict()
    new = parse([*REAL, "--output", "o", "--track.to", "wandb", "--train.save_every", "3", "--optim.lr", "2"]).to_dict()
    assert settings.differences(old, new) == ["optim.lr: 1e-06 -> 2.0"]


def test_differences_when_an_older_run_did_not_have_a_setting_then_it_counts_as_its_default():
    old, new = (parse(["--method", "dpo"]).to_dict() for _ in range(2))
    del old["data"]["dialogues"]
    assert settings.differences(old, new) == []
    new["data"]["dialogues"] = "messages"
    assert settings.differences(old, new) == ["data.dialogues: 'text' -> 'messages'"]


@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_differences_when_an_adapter_has_dropout_then_the_cut_of_a_step_is_among_them(dropout):
    lora = [*REAL, "--lora.r", "4", "--lora.dropout", dropout]
    old, new = parse(lora).to_dict(), parse([*lora, "--train.micro_batch", "2"]).to_dict()
    assert bool(settings.differences(old, new)) == (dropout != "0")


# What is refused ------------------------------------------------------------------------------------------------------


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
        ([*REAL, "--method.alpha", "1"], "--method.alpha: method 'dpo' has no 'alpha'; it belongs to tdpo"),
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
def test_flags_when_wrong_then_one_line_says_where_and_how_to_mend_it(argv, expected):
    assert message(*argv) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {lrr: 1}", "x.yaml: optim.lrr: unknown setting; did you mean 'optim.lr'?"),
        ("config: y.yaml", "x.yaml: config: unknown setting; --help lists them all"),
        ("method: {alpha: 1}", "x.yaml: method.alpha: method 'dpo' has no 'alpha'; it belongs to tdpo"),
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


def test_yaml_when_missing_then_the_nearest_file_is_offered(write):
    write("seed: 1", "tdpo.yaml")
    found = message(*REAL, "--config", "tdpoo.yaml")
    assert found == "--config tdpoo.yaml: No such file or directory; did you mean 'tdpo.yaml'?"
    assert message(*REAL, "--config", ".") == "--config .: Is a directory"


def test_yaml_when_not_text_then_says_so(write):
    Path("x.yaml").write_bytes(b"seed: \xff")
    assert message(*REAL, "--config", "x.yaml") == "--config x.yaml: not a text file (byte 7 is not UTF-8)"


def test_method_of_a_user_when_a_setting_has_no_default_then_it_must_be_given(tmp_path, monkeypatch):
    (tmp_path / "own_method.py").write_text(
        "from dataclasses import dataclass\nfrom prefopt.method import Method\n\n"
        "@dataclass(frozen=True)\nclass Own(Method):\n    strength: float\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert message("--method", "own_method.Own") == "method.strength: not given, expected a number"
    assert parse(["--method", "own_method.Own", "--method.strength", "2"]).method.strength == 2.0


# Help and speed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", registry.names())
def test_help_names_every_setting_and_is_short(method, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    short = help_text(["--method", method, "--help"])
    assert len(short.splitlines()) < 120
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


def test_testbed_departures_when_the_user_names_the_alternative_then_give_way():
    found = parse(["--method", "dpo", "--testbed.pairs", "100", "--train.epochs", "3", "--optim.warmup_ratio", "0.3"])
    assert (found.train.max_steps, found.optim.warmup_steps) == (None, None)
    usual = parse(["--method", "dpo"])
    assert (usual.train.max_steps, usual.optim.warmup_steps) == (600, 20)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--train.epochs", "2"],
            "train.max_steps: found none, expected a number of steps, because the testbed's stream",
        ),
        (["--train.schedule_epochs", "3"], "train.schedule_epochs: the testbed's stream of pairs has no epochs"),
        (
            ["--train.group_by_length"],
            "train.group_by_length: the lengths of the testbed's stream of pairs are not known",
        ),
        (["--lora.r", "0"], "lora.r: found 0, expected a number > 0, or none"),
        (["--lora.r", "4", "--lora.dropout", "1"], "lora.dropout: found 1.0, expected a number >= 0 and < 1"),
        (
            ["--lora.r", "4", "--lora.target_modules", "q_proj,up_proj", "--lora.modules_to_save", "up_proj"],
            "lora.modules_to_save: 'up_proj' is also in lora.target_modules; name it in one of them",
        ),
        (
            ["--train.mixed_precision", "fp16", "--model.dtype", "bfloat16"],
            "train.mixed_precision: found 'fp16' with model.dtype 'bfloat16', which autocast does not apply "
            "to; expected model.dtype float32",
        ),
        (["--train.schedule_epochs", "inf"], "train.schedule_epochs: found inf, expected a number > 0, or none"),
        (["--testbed.seed", "-1"], "testbed.seed: found -1, expected a number >= 0 and < 2147483648"),
        (
            ["--optim.name", ".AdamW"],
            "optim.name: found '.AdamW', expected one of adamw, adamw_8bit, paged_adamw_8bit, adafactor, rmsprop, sgd "
            "or a dotted path",
        ),
        (["--model.compute_dtype", "bfloat16"], "model.compute_dtype: found 'bfloat16' without model.quantize"),
        (
            ["--model.quantize", "nf4", "--model.dtype", "float64"],
            "model.dtype: found 'float64' with model.quantize 'nf4', expected float32 or bfloat16",
        ),
        (
            ["--model.quantize", "nf4", "--train.compile", "true"],
            "train.compile: found true with model.quantize 'nf4', but quantised matrix products cannot be compiled; "
            "leave one out",
        ),
        (
            ["--model.attention", "flex_attention", "--train.compile", "true"],
            "train.compile: found true with model.attention 'flex_attention', which compiles itself; leave one out",
        ),
    ],
)
def test_setting_when_it_could_only_be_ignored_or_fail_later_then_is_refused(flags, message):
    with pytest.raises(ConfigError) as caught:
        parse(["--method", "dpo", *flags])
    assert str(caught.value).startswith(message)


def test_grouping_when_the_method_looks_at_the_batch_as_a_whole_then_is_refused(tmp_path, monkeypatch):
    (tmp_path / "sorted_pairs.py").write_text(
        "from dataclasses import dataclass\nfrom prefopt.method import Method\nfrom prefopt.types import Needs\n"
        "@dataclass(frozen=True)\nclass Sorted(Method):\n"
        "    @property\n    def needs(self):\n        return Needs(reference='none', coupled=True)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    real = ["--method", "sorted_pairs.Sorted", *REAL[2:]]
    assert not parse(real).train.group_by_length
    found = message(*real, "--train.group_by_length")
    assert found.startswith(
        "train.group_by_length: method 'sorted_pairs.Sorted' compares the pairs of a batch with each other"
    )
    found = message(*real, "--train.tokens_per_batch", "1000")
    assert found == (
        "train.tokens_per_batch: method 'sorted_pairs.Sorted' compares the pairs of a batch with each other, and the "
        "number of pairs would vary between steps; leave it out"
    )


def test_yaml_when_a_key_is_dotted_and_nested_then_it_is_given_twice(tmp_path):
    (tmp_path / "c.yaml").write_text("optim.lr: 1e-6\noptim: {lr: 1e-5}\n")
    with pytest.raises(ConfigError, match=r"^optim.lr: given twice in one file$"):
        parse(["--method", "dpo", "--config", str(tmp_path / "c.yaml")])


def test_local_paths_when_spelt_differently_then_are_one_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").touch()
    runs = [
        parse(["--method", "dpo", "--model.path", "m", "--data.train", name])
        for name in ("pairs.jsonl", "./pairs.jsonl")
    ]
    assert runs[0] == runs[1]
    runs = [
        parse(["--method", "dpo", "--model.path", "m", "--data.train", name])
        for name in ("pairs.jsonl,who/what:test", "./pairs.jsonl, who/what:test")
    ]
    assert runs[0] == runs[1]
    assert runs[0].output.startswith("runs/pairs-what:test-dpo-")


def test_sources_when_a_list_in_yaml_then_are_what_a_flag_with_commas_names(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "data: {train: [a.jsonl, b/c], weights: [1, 0.5], eval: [x, y]}\ntrain: {tokens_per_batch: 65536}\n"
    )
    flags = ["--data.train", "a.jsonl,b/c", "--data.weights", "1,0.5", "--data.eval", "x,y"]
    flags += ["--train.tokens_per_batch", "65536"]
    found = parse(["--method", "dpo", "--model.path", "m", "--config", str(tmp_path / "c.yaml")])
    assert found == parse(["--method", "dpo", "--model.path", "m", *flags])
    assert sources(found.data.train) == ("a.jsonl", "b/c")
    assert found.data.weights == (1.0, 0.5)
    assert from_dict(found.to_dict()) == found
    for text in ("[]", "['a,b', c]", "[a, '']"):
        (tmp_path / "c.yaml").write_text(f"data: {{train: {text}}}\n")
        with pytest.raises(ConfigError, match=r": data.train: found .*, expected names of sources without a comma$"):
            parse(["--method", "dpo", "--model.path", "m", "--config", str(tmp_path / "c.yaml")])


def test_source_when_a_file_has_a_comma_in_its_name_then_is_one(tmp_path):
    (tmp_path / "a,b.jsonl").touch()
    assert sources(str(tmp_path / "a,b.jsonl")) == (str(tmp_path / "a,b.jsonl"),)
    assert sources("a,b.jsonl") == ("a", "b.jsonl")
    assert sources(None) == ()


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--data.weights", "1,two"], "--data.weights: found '1,two', expected a list of numbers or none"),
        (["--rounds.count", "2", "--judge.kind", "length"], "data.weights: given with rounds, which use every prompt"),
    ],
)
def test_weights_when_they_cannot_be_used_then_are_refused(flags, found):
    weights = [] if flags[0] == "--data.weights" else ["--data.weights", "1,1"]
    said = message("--method", "dpo", "--model.path", "m", "--data.train", "a,b", *weights, *flags)
    assert said.startswith(found)


def test_help_when_only_a_config_names_the_method_then_lists_its_settings(tmp_path):
    (tmp_path / "c.yaml").write_text("method: tdpo\n")
    assert "--method.alpha" in help_text(["--config", str(tmp_path / "c.yaml"), "--help"])


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ([], None),
        (["--model.quantize", "nf4"], "float32"),
        (["--model.quantize", "nf4", "--model.dtype", "bfloat16"], "bfloat16"),
        (["--model.quantize", "nf4", "--train.mixed_precision", "bf16"], "bfloat16"),
        (["--model.quantize", "fp4", "--train.mixed_precision", "bf16", "--model.compute_dtype", "float32"], "float32"),
    ],
)
def test_compute_dtype_when_it_is_not_named_then_that_of_autocast_or_of_the_weights(flags, dtype):
    assert parse([*REAL, *flags]).model.compute_dtype == dtype


def test_run_when_it_changes_what_only_costs_time_or_memory_then_it_may_go_on_unless_dropout_would_differ():
    plain, compiled = (parse([*REAL, "--lora.r", "4", *more]) for more in ([], ["--train.compile", "true"]))
    offloaded = parse([*REAL, "--lora.r", "4", "--model.offload_activations", "true"])
    assert settings.differences(plain.to_dict(), compiled.to_dict()) == []
    assert settings.differences(plain.to_dict(), offloaded.to_dict()) == []
    dropping = [*REAL, "--lora.r", "4", "--lora.dropout", "0.1"]
    changed = settings.differences(parse(dropping).to_dict(), parse([*dropping, "--train.compile", "true"]).to_dict())
    assert changed == ["train.compile: False -> True"]


# Files and numbers that nobody means ----------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)
MERGED = "m0: &m0 {x0: 1, y0: 1}\n" + "".join(
    f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}], x{n}: 1}}\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, r"more than 200,000 values, aliases counted as what they stand for"),
        (MERGED, r"more than 200,000 values, aliases counted as what they stand for"),
        ("a: &a [*a]", r"alias '\*a' stands inside what it names"),
        ("a: &a {b: *a}", r"alias '\*a' stands inside what it names"),
        ("a: &a\n  <<: *a", r"alias '\*a' stands inside what it names"),
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


@pytest.mark.parametrize("key", ["seed", "train.max_steps", "optim.lr", "data.max_length"])
@pytest.mark.parametrize("value", ["9" * 400, "9" * 5000, "-" + "9" * 400, "1e400", "nan", "-inf"])
def test_flag_when_its_number_is_beyond_all_bounds_then_one_line_says_so(key, value):
    with pytest.raises(ConfigError, match=rf"^(--)?{key}: found .*, expected "):
        parse(["--method", "dpo", f"--{key}={value}"])


def test_flag_when_its_name_has_thousands_of_parts_then_it_is_unknown():
    with pytest.raises(ConfigError, match=r"unknown setting"):
        parse(["--method", "dpo", "--" + "a." * 5000 + "b", "1"])


@pytest.mark.parametrize(
    ("kind", "words"), [("pipe", "is a named pipe"), ("device", "is a device"), ("nul", "holds a NUL character")]
)
def test_config_when_it_is_no_regular_file_then_it_is_not_waited_for(tmp_path, kind, words):
    path = {"pipe": str(tmp_path / "pipe"), "device": "/dev/zero", "nul": "a\0b"}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(ConfigError, match=rf"^--config .*{words}"):
        parse(["--method", "dpo", "--config", path])
