import math

import pytest
import torch

from prefopt.errors import ConfigError
from prefopt.losses import alpha_po, simpo
from prefopt.methods.simpo import SimPO
from tests.methods.make_stats import batch, f64, means, pair_stats


def test_simpo_by_hand():
    """a_w - a_l = ln 3 / 2 + 1/2; beta 2 and a margin of 1 leave u = ln 3, whose sigmoid is 3/4."""
    losses = simpo(f64([math.log(3) / 2 + 0.5]), f64([0.0]), beta=2.0, gamma_beta_ratio=0.5)
    assert losses.tolist() == pytest.approx([math.log(4 / 3)], abs=1e-12)


def test_hinge_by_hand():
    """u = 2 (a_w - a_l) - 1 = 1, 0, -3: 0, 1, 4."""
    found = simpo(f64([1.0, 0.5, -1.0]), f64([0.0] * 3), beta=2.0, gamma_beta_ratio=0.5, variant="hinge")
    assert found.tolist() == [0.0, 1.0, 4.0]


def test_simpo_is_alpha_po_towards_alpha_0():
    a, b = f64([-1.0, -3.0, -0.2]), f64([-2.0, -1.0, -4.0])
    expected = simpo(a, b, beta=2.5, gamma_beta_ratio=0.04)
    assert torch.allclose(alpha_po(a, b, beta=2.5, gamma=0.1, alpha=1e-6), expected, rtol=1e-4)
    assert torch.allclose(alpha_po(a, b, beta=2.5, gamma=0.1, alpha=0.0), expected, rtol=1e-12)


def test_loss_divides_by_completion_tokens_and_loads_no_reference():
    """Log-probabilities -4 over 4 tokens and -9 over 3: means -1 and -3, so u = 2 (2 - 0.5) = 3."""
    method = SimPO()
    stats = pair_stats([-4.0], [-9.0], lengths=((4,), (3,)))
    out = method.loss(stats, batch(1))
    assert method.needs.reference == "none"
    assert out.terms[0].value.item() == pytest.approx(math.log1p(math.exp(-3)))
    assert means(out)["rewards/margins"] == pytest.approx(4.0)
    assert means(out)["accuracy/logit"] == 1.0
    assert means(out)["margin_reached"] == 1.0


def test_nll_is_a_term_of_its_own_that_counts_tokens():
    terms = SimPO(nll_weight=0.5).loss(pair_stats([-4.0, -6.0], [-9.0, -2.0]), batch(2)).terms
    assert [(term.name, term.weight, term.count.tolist()) for term in terms] == [
        ("loss", 1.0, [1.0, 1.0]),
        ("nll", 0.5, [4, 2]),
    ]
    assert terms[1].value.tolist() == [4.0, 6.0]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"beta": 0.0}, "beta"),
        ({"gamma_beta_ratio": -1.0}, "gamma_beta_ratio"),
        ({"variant": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"nll_weight": -1.0}, "nll_weight"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, key):
    with pytest.raises(ConfigError, match=f"method.{key}: "):
        SimPO(**settings)
