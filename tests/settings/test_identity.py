"""What identifies a run: its output folder, and the settings that may change when it is resumed."""

import pytest

from prefopt import settings
from prefopt.settings import parse
from tests.settings.helpers import REAL


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


def test_run_when_it_changes_what_only_costs_time_or_memory_then_it_may_resume_unless_dropout_would_differ():
    plain, compiled = (parse([*REAL, "--lora.r", "4", *more]) for more in ([], ["--train.compile", "true"]))
    offloaded = parse([*REAL, "--lora.r", "4", "--model.offload_activations", "true"])
    assert settings.differences(plain.to_dict(), compiled.to_dict()) == []
    assert settings.differences(plain.to_dict(), offloaded.to_dict()) == []
    dropping = [*REAL, "--lora.r", "4", "--lora.dropout", "0.1"]
    changed = settings.differences(parse(dropping).to_dict(), parse([*dropping, "--train.compile", "true"]).to_dict())
    assert changed == ["train.compile: False -> True"]
