"""Settings that conflict with each other are refused, naming what to change."""

import pytest

from prefopt.errors import ConfigError
from prefopt.settings import parse
from tests.settings.helpers import REAL, message


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
        "    @property\n    def needs(self):\n        return Needs('none', batch_values=('score',))\n"
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
