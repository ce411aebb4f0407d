"""The cyclic world: its preferences have no ranking, its verdicts are exact, and so are its figures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.errors import ConfigError, RoundError
from prefopt.ranking import order_scores, win_probabilities
from prefopt.testbed import build_world, truth
from prefopt.testbed.cyclic import PROMPTS, Cyclic, CyclicSettings, circle
from prefopt.types import Question, Response


@pytest.fixture(scope="module")
def world(cache: Path) -> Cyclic:
    world = build_world("cyclic", cache_dir=cache)
    assert isinstance(world, Cyclic)
    return world


@pytest.fixture(scope="module")
def policy(world: Cyclic) -> torch.nn.Module:
    """A policy that is not the base policy, with more mass outside the world."""
    lm = AutoModelForCausalLM.from_pretrained(world.base_model_path, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.5 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return lm


# Preferences


def test_circle_of_four_by_hand() -> None:
    # a quarter turn ahead wins, half a turn ahead draws; 8 of 12 pairs are 1 or -1
    logits = circle(np.array([0, 2, 1, 3])) / math.sqrt(12 / 8)
    expected = np.array([[0, 0, -1, 1], [0, 0, 1, -1], [1, -1, 0, 0], [-1, 1, 0, 0]])
    np.testing.assert_allclose(logits, expected, atol=1e-12)


def test_world_is_as_large_and_as_exploitable_as_promised(world: Cyclic) -> None:
    assert len(world.response_ids) >= 64
    assert world.preference.shape == (len(PROMPTS), 65, 65)
    assert sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(world.base_model_path).parameters()) < 1_000_000
    start = truth.exploitability(world.log_ref, world.preference)
    assert start.min() > 0.15
    assert world.log_ref[:, -1].exp().max() < 1e-3


@pytest.mark.parametrize("seed", range(1, 6))
def test_every_seed_starts_exploitable(seed: int) -> None:
    world = Cyclic(CyclicSettings(seed=seed))  # nothing is trained: the base policy's target stands in for it
    inside = world.preference[:, :-1, :-1]
    assert truth.exploitability(world.base_target, inside).min() > 0.15


@pytest.mark.parametrize("transitive", [0.0, 0.3, 1.0])
def test_logits_are_skew_symmetric_and_a_ranking_as_far_as_they_were_told(transitive: float) -> None:
    logits = Cyclic(CyclicSettings(seed=3, transitive=transitive)).logits
    torch.testing.assert_close(logits, -logits.mT, rtol=0, atol=1e-12)
    score = logits.mean(-1)  # the differences of these numbers are the best that any reward can say of the logits
    ranking = score[:, :, None] - score[:, None, :]
    share = (ranking**2).sum((-1, -2)) / (logits**2).sum((-1, -2))
    torch.testing.assert_close(share, torch.full_like(share, transitive), rtol=0, atol=1e-9)
    off_diagonal = (logits**2).sum((-1, -2)) / (64 * 63)
    torch.testing.assert_close(off_diagonal.sqrt(), torch.full_like(share, 1.5), rtol=0, atol=0.15)


def test_every_response_is_beaten_by_another_where_there_is_no_ranking(world: Cyclic) -> None:
    inside = world.preference[:, :-1, :-1]
    assert inside.min(-1).values.max() < 0.3
    assert (inside.mean(-1) - 0.5).abs().max() < 0.02  # and over all opponents wins half the time


def test_outside_loses_to_everything(world: Cyclic) -> None:
    assert (world.preference[:, -1, :-1] == 0).all()
    assert (world.preference[:, :-1, -1] == 1).all()
    torch.testing.assert_close(
        world.preference + world.preference.mT, torch.ones(len(PROMPTS), 65, 65).double(), rtol=0, atol=1e-15
    )


def test_share_beyond_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"transitive: found 1\.5, expected a fraction from 0 to 1"):
        Cyclic(CyclicSettings(transitive=1.5))


# Figures


def test_equilibrium_is_not_exploitable(world: Cyclic) -> None:
    at_it = world.measures(world.optimum(1.0), 1.0)
    assert at_it["exact/exploitability"] == pytest.approx(0, abs=1e-7)
    assert at_it["exact/win_rate"] >= 0.5
    assert at_it["exact/outside"] == pytest.approx(0, abs=1e-9)


def test_log_probs_equal_those_of_single_rows(world: Cyclic, policy: torch.nn.Module) -> None:
    table = world.log_probs(policy)
    torch.testing.assert_close(table.exp().sum(-1), torch.ones(len(PROMPTS)).double(), rtol=0, atol=1e-12)
    for x, y in [(0, 0), (1, 7), (0, 8), (1, 63)]:
        prompt, response = world.prompt_ids[x], world.response_ids[y]
        with torch.no_grad():
            logps = policy(input_ids=torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
        expected = sum(float(logps[len(prompt) - 1 + i, token]) for i, token in enumerate(response))
        assert float(table[x, y]) == pytest.approx(expected, abs=2e-5)


def test_evaluate_says_what_sums_over_outcomes_say(world: Cyclic, policy: torch.nn.Module) -> None:
    values, mine, ref = world.evaluate(policy, 1.0), world.log_probs(policy).exp(), world.log_ref.exp()
    best = [max(float((world.preference[x, y] * mine[x]).sum()) for y in range(65)) for x in range(len(PROMPTS))]
    wins = [float(mine[x] @ world.preference[x] @ ref[x]) for x in range(len(PROMPTS))]
    expected = {
        "exact/exploitability": np.mean(best) - 0.5,
        "exact/win_rate": np.mean(wins),
        "exact/kl_policy_ref": float((mine * (mine / ref).log()).sum(-1).mean()),
        "exact/entropy": float(-(mine * mine.log()).sum(-1).mean()),
        "exact/outside": float(mine[:, -1].mean()),
    }
    assert values == pytest.approx(values | expected, abs=1e-9)


# What it hands out


def test_pairs_are_won_as_often_as_preferred(world: Cyclic) -> None:
    n = 100_000
    prompt, chosen, rejected, probability = world.draw(n, np.random.default_rng(1))
    first, second = np.minimum(chosen, rejected), np.maximum(chosen, rejected)
    expected = world.preference.numpy()[prompt, first, second]
    np.testing.assert_allclose(probability, np.where(chosen == first, expected, 1 - expected), atol=1e-15)
    for low in np.arange(0, 1, 0.2):
        mine = (expected >= low) & (expected < low + 0.2)
        mean, found, number = expected[mine].mean(), (chosen == first)[mine].mean(), mine.sum()
        assert abs(found - mean) < 5 * np.sqrt(mean * (1 - mean) / number)


def test_columns_are_exact_probabilities(world: Cyclic) -> None:
    for pair in world.file_pairs(10, seed=0):
        x = world.prompt_ids.index(pair.prompt_ids)
        c, r = world.response_ids.index(pair.chosen_ids), world.response_ids.index(pair.rejected_ids or [])
        table, ref = world.preference[x], world.log_ref[x].exp()
        assert pair.columns == pytest.approx(
            {
                "chosen_win_prob": float(table[c] @ ref),
                "rejected_win_prob": float(table[r] @ ref),
                "pair_win_prob": float(table[c, r]),
            },
            abs=1e-12,
        )


def test_prompts_are_an_endless_list_with_a_key_each(world: Cyclic) -> None:
    few, many = world.prompts(5, seed=1), world.prompts(9, seed=1)
    assert many[:5] == few
    assert [prompt.prompt for prompt in many] == [*PROMPTS * 4, PROMPTS[0]]
    assert len({prompt.key for prompt in many} | {prompt.key for prompt in world.prompts(9, seed=2)}) == 18
    tokenizer = AutoTokenizer.from_pretrained(world.base_model_path)
    assert all(list(prompt.ids) == tokenizer(prompt.prompt)["input_ids"] for prompt in many)


def test_judge_knows_the_preferences(world: Cyclic) -> None:
    texts = [world.response_texts[3], f"  {world.response_texts[60]}\n", "rock", "", world.response_texts[3]]
    question = Question(PROMPTS[1], tuple(Response(text) for text in texts))
    (judgement,) = world.judge().judge([question])
    outcomes = [3, 60, 64, 64, 3]
    expected = world.preference[1].numpy()[np.ix_(outcomes, outcomes)]
    np.testing.assert_allclose(win_probabilities(judgement), expected, rtol=0, atol=1e-15)


def test_judge_of_the_bandit_is_bradley_terry_of_its_reward(cache: Path) -> None:
    bandit = build_world("bandit", cache_dir=cache)
    question = Question("calm-noon", (Response(bandit.response_texts[100]), Response("tea"), Response("no such words")))
    (judgement,) = bandit.judge().judge([question])
    outcomes = [100, 512, 512]
    expected = bandit.preference[1].numpy()[np.ix_(outcomes, outcomes)]
    np.testing.assert_allclose(win_probabilities(judgement), expected, atol=1e-12)
    assert order_scores(judgement)[0] == pytest.approx(float(bandit.reward[1, 100]))  # type: ignore[attr-defined]


def test_judge_refuses_a_prompt_of_another_world(world: Cyclic) -> None:
    with pytest.raises(RoundError, match="found prompt 'calm-dawn', expected one of the testbed's"):
        world.judge().judge([Question("calm-dawn", (Response("rock paper"),))])
