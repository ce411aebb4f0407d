import math

import pytest

from prefopt.errors import ConfigError
from prefopt.losses import dpo, wpo
from prefopt.methods.wpo import WPO
from tests.methods.make_stats import batch, f64, means, pair_stats

LOGS = {"chosen_log_sum_p2": [-2.0, -4.0], "rejected_log_sum_p2": [-3.0, -5.0]}


def test_wpo_where_the_weights_are_1_is_dpo():
    ratios, zeros = (f64([1.0, -2.0]), f64([0.5, 3.0])), (f64([0.0, 0.0]), f64([0.0, 0.0]))
    assert wpo(*ratios, *zeros, beta=0.3).tolist() == dpo(*ratios, beta=0.3).tolist()


def test_the_weight_is_a_mean_over_tokens_of_both_sides_without_gradient():
    """4 and 3 tokens: log w = (-6 + 2) / 4 = -1 and (-3 + 3) / 3 = 0; both log-ratios are -1."""
    stats = pair_stats([-6.0], [-3.0], [-5.0], [-2.0], ((4,), (3,)), **{name: v[:1] for name, v in LOGS.items()})
    out = WPO(beta=2.0).loss(stats, batch(1))
    assert out.terms[0].value.item() == pytest.approx(math.exp(-1) * math.log(2))
    assert means(out)["pair_weight"] == pytest.approx(math.exp(-1))
    out.terms[0].value.sum().backward()
    assert stats.chosen_logps.grad.item() == pytest.approx(-math.exp(-1))  # -W beta / 2, nothing through W


def test_a_weight_above_1_is_cut_unless_clamp_is_off():
    stats = pair_stats([-1.0, -4.0], [-1.0, -5.0], **LOGS)
    cut, whole = (means(WPO(clamp=clamp).loss(stats, batch(2)))["pair_weight"] for clamp in (True, False))
    first = math.exp((-1 + 2) / 4 + (-1 + 3) / 3)  # the second pair has weight 1
    assert (cut, whole) == (1.0, pytest.approx((first + 1) / 2))


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"label_smoothing": 0.5}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=f"method.{next(iter(settings))}: "):
        WPO(**settings)
