"""Logits are chosen so that both orders agree, contradict each other, or say nothing."""

import math

import pytest
import torch

from prefopt.losses import pairwise_judge
from prefopt.methods.pairwise_judge import PairwiseJudgeMethod
from tests.methods.make_stats import batch, f64, means
from tests.methods.test_reward_model import softplus, stats

# L(w, l) and L(l, w): right in both orders; the first place wins; the second place wins; nothing is known
FIRST, SECOND = [1.0, 2.0, -1.0, 0.0], [-1.0, 2.0, -1.0, 0.0]


def test_pairwise_judge_is_the_mean_of_both_orders():
    chosen_first, rejected_first = f64(FIRST, grad=True), f64(SECOND, grad=True)
    losses = pairwise_judge(chosen_first, rejected_first)
    by_hand = [softplus(-1), (softplus(-2) + softplus(2)) / 2, (softplus(1) + softplus(-1)) / 2, math.log(2)]
    assert losses.tolist() == pytest.approx(by_hand, abs=1e-12)
    gradients = torch.autograd.grad(losses.sum(), (chosen_first, rejected_first))
    sigmoid = [1 / (1 + math.exp(-x)) for x in FIRST], [1 / (1 + math.exp(-x)) for x in SECOND]
    assert gradients[0].tolist() == pytest.approx([(s - 1) / 2 for s in sigmoid[0]], abs=1e-12)
    assert gradients[1].tolist() == pytest.approx([s / 2 for s in sigmoid[1]], abs=1e-12)


def test_pairwise_judge_metrics_tell_preference_from_place():
    out = PairwiseJudgeMethod().loss(stats(FIRST, SECOND), batch(4))
    (term,) = out.terms
    assert term.count.tolist() == [1] * 4
    assert means(out) == pytest.approx(
        {
            "rewards/chosen": 0.25,  # (1 + 0 + 0 + 0) / 4
            "rewards/rejected": -0.25,
            "rewards/margins": 0.5,
            "rewards/accuracies": 0.625,  # three ties count a half each
            "order/bias": 0.25,  # (0 + 2 - 1 + 0) / 4
            "order/contradictions": 0.625,  # where both logits are 0 the order decides half of the time
        }
    )


def test_pairwise_judge_reads_both_orders_and_no_reference():
    needs = PairwiseJudgeMethod().needs
    assert (needs.output, needs.reference, needs.sequences) == ("scores", "none", "both_orders")
    assert PairwiseJudgeMethod().loss_at_reference() is None
