import math
from dataclasses import replace

import pytest

from prefopt.errors import ConfigError
from prefopt.losses import dpo
from prefopt.methods.tgdpo import TGDPO
from tests.methods.make_stats import batch, f64, pair_stats


def loss(method, stats, rewards):
    made = replace(batch(len(stats.chosen_logps)), token_columns={"reward_logratios": f64(rewards)})
    return method.loss(stats, made).terms[0].value


@pytest.mark.parametrize(("alpha", "reward"), [(0.0, 0.7), (0.5, 0.0)])
def test_alpha_0_and_rewards_of_0_are_dpo(alpha, reward):
    stats = pair_stats([-3.0, -6.0], [-5.0, -1.0], [-4.0, -5.0], [-4.0, -2.0])
    expected = dpo(stats.chosen_logratios, stats.rejected_logratios, beta=0.3)
    assert loss(TGDPO(beta=0.3, alpha=alpha), stats, [reward] * 14).tolist() == pytest.approx(expected.tolist())


def test_rewards_raise_the_factor_of_chosen_tokens_and_lower_that_of_rejected_ones():
    """Log-ratios of 1/2 and 1 per token, beta 1 and alpha 1/2: factors 1 + r/2 and 1 - r/2."""
    stats = pair_stats([2.0], [3.0], lengths=((4,), (3,)))
    logit = 0.5 * (4 + 0.5 * 2.0) - 1 * (3 - 0.5 * 1.0)
    found = loss(TGDPO(beta=1.0, alpha=0.5), stats, [2.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    assert found.item() == pytest.approx(math.log1p(math.exp(-logit)))


def test_loss_at_the_reference_is_ln_2_whatever_the_rewards():
    stats = pair_stats([-3.0], [-5.0], [-3.0], [-5.0], ((4,), (3,)))
    assert loss(TGDPO(), stats, [0.1 * i for i in range(7)]).item() == TGDPO().loss_at_reference() == math.log(2)


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"alpha": -1.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=f"method.{next(iter(settings))}: "):
        TGDPO(**settings)
