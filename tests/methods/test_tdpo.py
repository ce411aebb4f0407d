import math

import pytest
import torch

from prefopt.errors import ConfigError
from prefopt.losses import dpo, tdpo
from prefopt.methods.tdpo import TDPO
from tests.methods.make_stats import batch, f64, means, pair_stats


def sides(pairs=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(4, pairs, generator=generator, dtype=torch.float64)
    return [draw[0].requires_grad_(), draw[1].requires_grad_(), *(d.abs().requires_grad_() for d in draw[2:].detach())]


def test_tdpo_by_hand():
    """h = 4 - 1 = 3, KL difference 5 - 1 = 4; alpha = 1/2: logit 3 - 2 = 1, times beta = ln 3: sigmoid 3/4."""
    values = (f64([4.0]), f64([1.0]), f64([1.0]), f64([5.0]))
    loss = tdpo(*values, beta=math.log(3), alpha=0.5, detach_chosen_kl=True)
    assert loss.item() == pytest.approx(math.log(4 / 3), abs=1e-15)
    # alpha = 1: logit -1, sigmoid 1/4
    loss = tdpo(*values, beta=math.log(3), alpha=1.0, detach_chosen_kl=False)
    assert loss.item() == pytest.approx(math.log(4), abs=1e-15)


def test_tdpo2_with_alpha_zero_is_dpo_with_its_gradients():
    values = sides()
    found = tdpo(*values, beta=0.3, alpha=0.0, detach_chosen_kl=True)
    expected = dpo(*values[:2], beta=0.3)
    assert torch.equal(found, expected)
    for a, b in zip(
        torch.autograd.grad(found.mean(), values[:2]), torch.autograd.grad(expected.mean(), values[:2]), strict=True
    ):
        assert torch.equal(a, b)


def test_tdpo2_with_alpha_one_has_the_loss_of_tdpo1_and_another_chosen_gradient():
    values = sides()
    one = tdpo(*values, beta=0.3, alpha=1.0, detach_chosen_kl=False)
    two = tdpo(*values, beta=0.3, alpha=1.0, detach_chosen_kl=True)
    assert torch.equal(one, two)
    grads_one = torch.autograd.grad(one.sum(), values)
    grads_two = torch.autograd.grad(two.sum(), values, allow_unused=True)
    assert torch.equal(grads_one[3], grads_two[3])
    assert grads_two[2] is None  # a constant in tdpo2
    assert (grads_one[2] < 0).all()  # tdpo1 is rewarded for leaving the reference on chosen states


def test_method_trains_what_its_variant_says():
    stats = pair_stats([2.0, -1.0], [0.5, 0.0], chosen_kl=[0.2, 0.4], rejected_kl=[0.9, 0.1])
    values = (stats.chosen_logratios, stats.rejected_logratios, stats.chosen_kl, stats.rejected_kl)
    for method, alpha, detach in [
        (TDPO(), 0.5, True),
        (TDPO(alpha=0.3), 0.3, True),
        (TDPO(alpha=0.0), 0.0, True),
        (TDPO(variant="tdpo1"), 1.0, False),
    ]:
        (term,) = method.loss(stats, batch(2)).terms
        assert torch.equal(term.value, tdpo(*values, beta=0.1, alpha=alpha, detach_chosen_kl=detach))


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_policy_equal_to_reference_gives_ln_2(variant):
    stats = pair_stats([-3.0], [-4.0], [-3.0], [-4.0], lengths=((2,), (3,)), chosen_kl=[0.0], rejected_kl=[0.0])
    method = TDPO(variant=variant)
    assert method.loss(stats, batch(1)).terms[0].value.item() == method.loss_at_reference() == math.log(2)


def test_rewards_have_the_kl_with_weight_one_under_their_own_name():
    """Log-ratios 1 and 1.5, KL 3 and 1 (weight 1): 4 against 2.5, though 1.5 > 1 and the logit is negative."""
    stats = pair_stats([1.0], [1.5], lengths=((2,), (3,)), chosen_kl=[3.0], rejected_kl=[1.0])
    found = means(TDPO(beta=0.5, alpha=0.1).loss(stats, batch(1)))
    assert found["rewards_tdpo/chosen"] == 2.0
    assert found["rewards_tdpo/rejected"] == 1.25
    assert found["rewards_tdpo/margins"] == 0.75
    assert found["rewards_tdpo/accuracies"] == 1.0
    assert (found["rewards/chosen"], found["rewards/rejected"], found["rewards/accuracies"]) == (0.5, 0.75, 0.0)
    assert found["accuracy/logit"] == 0.0  # 1 - 1.5 - 0.1 (1 - 3) = -0.3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0}, "method.beta: found 0, expected a finite number > 0"),
        ({"variant": "tdpo3"}, "method.variant: found 'tdpo3', expected one of tdpo1, tdpo2"),
        ({"variant": "tdpo1", "alpha": 0.5}, "method.alpha: found 0.5, expected no alpha with variant tdpo1"),
        ({"alpha": -0.1}, "method.alpha: found -0.1, expected a finite number >= 0"),
        ({"alpha": float("nan")}, "method.alpha: found nan, expected a finite number >= 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_in_one_line(fields, message):
    with pytest.raises(ConfigError) as error:
        TDPO(**fields)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_describe_names_variant_and_alpha():
    assert TDPO().describe() == "tdpo2, alpha 0.5, beta 0.1"
    assert TDPO(variant="tdpo1").describe() == "tdpo1, beta 0.1"
    assert TDPO().needs.reference == "token"
