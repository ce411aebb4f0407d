"""Defaults of the settings, and those of the testbed."""

from prefopt import registry, settings
from prefopt.settings import parse
from tests.settings.helpers import REAL


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


def test_testbed_defaults_when_the_user_names_the_alternative_then_are_dropped():
    found = parse(["--method", "dpo", "--testbed.pairs", "100", "--train.epochs", "3", "--optim.warmup_ratio", "0.3"])
    assert (found.train.max_steps, found.optim.warmup_steps) == (None, None)
    usual = parse(["--method", "dpo"])
    assert (usual.train.max_steps, usual.optim.warmup_steps) == (600, 20)
