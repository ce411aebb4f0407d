"""Frequencies of drawn tokens against the distribution they are drawn from, worked out here in another way."""

import math

import numpy as np
import pytest
import torch

from prefopt.generation.base import Sampling
from prefopt.generation.sampling import choose, uniforms

DRAWS = 20_000
LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.3, -4.0, 1.9, 0.0, 1.0, -1.0, 0.7])


def by_hand(temperature, top_k, top_p):
    """The distribution token by token, in Python."""
    weight = {i: math.exp(logit / temperature) for i, logit in enumerate(LOGITS.tolist())}
    ranked = sorted(weight, key=lambda i: -weight[i])
    ranked = ranked[: top_k or None]
    total = sum(weight[i] for i in ranked)
    kept, mass = [], 0.0
    for i in ranked:
        if mass >= top_p:
            break
        kept.append(i)
        mass += weight[i] / total
    total = sum(weight[i] for i in kept)
    return [weight[i] / total if i in kept else 0.0 for i in range(len(LOGITS))]


def assert_frequencies(counts, expected):
    """Pearson's statistic within five standard deviations of its mean; what has no probability is never drawn."""
    counts, expected = np.asarray(counts, dtype=float), np.asarray(expected)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    mean = expected[possible] * counts.sum()
    statistic, freedom = ((counts[possible] - mean) ** 2 / mean).sum(), possible.sum() - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), (statistic, freedom)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 4, 1.0), (1.0, 0, 0.8), (1.5, 6, 0.7)]
)
def test_tokens_come_as_often_as_the_distribution_says_from_seeds_that_follow_each_other(temperature, top_k, top_p):
    sampling = Sampling(n=1, temperature=temperature, top_k=top_k, top_p=top_p)
    points = torch.tensor([uniforms(seed, 1)[0] for seed in range(DRAWS)])
    tokens = choose(LOGITS.expand(DRAWS, -1), points, sampling)
    assert_frequencies(tokens.bincount(minlength=len(LOGITS)), by_hand(temperature, top_k, top_p))


def test_the_frequencies_of_another_temperature_are_told_apart():
    points = torch.tensor([uniforms(seed, 1)[0] for seed in range(DRAWS)])
    tokens = choose(LOGITS.expand(DRAWS, -1), points, Sampling(n=1, temperature=1.1))
    with pytest.raises(AssertionError):
        assert_frequencies(tokens.bincount(minlength=len(LOGITS)), by_hand(1.0, 0, 1.0))


def test_temperature_zero_takes_the_likeliest():
    points = torch.zeros(3, dtype=torch.float64)
    assert choose(LOGITS.expand(3, -1), points, Sampling(n=1, temperature=0)).tolist() == [2, 2, 2]


@pytest.mark.parametrize("temperature", [1e-40, 1e-7])
def test_a_temperature_that_logits_cannot_be_divided_by_takes_the_likeliest(temperature):
    points = torch.tensor([0.0, 0.5, 0.99], dtype=torch.float64)
    assert choose(100 * LOGITS.expand(3, -1), points, Sampling(n=1, temperature=temperature)).tolist() == [2, 2, 2]


@pytest.mark.parametrize("temperature", [1e-5, 1e-3])
def test_a_low_temperature_is_divided_by(temperature):
    points = torch.tensor([0.0, 0.5, 0.99], dtype=torch.float64)
    assert Sampling(n=1, temperature=temperature).temperature == temperature
    assert choose(100 * LOGITS.expand(3, -1), points, Sampling(n=1, temperature=temperature)).tolist() == [2, 2, 2]


@pytest.mark.parametrize("point", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_give_tokens_that_are_possible(point):
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf], [-math.inf, -200.0, 1.0, -200.0]])
    points = torch.full((2,), point, dtype=torch.float64)
    for sampling in (Sampling(n=1), Sampling(n=1, top_p=0.99), Sampling(n=1, top_k=2)):
        tokens = choose(logits, points, sampling)
        assert torch.isfinite(logits.gather(1, tokens[:, None])).all()
        assert tokens[1] == 2


def test_a_longer_list_of_numbers_begins_as_a_shorter_one():
    assert uniforms(7, 40)[:5].tolist() == uniforms(7, 5).tolist()
    assert uniforms(7, 5).tolist() != uniforms(8, 5).tolist()


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_deterministic_runs_can_sample_and_stay_deterministic(device):
    points = torch.tensor([0.3, 0.9], dtype=torch.float64, device=device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        choose(LOGITS.expand(2, -1).to(device), points, Sampling(n=1, top_p=0.9))
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True)
        choose(LOGITS.expand(2, -1).to(device), points, Sampling(n=1, top_p=0.9))
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
