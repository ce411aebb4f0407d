"""Settings of a training run: which of defaults, YAML file and flags takes precedence."""

import pytest
import yaml

from prefopt import registry, settings
from prefopt.errors import ConfigError
from prefopt.settings import from_dict, parse, sources
from tests.settings.helpers import REAL


def test_testbed_when_no_model_and_no_data_are_named_then_its_defaults_stand_below_yaml_and_flags(write):
    config = parse(["--method", "dpo"])
    assert config.on_testbed
    defaults = settings.TESTBED_DEFAULTS
    assert {group: defaults[group].items() <= config.to_dict()[group].items() for group in defaults} == dict.fromkeys(
        defaults, True
    )
    assert config.optim.schedule != settings.OptimConfig().schedule
    file = write("method: {name: dpo, beta: 0.3}\noptim: {lr: 1e-3, clip: 2}\ntrain:\n")
    config = parse([*file, "--optim.lr", "1e-4"])
    assert (config.method.beta, config.optim.lr, config.optim.clip) == (0.3, 1e-4, 2.0)
    assert config.optim.schedule == defaults["optim"]["schedule"]
    assert config.train.max_steps == defaults["train"]["max_steps"]  # a group with nothing under it changes nothing


def test_method_when_named_in_yaml_then_a_flag_may_name_another(write):
    assert parse(write("method: sft")).method_name == "sft"
    assert parse([*write("method: sft"), "--method", "dpo"]).method_name == "dpo"


@pytest.mark.parametrize("method", registry.names())
def test_resolved_config_when_written_then_gives_the_same_run_again(method, write):
    flags = ["--method", method, "--optim.args.eps", "1e-9", "--data.columns.chosen", "good", "--track.to", "wandb"]
    for task in (["--model.path", "m", "--data.train", "d"], []):
        config = parse([*flags, *task, "--seed", "5"])
        assert parse(write(config.to_yaml())) == config
        assert from_dict(config.to_dict()) == config
        assert settings.differences(config.to_dict(), yaml.safe_load(config.to_yaml())) == []


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
