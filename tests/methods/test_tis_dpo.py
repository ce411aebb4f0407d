import math
from dataclasses import replace

import pytest

from prefopt.errors import ConfigError
from prefopt.losses import dpo, tis_dpo
from prefopt.methods.tis_dpo import TISDPO
from prefopt.settings import parse
from tests.methods.make_stats import batch, f64, means, pair_stats


def run(method, stats, weights):
    made = replace(batch(len(stats.chosen_logps)), token_columns={"weights": f64(weights)})
    return method.loss(stats, made)


def test_tis_dpo_by_hand():
    """beta 2: u = 2 (1 - 0.5 - 0.5 (0.4 - 0.8)) = 1.4."""
    found = tis_dpo(f64([1.0]), f64([0.5]), f64([0.4]), f64([0.8]), beta=2.0, alpha=0.5)
    assert found.item() == pytest.approx(math.log1p(math.exp(-1.4)))


def test_weights_of_1_are_dpo():
    stats = pair_stats([-3.0, -6.0], [-5.0, -1.0], [-4.0, -5.0], [-4.0, -2.0])
    (term,) = run(TISDPO(beta=0.3), stats, [1.0] * 14).terms
    assert term.value.tolist() == pytest.approx(
        dpo(stats.chosen_logratios, stats.rejected_logratios, beta=0.3).tolist()
    )


def test_each_token_counts_its_weight():
    """Log-ratios -2 over 4 tokens and -3 over 3, so -1/2 and -1 per token; KL of 1/4 and 1/3 per token."""
    kl = {"chosen_kl": [0.0], "rejected_kl": [0.0], "chosen_reverse_kl": [1.0], "rejected_reverse_kl": [1.0]}
    stats = pair_stats([-2.0], [-3.0], lengths=((4,), (3,)), **kl)
    out = run(TISDPO(beta=1.0, kl_term=True), stats, [1.0, 1.0, 0.0, 2.0, 0.5, 0.0, 0.0])
    logit = -0.5 * 4 - -1 * 0.5 - 0.5 * (0.25 * 4 - 0.5 / 3)
    assert out.terms[0].value.item() == pytest.approx(math.log1p(math.exp(-logit)))
    assert means(out)["token_weight/chosen"] == 1
    assert means(out)["token_weight/rejected"] == pytest.approx(1 / 6)


def test_loss_at_the_reference_is_ln_2_whatever_the_weights():
    stats = pair_stats([-3.0], [-5.0], [-3.0], [-5.0], ((4,), (3,)))
    (term,) = run(TISDPO(), stats, [0.1 * i for i in range(7)]).terms
    assert term.value.item() == TISDPO().loss_at_reference() == math.log(2)


def test_rounds_are_refused_because_they_write_no_weights():
    with pytest.raises(ConfigError, match="method 'tis_dpo' reads chosen_weights, numbers per token"):
        parse(["--method", "tis_dpo", "--rounds.count", "1"])


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"alpha": -1.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=f"method.{next(iter(settings))}: "):
        TISDPO(**settings)
