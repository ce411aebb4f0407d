"""Scores are chosen so that their differences are 0, 1 and 2."""

import math

import pytest
import torch

from prefopt.errors import ConfigError
from prefopt.losses import reward_model
from prefopt.methods.reward_model import RewardModel
from prefopt.types import PairStats
from tests.methods.make_stats import batch, f64, means


def stats(chosen, rejected):
    lengths = torch.ones(len(chosen), dtype=torch.int64)
    return PairStats(
        None, None, lengths, lengths, chosen_scores=f64(chosen, grad=True), rejected_scores=f64(rejected, grad=True)
    )


def softplus(x):
    return math.log1p(math.exp(x))


def test_reward_model_is_the_log_sigmoid_of_the_difference():
    """Differences 0, 1, -2: log 2, log(1 + e^-1), log(1 + e^2); the gradient is sigmoid(difference) - 1."""
    found = stats([1.5, 2.0, -1.0], [1.5, 1.0, 1.0])
    out = RewardModel().loss(found, batch(3))
    (term,) = out.terms
    assert term.value.tolist() == pytest.approx([math.log(2), softplus(-1), softplus(2)], abs=1e-12)
    assert term.count.tolist() == [1, 1, 1]
    gradient = [1 / (1 + math.exp(-d)) - 1 for d in (0.0, 1.0, -2.0)]
    chosen, rejected = torch.autograd.grad(term.value.sum(), (found.chosen_scores, found.rejected_scores))
    assert chosen.tolist() == pytest.approx(gradient, abs=1e-12)
    assert rejected.tolist() == pytest.approx([-g for g in gradient], abs=1e-12)


def test_reward_model_when_there_is_a_margin_then_the_difference_must_exceed_it():
    """A difference of 2 and a margin of 1 weigh what a difference of 1 weighs."""
    method = RewardModel(use_margin=True)
    (term,) = method.loss(stats([2.0], [0.0]), batch(1, margin=[1.0])).terms
    assert term.value.tolist() == pytest.approx([softplus(-1)], abs=1e-12)
    assert [column.name for column in method.needs.columns] == ["margin"]
    assert RewardModel().needs.columns == ()


def test_reward_model_when_centred_then_the_sum_of_the_scores_is_pulled_to_zero():
    """Scores 2 and 1: 0.1 * 3^2 is added, and 0.1 * 2 * 3 to both gradients."""
    chosen, rejected = f64([2.0], grad=True), f64([1.0], grad=True)
    losses = reward_model(chosen, rejected, center_coefficient=0.1)
    assert losses.tolist() == pytest.approx([softplus(-1) + 0.9], abs=1e-12)
    total = sum(torch.autograd.grad(losses.sum(), (chosen, rejected)))
    assert total.tolist() == pytest.approx([1.2], abs=1e-12)


def test_reward_model_metrics_are_the_scores():
    found = means(RewardModel().loss(stats([1.5, 2.0, -1.0], [1.5, 1.0, 1.0]), batch(3)))
    assert found == pytest.approx(
        {
            "rewards/chosen": 2.5 / 3,
            "rewards/rejected": 3.5 / 3,
            "rewards/margins": -1 / 3,
            "rewards/accuracies": 0.5,  # a tie, one right, one wrong
        }
    )


def test_reward_model_needs_scores_and_no_reference():
    needs = RewardModel().needs
    assert (needs.output, needs.reference, needs.sequences) == ("scores", "none", "completions")
    assert RewardModel().loss_at_reference() is None


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_reward_model_when_the_coefficient_is_no_pull_then_it_is_refused(value):
    with pytest.raises(ConfigError, match=r"^method.center_coefficient: found .*, expected a finite number >= 0$"):
        RewardModel(center_coefficient=value)
