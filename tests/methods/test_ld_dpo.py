import math

import pytest

from prefopt.errors import ConfigError
from prefopt.losses import dpo
from prefopt.methods.ld_dpo import LDDPO
from tests.methods.make_stats import batch, pair_stats


def loss(method, stats):
    return method.loss(stats, batch(len(stats.chosen_logps))).terms[0].value


def test_tokens_beyond_the_shorter_completion_count_alpha():
    """4 tokens of -1 against 3 of -1: the fourth counts 1/2, so h = -3.5 + 3 = -1/2 and beta 2 gives u = -1."""
    stats = pair_stats([-4.0], [-3.0], lengths=((4,), (3,)))
    assert loss(LDDPO(beta=2.0, alpha=0.5), stats).item() == pytest.approx(math.log1p(math.exp(1)))


def test_gradient_of_the_excess_is_alpha_times_that_of_the_rest():
    stats = pair_stats([-8.0], [-2.0], lengths=((4,), (2,)))
    stats.tokens.stats.logp.retain_grad()
    loss(LDDPO(beta=1.0, alpha=0.25), stats).sum().backward()
    # the sums of PairStats have their own leaf here: of the tokens' gradient only the correction's part is there
    assert stats.chosen_logps.grad.item() < 0
    chosen = stats.tokens.stats.logp.grad[:4].tolist()
    assert chosen[:2] == [0.0, 0.0]
    assert chosen[2] == chosen[3] > 0


@pytest.mark.parametrize("reference", ["both", "plain"])
def test_alpha_1_is_dpo(reference):
    stats = pair_stats([-3.0, -6.0], [-5.0, -1.0], [-4.0, -5.0], [-4.0, -2.0])
    expected = dpo(stats.chosen_logratios, stats.rejected_logratios, beta=0.3)
    assert loss(LDDPO(beta=0.3, alpha=1.0, reference=reference), stats).tolist() == expected.tolist()


def test_loss_at_the_reference_is_ln_2_where_the_reference_is_weighted_too():
    stats = pair_stats([-3.0, -6.0], [-5.0, -1.0], [-3.0, -6.0], [-5.0, -1.0])
    assert loss(LDDPO(), stats).tolist() == pytest.approx([LDDPO().loss_at_reference()] * 2) == [math.log(2)] * 2
    plain = LDDPO(reference="plain")
    assert plain.loss_at_reference() is None
    assert loss(plain, stats)[0].item() != pytest.approx(math.log(2))


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"alpha": 1.1}, {"reference": "none"}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=f"method.{next(iter(settings))}: "):
        LDDPO(**settings)
