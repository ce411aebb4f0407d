import math

import pytest

from prefopt.errors import ConfigError
from prefopt.losses import simpo
from prefopt.methods.alpha_dpo import AlphaDPO
from prefopt.types import LossState
from tests.methods.make_stats import batch, f64, means, pair_stats


def run(method, stats, state):
    return method.loss(stats, batch(len(stats.chosen_logps)), LossState(state=state))


def test_the_margin_grows_with_the_standard_score():
    """Means -1 and -2 against a reference of -2 and -2: A = M = 1; mean 0.5 and std 0.25 give the score 2."""
    stats = pair_stats([-4.0], [-6.0], [-8.0], [-6.0], ((4,), (3,)))
    out = run(AlphaDPO(beta=2.0, gamma_beta_ratio=0.6, alpha=0.1), stats, {"mean": 0.5, "std": 0.25, "steps": 9.0})
    assert out.terms[0].value.item() == pytest.approx(math.log1p(math.exp(-2 * (1 - 0.8))))
    assert means(out)["target_margin"] == pytest.approx(0.8)
    assert means(out)["margin_reached"] == 1


def test_averages_start_at_0_and_include_the_present_batch():
    method, values = AlphaDPO(), {"margins": f64([0.0, 2.0])}
    first = method.next_state(method.needs.state, values)
    assert first == pytest.approx({"mean": 0.1, "std": 0.1 * math.sqrt(2), "steps": 1})
    second = method.next_state(first, values)
    assert second == pytest.approx({"mean": 0.19, "std": 0.19 * math.sqrt(2), "steps": 2})


def test_bias_correction_gives_the_batchs_own_mean_and_deviation_at_the_first_step():
    stats = pair_stats([-4.0, -2.0], [-3.0, -10.0])
    margins = AlphaDPO().batch_values(stats, batch(2))["margins"].detach()
    found = []
    for method in (AlphaDPO(bias_correction=True, alpha=1.0, gamma_beta_ratio=0.0), AlphaDPO(alpha=1.0)):
        out = run(method, stats, method.next_state(method.needs.state, {"margins": margins}))
        found.append(out.metrics["target_margin"][0])
    assert found[0].tolist() == pytest.approx(((margins - margins.mean()) / margins.std()).tolist())
    assert (found[1] - 0.6).tolist() == pytest.approx(((margins - 0.1 * margins.mean()) / margins.std() * 10).tolist())


@pytest.mark.parametrize("margins", [[0.3], [0.3, 0.3], []])
@pytest.mark.parametrize("corrected", [False, True])
def test_loss_where_margins_do_not_deviate_is_simpos(margins, corrected):
    stats = pair_stats([-4.0, -2.0], [-3.0, -10.0])
    method = AlphaDPO(bias_correction=corrected)
    out = run(method, stats, method.next_state(method.needs.state, {"margins": f64(margins)}))
    expected = simpo(stats.chosen_mean_logps, stats.rejected_mean_logps, beta=2.5, gamma_beta_ratio=0.6)
    assert out.terms[0].value.tolist() == expected.tolist()


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"gamma_beta_ratio": -1.0}, {"alpha": -1.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=f"method.{next(iter(settings))}: "):
        AlphaDPO(**settings)
