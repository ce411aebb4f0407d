import math

import pytest
import torch

from prefopt import registry
from prefopt.errors import ConfigError
from prefopt.losses import dpo, reward_rpo
from prefopt.methods.reward_rpo import RewardRPO
from tests.methods.make_stats import batch, f64, means, pair_stats


def test_distances_by_hand():
    """u = 0 and t = ln 3: Bernoullis 1/2 and 3/4, and a square of ln 3."""
    inputs = f64([0.0]), f64([0.0]), f64([math.log(3)]), f64([0.0])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    other = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    for distance, expected in (("bwd_kl", kl), ("fwd_kl", other), ("sq", math.log(3) ** 2)):
        found = reward_rpo(*inputs, beta=1.0, eta=1.0, distance=distance)
        assert found.item() == pytest.approx(expected, abs=1e-12), distance


def test_backward_kl_to_a_certain_label_is_dpo():
    chosen, rejected = f64([1.0, -2.0]), f64([0.5, 3.0])
    found = reward_rpo(chosen, rejected, f64([900.0] * 2), f64([0.0] * 2), beta=0.3, eta=1.0)
    assert torch.allclose(found, dpo(chosen, rejected, beta=0.3))


def test_loss_reads_the_score_columns():
    out = RewardRPO(distance="sq", beta=0.5).loss(
        pair_stats([3.0], [1.0], lengths=((1,), (1,))), batch(1, chosen_score=[4.0], rejected_score=[1.0])
    )
    assert out.terms[0].value.tolist() == [4.0]
    assert means(out)["score_gap"] == 3.0


def test_the_short_name_is_refused():
    with pytest.raises(ConfigError, match="'rpo' is ambiguous; it could mean reward_rpo"):
        registry.get("rpo")


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"eta": -1.0}, {"distance": "kl"}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=f"method.{next(iter(settings))}: "):
        RewardRPO(**settings)
