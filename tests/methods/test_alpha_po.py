import math

import pytest
import torch

from prefopt.errors import ConfigError
from prefopt.losses import alpha_po
from prefopt.methods.alpha_po import AlphaPO
from tests.methods.make_stats import batch, f64, means, pair_stats


def test_alpha_po_by_hand():
    """alpha 1: r = 1 - e^(-a); a = -ln 2 and -ln 3 give -1 and -2, so beta 2 and gamma 1 leave u = 1."""
    losses = alpha_po(f64([-math.log(2)]), f64([-math.log(3)]), beta=2.0, gamma=1.0, alpha=1.0)
    assert losses.item() == pytest.approx(math.log1p(math.exp(-1)), abs=1e-12)


def test_likelihoods_that_underflow_keep_their_loss_and_gradient_in_float32():
    """e^-120 is 0 in float32, but 2 alpha a is not: e^(0.1 x 120) is 162,755."""
    a = torch.tensor([-120.0], requires_grad=True)
    loss = alpha_po(a, torch.tensor([-1.0]), beta=1.0, gamma=0.0, alpha=0.1)
    assert loss.item() == pytest.approx((math.expm1(12) - math.expm1(0.1)) / 0.1, rel=1e-5)
    assert torch.autograd.grad(loss, a)[0].item() == pytest.approx(-math.exp(12), rel=1e-5)


def test_rewards_are_the_bent_ones():
    method = AlphaPO(alpha=1.0, beta=2.0, gamma=0.0)
    out = method.loss(pair_stats([-2 * math.log(2)], [-math.log(3)], lengths=((2,), (1,))), batch(1))
    assert means(out)["rewards/chosen"] == pytest.approx(-2.0)
    assert means(out)["rewards/rejected"] == pytest.approx(-4.0)


@pytest.mark.parametrize("settings", [{"beta": -1.0}, {"gamma": -0.1}, {"alpha": math.inf}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=f"method.{next(iter(settings))}: "):
        AlphaPO(**settings)
