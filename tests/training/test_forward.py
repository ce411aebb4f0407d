"""The fused head against each architecture's own logits and the plain formulas, padding and ragged rows included."""

import pytest
import torch

from prefopt.data.collate import collate
from prefopt.settings import KernelConfig
from prefopt.training.forward import ALL_STATISTICS, PolicyWithReference, token_stats_of
from tests.invariant.oracle import mask, oracle_row
from tests.invariant.steps import random_pairs
from tests.training.architectures import ARCHITECTURES, tiny_model

PAIRS = random_pairs(pairs=4)
BATCH = collate(PAIRS, pad_id=2, extra_padding=3)
SMALL_TILES = KernelConfig(token_tile=4, vocab_tile=16)


def fused(policy, reference):
    return token_stats_of(PolicyWithReference(policy, reference, SMALL_TILES), BATCH, (*ALL_STATISTICS, "log_sum_p2"))


def plain(policy, reference):
    """`{statistic: (tokens,)}` in the order of the batch: the chosen sides, then the rejected ones."""
    rows = [
        oracle_row(policy, reference, pair.prompt_ids, getattr(pair, f"{side}_ids"), mask(pair, side))
        for side in ("chosen", "rejected")
        for pair in PAIRS
    ]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_token_statistics_when_any_architecture_then_they_are_those_of_its_own_logits(name):
    policy, reference = tiny_model(name, seed=0), tiny_model(name, seed=1)
    expected = plain(policy, reference)
    found = fused(policy, reference)
    assert expected["kl"].mean() > 0.01, "policy and reference are too alike for a test"
    for statistic, value in expected.items():
        torch.testing.assert_close(getattr(found, statistic), value, rtol=1e-5, atol=1e-5, msg=statistic)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradient_when_any_architecture_then_it_is_that_of_its_own_logits(name):
    policy, reference = tiny_model(name, seed=0).double(), tiny_model(name, seed=1).double()
    gradients = []
    for statistics in (plain(policy, reference), vars(fused(policy, reference))):
        policy.zero_grad(set_to_none=True)
        (statistics["logp"].sum() + 0.5 * (statistics["kl"] ** 2).sum()).backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
    expected, found = gradients
    assert expected.keys() == found.keys()
    for parameter, gradient in expected.items():
        assert (gradient - found[parameter]).norm() <= 1e-6 * gradient.norm() + 1e-9, parameter


@pytest.mark.parametrize("name", [name for name, (_, scaled) in ARCHITECTURES.items() if scaled])
def test_architectures_here_when_called_scaled_then_scaling_moves_their_statistics(name, monkeypatch):
    policy, reference = tiny_model(name, seed=0), tiny_model(name, seed=1)
    expected = plain(policy, reference)["logp"]
    monkeypatch.setattr("prefopt.training.forward.head_scaling", lambda lm: (1.0, None))
    assert (fused(policy, reference).logp - expected).abs().max() > 1e-3
