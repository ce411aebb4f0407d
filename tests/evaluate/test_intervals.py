import math

import numpy as np
import pytest

from prefopt.evaluate.intervals import bootstrap


def test_bootstrap_when_values_are_normal_then_its_interval_is_the_textbook_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    found = bootstrap(values)
    error = values.std() / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert found.count == 400


def test_bootstrap_when_many_samples_are_drawn_then_the_mean_is_inside_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        found = bootstrap(rng.random(50) < 0.7, level=0.8)
        inside += found.low <= 0.7 <= found.high
    assert 38 <= inside <= 57  # 48 expected; four standard deviations of a coin of 0.8, rounded


def test_bootstrap_when_a_table_then_both_axes_are_drawn_again():
    rng = np.random.default_rng(2)
    runs, pairs = rng.normal(size=(40, 1)), rng.normal(size=(1, 50))
    both, along = bootstrap(runs + pairs), bootstrap(pairs[0])
    assert both.mean == pytest.approx((runs + pairs).mean())
    expected = math.sqrt(runs.var() / 40 + pairs.var() / 50)
    assert (both.high - both.low) / (2 * 1.96) == pytest.approx(expected, rel=0.05)
    assert both.high - both.low > 1.2 * (along.high - along.low)


def test_bootstrap_when_called_again_then_the_same_and_another_with_another_seed():
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values, seed=1) != bootstrap(values)


def test_bootstrap_when_nothing_or_nan_then_it_says_so():
    assert bootstrap([]).count == 0
    assert math.isnan(bootstrap([]).mean)
    with pytest.raises(ValueError, match="not finite"):
        bootstrap([1.0, float("nan")])


def test_interval_when_it_lies_on_one_side_then_it_excludes():
    found = bootstrap([0.6, 0.7, 0.8])
    assert found.excludes(0.5)
    assert not found.excludes(0.7)
    assert str(found).startswith("0.700 [0.")
    assert str(bootstrap([-1e-9, -1e-9])) == "0.000 [0.000, 0.000]"
