"""A setting under the name that another framework gives it is answered with ours, as a flag and in YAML."""

import re

import pytest

from prefopt.errors import ConfigError
from prefopt.registry import get, names
from prefopt.settings import other_names, parse
from prefopt.settings.reader import known_keys, unknown_setting

REAL = ["--method", "dpo", "--model.path", "m", "--data.train", "d.jsonl"]


def refused(*argv):
    with pytest.raises(ConfigError) as caught:
        parse([*REAL, *argv])
    return str(caught.value)


def test_table_when_walked_then_names_settings_that_exist_and_values_that_are_taken():
    known = {key for name in names() for key in known_keys(get(name))} | {"prompts", "model"}
    for ours in other_names._TABLE:
        key, _, value = ours.partition(" ")
        assert key in known, ours
        if value:
            more = ["--lora.r", "4"] if key == "model.quantize" else []
            parse([*REAL, f"--{key}", value, *more])


@pytest.mark.parametrize("name", sorted(other_names._KEYS) + sorted(other_names._INSTEAD))
def test_every_name_of_another_framework_is_answered(name):
    known = {key for method in names() for key in known_keys(get(method))} | {"prompts", "model"}
    grouped = [] if "." in name else [f"training_arguments.{name}"]
    for spelt in (name, name.replace("_", "-"), name.upper(), *grouped):
        assert re.match(r"; \w", other_names.ours(spelt, known) or ""), spelt


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("train.lr", "optim.lr"),
        ("learning_rate", "optim.lr"),
        ("learning-rate", "optim.lr"),
        ("per_device_train_batch_size", "train.micro_batch"),
        ("gradient_accumulation_steps", "train.global_batch, the pairs per optimizer step over all ranks"),
        ("num_train_epochs", "train.epochs"),
        ("max_prompt_length", "data.max_length is the maximum of prompt and completion together"),
        ("loss_type", "method.variant"),
        ("ref_model", "reference.path"),
        ("model_name_or_path", "model.path"),
        ("dataset_name", "data.train"),
        ("bf16", "train.mixed_precision bf16"),
        ("warmup_ratio", "optim.warmup_ratio"),
        ("lr_scheduler_type", "optim.schedule"),
        ("lora_alpha", "lora.alpha"),
        ("train.num_epochs", "train.epochs"),
        ("method.learning_rate", "optim.lr"),
    ],
)
def test_setting_when_named_as_elsewhere_then_the_error_names_ours_as_flag_and_in_yaml(name, ours, tmp_path):
    assert ours in refused(f"--{name}", "1")
    file = tmp_path / "x.yaml"
    file.write_text(f"{name}: 1\n")
    found = refused("--config", str(file))
    assert found.startswith(f"{file}: {name}: unknown setting; ")
    assert ours in found


def test_setting_in_the_wrong_group_is_answered_before_one_that_is_spelt_alike():
    assert refused("--model.clip", "1") == "--model.clip: unknown setting; did you mean 'optim.clip'?"
    assert refused("--optim.lrr", "1") == "--optim.lrr: unknown setting; did you mean 'optim.lr'?"


def test_names_of_training_are_not_offered_where_a_command_does_not_have_them():
    assert other_names.ours("learning_rate", ["model", "prompts"]) is None
    assert other_names.ours("max_prompt_length", ["model", "prompts"]) is None
    assert "; use model" in other_names.ours("model_name_or_path", ["model", "prompts"])


@pytest.mark.parametrize(("old", "new"), other_names.RENAMED.items())
def test_name_that_a_setting_had_before_is_answered_with_the_new_one(old, new, tmp_path):
    error = unknown_setting(old, [new, "output"], "")
    assert str(error) == f"--{old}: unknown setting; did you mean '{new}'?"
    if "." in old:
        assert refused(f"--{old}", "1") == str(error)
        (tmp_path / "x.yaml").write_text(f"{old}: 1\n")
        assert refused("--config", str(tmp_path / "x.yaml")).endswith(f"{old}: unknown setting; did you mean '{new}'?")
