import math

import pytest
import torch

from prefopt.errors import ConfigError
from prefopt.losses import orpo
from prefopt.methods.orpo import ORPO, log_odds
from tests.methods.make_stats import batch, f64, means, pair_stats


def test_orpo_by_hand():
    """Probabilities 3/4 and 1/2 per token have odds 3 and 1: the sigmoid of ln 3 is 3/4."""
    losses = orpo(f64([math.log(3 / 4)]), f64([math.log(1 / 2)]))
    assert losses.item() == pytest.approx(math.log(4 / 3), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_and_impossible_completions_are_finite_with_their_gradients(dtype):
    chosen = torch.tensor([0.0, -1e-9, -300.0], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-300.0, -1e-9, 0.0], dtype=dtype, requires_grad=True)
    losses = orpo(chosen, rejected)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()


def test_log_odds_at_one_half_are_0():
    assert log_odds(f64([math.log(0.5)])).item() == pytest.approx(0, abs=1e-12)


def test_terms_are_the_nll_over_tokens_and_the_weighted_odds_ratio():
    """Mean log-probabilities ln 3/4 and ln 1/2 over 4 and 2 tokens."""
    stats = pair_stats([4 * math.log(3 / 4)], [2 * math.log(1 / 2)], lengths=((4,), (2,)))
    method = ORPO(odds_weight=0.5)
    nll, odds = method.loss(stats, batch(1)).terms
    assert (nll.name, nll.weight, nll.count.tolist()) == ("nll", 1.0, [4])
    assert nll.value.item() == pytest.approx(4 * math.log(4 / 3))
    assert (odds.name, odds.weight, odds.value.item()) == ("odds_ratio", 0.5, pytest.approx(math.log(4 / 3)))
    assert means(method.loss(stats, batch(1)))["log_odds_ratio"] == pytest.approx(math.log(3))
    (nll, _) = ORPO(nll="sequence_mean").loss(stats, batch(1)).terms
    assert (nll.value.item(), nll.count.tolist()) == (pytest.approx(math.log(4 / 3)), [1.0])


@pytest.mark.parametrize("settings", [{"odds_weight": -0.1}, {"nll": "sum"}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=f"method.{next(iter(settings))}: "):
        ORPO(**settings)
