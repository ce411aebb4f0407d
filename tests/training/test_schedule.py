"""The learning rate of each step and the number of steps, by hand."""

import dataclasses
import math

import pytest

from prefopt.errors import ConfigError
from prefopt.settings import OptimConfig, TrainConfig, parse
from prefopt.training.schedule import learning_rate, total_steps


def per_epoch(steps):
    return lambda epochs: math.ceil(epochs * steps)


def run(steps=None, epochs=1.0, schedule_epochs=None, **optim):
    config = parse(["--method", "dpo", "--model.path", "m", "--data.train", "d"])
    train = TrainConfig(max_steps=steps, epochs=epochs, schedule_epochs=schedule_epochs)
    return dataclasses.replace(config, optim=OptimConfig(**optim), train=train)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "linear", "warmup_ratio": 0.0}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ({"schedule": "linear", "warmup_ratio": 0.2}, [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ({"schedule": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        (
            {"schedule": "cosine", "warmup_ratio": 0.0},
            [(1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)],
        ),
        ({"schedule": "cosine", "warmup_steps": 8, "warmup_ratio": 0.5}, [*(i / 8 for i in range(1, 9)), 1, 0.5]),
    ],
)
def test_learning_rate_by_hand(settings, expected):
    config = run(steps=10, lr=3.0, **settings)
    assert [learning_rate(config, None, step) / 3.0 for step in range(10)] == pytest.approx(expected, abs=1e-12)


def test_learning_rate_when_the_schedule_is_longer_than_training_then_ends_above_zero():
    # 18 epochs of 1000 steps, stopped after the first: warm-up takes 1800 steps, so 1000 / 1800 of the peak is reached
    config = run(epochs=1.0, schedule_epochs=18.0, lr=5e-7, warmup_ratio=0.1)
    assert total_steps(config, per_epoch(1000)) == 1000
    last = learning_rate(config, per_epoch(1000), 999)
    assert last == pytest.approx(5e-7 * 1000 / 1800, rel=1e-12)
    assert round(last * 1e7, 1) == 2.8


def test_steps_when_epochs_are_broken_then_rounded_up_and_a_stream_needs_a_number():
    assert total_steps(run(epochs=0.25), per_epoch(10)) == 3
    assert total_steps(run(steps=7), None) == 7
    with pytest.raises(ConfigError) as caught:
        total_steps(run(), None)
    assert str(caught.value) == (
        "train.max_steps: found none, expected a number of steps for an endless stream of pairs"
    )
