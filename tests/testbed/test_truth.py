"""The algebra, on tables small enough to check by hand or by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from prefopt.testbed import truth


@pytest.fixture
def tables() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    log_ref = torch.randn(3, 40, generator=generator, dtype=torch.float64).log_softmax(-1)
    return log_ref, torch.randn(3, 40, generator=generator, dtype=torch.float64)


def test_optimum_of_two_outcomes_by_hand() -> None:
    # odds 1:3 under the reference; reward ln 2 at beta 1/2 multiplies the first by exp(2 ln 2) = 4: odds 4:3
    log_ref = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    reward = torch.tensor([[math.log(2), 0.0]], dtype=torch.float64)
    star = truth.optimum(log_ref, reward, 0.5).exp()
    torch.testing.assert_close(star, torch.tensor([[4 / 7, 3 / 7]], dtype=torch.float64), rtol=0, atol=1e-15)


def test_kl_and_entropy_by_hand_and_with_a_zero() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    q = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()
    assert truth.kl(p, q).item() == pytest.approx(math.log(2), abs=1e-15)
    assert truth.entropy(p).item() == pytest.approx(math.log(2), abs=1e-15)
    assert truth.kl(q, p).item() == math.inf


def test_win_probability_by_hand() -> None:
    reward = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)  # sigmoid(ln 3) = 3/4
    won = truth.win_probability(torch.tensor([[0.5, 0.5]], dtype=torch.float64).log(), truth.bradley_terry(reward))
    torch.testing.assert_close(won, torch.tensor([[0.375, 0.625]], dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_optimum_maximises_the_objective(tables: tuple[torch.Tensor, torch.Tensor], beta: float) -> None:
    log_ref, reward = tables
    star = truth.optimum(log_ref, reward, beta)

    def objective(table: torch.Tensor) -> torch.Tensor:
        return truth.expected(table, reward) - beta * truth.kl(table, log_ref)

    for seed in range(20):
        noise = torch.randn(star.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for size in (1e-3, 0.1, 2.0):
            near = (star + size * noise).log_softmax(-1)
            loss = objective(star) - objective(near)
            assert (loss > 0).all()
            torch.testing.assert_close(loss, beta * truth.kl(near, star), rtol=1e-8, atol=1e-13)  # exactly this much


def test_frontier_is_rising_and_concave_with_slope_beta(tables: tuple[torch.Tensor, torch.Tensor]) -> None:
    betas = torch.logspace(1.5, -1, 60, dtype=torch.float64)
    kls, rewards = truth.frontier(*tables, betas)
    steps, gains = kls.diff(), rewards.diff()
    assert (steps > 0).all()
    assert (gains > 0).all()
    slopes = gains / steps
    assert (slopes.diff() < 0).all()
    assert (slopes < betas[:-1]).all()  # a chord's slope lies between the betas of its ends
    assert (slopes > betas[1:]).all()


def test_no_policy_lies_above_the_frontier(tables: tuple[torch.Tensor, torch.Tensor]) -> None:
    log_ref, reward = tables
    for seed in range(20):
        noise = torch.randn(log_ref.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        policy = (log_ref + seed / 5 * reward + 0.5 * noise).log_softmax(-1)
        best = truth.frontier_reward(log_ref, reward, float(truth.kl(policy, log_ref).mean()))
        assert best > float(truth.expected(policy, reward).mean())
    star = truth.optimum(log_ref, reward, 0.7)
    best = truth.frontier_reward(log_ref, reward, float(truth.kl(star, log_ref).mean()))
    assert best == pytest.approx(float(truth.expected(star, reward).mean()), abs=1e-10)


# Games

ROCK_PAPER_SCISSORS = torch.tensor([[[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]], dtype=torch.float64)


def table(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_nash_of_rock_paper_scissors_is_uniform() -> None:
    policy = truth.nash(ROCK_PAPER_SCISSORS).exp()
    torch.testing.assert_close(policy, torch.full((1, 3), 1 / 3, dtype=torch.float64), rtol=0, atol=1e-9)


def test_nash_of_a_lopsided_circle_by_hand() -> None:
    # 1 beats 0 and 0 beats 2 by a, 2 beats 1 by b: each is chosen as often as the edge between the other two is sharp
    a, b = 0.1, 0.3
    game = torch.tensor([[[0.5, 0.5 - a, 0.5 + a], [0.5 + a, 0.5, 0.5 - b], [0.5 - a, 0.5 + b, 0.5]]]).double()
    expected = torch.tensor([[b, a, a]], dtype=torch.float64) / (2 * a + b)
    torch.testing.assert_close(truth.nash(game).exp(), expected, rtol=0, atol=1e-7)


def test_nash_of_a_ranking_is_its_best() -> None:
    policy = truth.nash(truth.bradley_terry(torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.float64))).exp()
    torch.testing.assert_close(policy, torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_nash_is_not_exploitable_and_all_else_is(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 30, 30, generator=generator, dtype=torch.float64)
    game = (logits - logits.mT).sigmoid()
    assert truth.exploitability(truth.nash(game), game).max() < 1e-7
    some = torch.randn(2, 30, generator=generator, dtype=torch.float64).log_softmax(-1)
    assert truth.exploitability(some, game).min() > 0.01


@pytest.mark.timeout(60)
def test_nash_is_found_where_the_simplex_method_runs_in_circles() -> None:
    # two even circles: many equilibria, and a simplex method that never gets away from a vertex
    rng = np.random.default_rng(6)
    rng.uniform()
    angle = 2 * np.pi * np.arange(64) / 64
    other = rng.permutation(angle)
    logits = np.sin(angle[:, None] - angle) + 0.5 * np.sin(other[:, None] - other)
    game = torch.from_numpy(logits).sigmoid()[None]
    assert truth.exploitability(truth.nash(game), game).max() < 1e-7


def test_exploitability_by_hand() -> None:
    pure, even, mostly = table(1, 0, 0), table(1 / 3, 1 / 3, 1 / 3), table(0.5, 0.25, 0.25)
    assert truth.exploitability(pure, ROCK_PAPER_SCISSORS).item() == pytest.approx(0.5)  # paper always wins
    assert truth.exploitability(even, ROCK_PAPER_SCISSORS).item() == pytest.approx(0.0, abs=1e-15)
    # paper wins against the half that is rock and ties with a quarter: 0.5 + 0.125
    assert truth.exploitability(mostly, ROCK_PAPER_SCISSORS).item() == pytest.approx(0.125)


def test_multiplicative_weights_by_hand() -> None:
    # against (1/2, 1/4, 1/4): rock wins 1/2, paper 5/8, scissors 3/8; eta 8 ln 2 doubles per eighth
    step = truth.multiplicative_weights(table(0.5, 0.25, 0.25), ROCK_PAPER_SCISSORS, 8 * math.log(2)).exp()
    torch.testing.assert_close(step, table(4 / 9, 4 / 9, 1 / 9).exp(), rtol=0, atol=1e-12)


def test_multiplicative_weights_stays_at_an_equilibrium() -> None:
    even = table(1 / 3, 1 / 3, 1 / 3)
    torch.testing.assert_close(truth.multiplicative_weights(even, ROCK_PAPER_SCISSORS, 5.0), even, rtol=0, atol=1e-15)


def test_total_variation_and_mixture_by_hand() -> None:
    assert truth.total_variation(table(0.5, 0.5, 0), table(0.25, 0.25, 0.5)).item() == pytest.approx(0.5)
    both = truth.mixture([table(1, 0, 0), table(0, 0.5, 0.5)]).exp()
    torch.testing.assert_close(both, table(0.5, 0.25, 0.25).exp(), rtol=0, atol=1e-15)


def test_best_of_n_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]], dtype=torch.float64)
    value = torch.tensor([[1.0, 3.0, 2.0], [0.0, 4.0, 4.0]], dtype=torch.float64)
    # of two draws of the first prompt: both 1: 1/4; at most 2: 9/16, so a 2: 5/16; a 3: 7/16
    # of the second: both 0: 1/25, else 4, which is two outcomes
    found = truth.best_of_n(p.log(), value, 2)
    assert found.tolist() == pytest.approx([1 / 4 + 2 * 5 / 16 + 3 * 7 / 16, 4 * 24 / 25], abs=1e-15)
    assert truth.best_of_n(p.log(), value, 1).tolist() == pytest.approx(truth.expected(p.log(), value).tolist())
    assert truth.best_of_n(p.log(), value, 10_000).tolist() == pytest.approx([3.0, 4.0])
