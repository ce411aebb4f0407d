import math

import pytest

from prefopt.errors import ConfigError
from prefopt.losses import cpo, dpo
from prefopt.methods.cpo import CPO
from tests.methods.make_stats import batch, f64, pair_stats


def test_cpo_is_dpo_with_a_reference_of_equal_likelihoods():
    chosen, rejected = f64([-3.0, -8.0]), f64([-5.0, -2.0])
    assert cpo(chosen, rejected, beta=0.3).tolist() == dpo(chosen, rejected, beta=0.3).tolist()


def test_variants_by_hand():
    """h = ln 3: sigmoid -log 3/4; hinge with beta 1 max(0, 1 - ln 3) = 0; ipo with beta 1/2 (ln 3 - 1)^2."""
    chosen, rejected = f64([math.log(3)]), f64([0.0])
    assert cpo(chosen, rejected, beta=1.0).item() == pytest.approx(math.log(4 / 3))
    assert cpo(chosen, rejected, beta=1.0, variant="hinge").item() == 0.0
    assert cpo(chosen, rejected, beta=0.5, variant="ipo").item() == pytest.approx((math.log(3) - 1) ** 2)
    smoothed = cpo(chosen, rejected, beta=1.0, label_smoothing=0.25).item()
    assert smoothed == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


def test_the_nll_is_a_term_of_its_own_that_counts_tokens():
    terms = CPO().loss(pair_stats([-4.0, -6.0], [-9.0, -2.0]), batch(2)).terms
    assert [(term.name, term.weight, term.count.tolist()) for term in terms] == [
        ("loss", 1.0, [1.0, 1.0]),
        ("nll", 1.0, [4, 2]),
    ]
    assert len(CPO(nll_weight=0.0).loss(pair_stats([-4.0], [-9.0], lengths=((1,), (1,))), batch(1)).terms) == 1


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"beta": 0.0}, "beta"),
        ({"nll_weight": -1.0}, "nll_weight"),
        ({"variant": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
        ({"variant": "simpo"}, "variant"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, key):
    with pytest.raises(ConfigError, match=f"method.{key}: "):
        CPO(**settings)
