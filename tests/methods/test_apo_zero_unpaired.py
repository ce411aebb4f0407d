import torch

from prefopt.dpo_variants import apo_zero
from prefopt.losses import apo_zero_unpaired, kto
from tests.methods.make_stats import f64


def test_two_halves_of_a_pair_add_up_to_apo_zero():
    chosen, rejected = f64([0.5, -2.0]), f64([1.0, 0.3])
    halves = apo_zero_unpaired(torch.cat((chosen, rejected)), f64([1, 1, 0, 0]), beta=0.7)
    torch.testing.assert_close(halves[:2] + halves[2:], apo_zero(chosen, rejected, beta=0.7))


def test_it_is_kto_with_the_reference_point_at_zero():
    ratios, labels = f64([0.5, -2.0]), f64([1, 0])
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    torch.testing.assert_close(
        apo_zero_unpaired(ratios, labels, beta=0.2, **weights), kto(ratios, labels, 0.0, beta=0.2, **weights)
    )
