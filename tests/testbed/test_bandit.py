"""The bandit world against brute force: every exact value is computed here a second time, another way."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.data.encoder import Encoder
from prefopt.errors import ConfigError
from prefopt.testbed import build_world, truth
from prefopt.testbed.bandit import LENGTH, PROMPTS, WORDS, Bandit, BanditSettings
from prefopt.types import PairRow


def test_world_is_as_large_as_promised(world: Bandit) -> None:
    assert len(PROMPTS) >= 8
    assert len(world.response_ids) >= 512
    assert world.reward.shape == world.log_ref.shape == (len(PROMPTS), len(world.response_ids) + 1)
    assert world.reward.dtype == world.log_ref.dtype == torch.float64


def test_unknown_world_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'bandit'"):
        build_world("bandti")


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, prefopt.testbed; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Base policy


def test_base_policy_opens_as_any_model_and_is_small(world: Bandit) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.base_model_path)
    tokenizer = AutoTokenizer.from_pretrained(world.base_model_path)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer.get_vocab() == world.tokenizer.get_vocab()
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert tokenizer("calm-dawn tea bread walk")["input_ids"] == world.prompt_ids[0] + world.response_ids[10][:-1]


def test_base_policy_has_learned_its_distribution(world: Bandit) -> None:
    assert world.log_ref[:, -1].exp().max() < 1e-3  # outside
    missed = truth.kl(world.base_target, world.log_ref[:, :-1]).mean()
    assert missed < 0.02
    uniform = torch.full_like(world.base_target, -np.log(world.base_target.shape[-1]))
    assert truth.kl(world.base_target, uniform).mean() > 0.2  # it is not uniform


def test_base_policy_is_deterministic_and_leaves_no_trace(tmp_path: Path) -> None:
    settings = BanditSettings(base_steps=3)
    torch.manual_seed(1)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    one = Bandit(settings, tmp_path / "a").base_model_path
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    torch.manual_seed(2)
    two = Bandit(settings, tmp_path / "b").base_model_path
    assert one.name == two.name
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_another_world_has_another_key_and_fingerprint(tmp_path: Path) -> None:
    settings = BanditSettings(base_steps=2)
    one, two = Bandit(settings, tmp_path), Bandit(replace(settings, seed=1), tmp_path)
    assert one.base_model_path != two.base_model_path
    assert one.fingerprint != two.fingerprint
    assert one.stream(8, 0).fingerprint != one.stream(8, 1).fingerprint


def test_second_build_does_not_train(world: Bandit, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bandit, "_train_base", lambda *_: pytest.fail("trained again"))
    again = build_world("bandit", cache_dir=cache)
    assert again.base_model_path == world.base_model_path
    assert again.fingerprint == world.fingerprint
    assert torch.equal(again.log_ref, world.log_ref)


# Reward and optimum


def test_reward_is_not_additive_over_tokens(world: Bandit) -> None:
    # the best additive fit, a number per position and word, leaves a large share of the variance unexplained
    words = np.array([[i // 64, i // 8 % 8, i % 8] for i in range(512)])
    design = np.concatenate([np.eye(len(WORDS))[words[:, i]] for i in range(LENGTH)], 1)
    for row in world.reward[:, :-1].numpy():
        fit = design @ np.linalg.lstsq(design, row, rcond=None)[0]
        assert 0.25 < ((row - fit) ** 2).mean() / row.var() < 0.75


@pytest.mark.parametrize("seed", range(8))
def test_optimum_lies_between_half_a_nat_and_two_from_the_base_distribution(seed: int) -> None:
    world = Bandit(BanditSettings(seed=seed))  # nothing is trained: the base policy's target stands in for it
    star = truth.optimum(world.base_target, world.reward[:, :-1], 1.0)
    assert 0.5 < truth.kl(star, world.base_target).mean() < 2


def test_optimum_lies_between_half_a_nat_and_two_from_the_reference(world: Bandit) -> None:
    assert 0.5 < truth.kl(world.optimum(1.0), world.log_ref).mean() < 2


def test_outside_has_the_lowest_reward_of_its_prompt(world: Bandit) -> None:
    assert torch.equal(world.reward[:, -1], world.reward[:, :-1].min(-1).values)


def test_frontier_starts_at_the_reference_and_passes_the_optimum(world: Bandit) -> None:
    kls, rewards = world.frontier()
    assert (np.diff(kls) > 0).all()
    assert (np.diff(rewards) > 0).all()
    assert kls[0] < 1e-3
    at = world.frontier([1.0])
    star = world.measures(world.optimum(1.0), 1.0)
    assert at[0][0] == pytest.approx(star["exact/kl_policy_ref"], abs=1e-12)
    assert at[1][0] == pytest.approx(star["exact/optimal_reward"], abs=1e-12)


# Evaluator


def test_outcomes_have_total_probability_one(world: Bandit, other: torch.nn.Module) -> None:
    for table in (world.log_ref, world.log_probs(other)):
        torch.testing.assert_close(table.exp().sum(-1), torch.ones(len(PROMPTS)).double(), rtol=0, atol=1e-12)
    assert world.log_probs(other)[:, -1].exp().min() > 1e-5  # so that the sum above has something to say


def test_log_probs_equal_those_of_single_rows(world: Bandit, other: torch.nn.Module) -> None:
    table = world.log_probs(other)
    other = other.double().eval()
    for x, y in [(0, 0), (1, 7), (3, 100), (5, 64), (6, 511), (7, 333)]:
        prompt, response = world.prompt_ids[x], world.response_ids[y]
        with torch.no_grad():
            logps = other(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        expected = sum(float(logps[len(prompt) - 1 + i, token]) for i, token in enumerate(response))
        assert float(table[x, y]) == pytest.approx(expected, abs=2e-5)  # float32 logits against float64
        assert float(world.log_probs(other)[x, y]) == pytest.approx(expected, abs=1e-10)


def test_evaluate_says_what_sums_over_outcomes_say(world: Bandit, other: torch.nn.Module) -> None:
    beta, values = 0.7, world.evaluate(other, 0.7)
    policy, ref, reward = world.log_probs(other).exp(), world.log_ref.exp(), world.reward
    star = ref * torch.exp(reward / beta)
    star = star / star.sum(-1, keepdim=True)

    def kl(p: torch.Tensor, q: torch.Tensor) -> float:
        return float((p * (p / q).log()).sum(-1).mean())

    expected = {
        "exact/reward": float((policy * reward).sum(-1).mean()),
        "exact/kl_policy_ref": kl(policy, ref),
        "exact/kl_ref_policy": kl(ref, policy),
        "exact/kl_star_policy": kl(star, policy),
        "exact/kl_policy_star": kl(policy, star),
        "exact/kl_star_ref": kl(star, ref),
        "exact/kl_star_ratio": kl(star, policy) / kl(star, ref),
        "exact/entropy": float(-(policy * policy.log()).sum(-1).mean()),
        "exact/outside": float(policy[:, -1].mean()),
        "exact/optimal_reward": float((star * reward).sum(-1).mean()),
    }
    assert values == pytest.approx(values | expected, abs=1e-9)
    assert values["exact/frontier_gap"] > 0


def test_evaluate_at_the_ends_of_the_path(world: Bandit, base: torch.nn.Module) -> None:
    start = world.evaluate(base, 1.0)
    assert start["exact/kl_policy_ref"] == pytest.approx(0, abs=1e-12)
    assert start["exact/kl_star_ratio"] == pytest.approx(1, abs=1e-12)
    assert start["exact/win_rate"] == pytest.approx(0.5, abs=1e-12)
    end = world.measures(world.optimum(1.0), 1.0)
    assert end["exact/kl_star_policy"] == pytest.approx(0, abs=1e-12)
    assert end["exact/reward"] == pytest.approx(start["exact/optimal_reward"], abs=1e-12)
    assert end["exact/frontier_gap"] == pytest.approx(0, abs=1e-8)


def test_evaluate_leaves_the_model_as_it_was(world: Bandit, base: torch.nn.Module) -> None:
    base.train()
    base.model.layers[0].eval()
    modes = [module.training for module in base.modules()]
    world.evaluate(base, 1.0)
    assert [module.training for module in base.modules()] == modes
    assert all(parameter.grad is None for parameter in base.parameters())


# Pairs


def test_pairs_are_drawn_from_the_reference(world: Bandit) -> None:
    n = 200_000
    prompt, chosen, rejected, _ = world.draw(n, np.random.default_rng(0))
    assert (chosen != rejected).all()
    np.testing.assert_allclose(np.bincount(prompt) / n, 1 / len(PROMPTS), atol=5 * np.sqrt(1 / 8 * 7 / 8 / n))
    ref = world.log_ref[:, :-1].softmax(-1).numpy()
    distinct = ref * (1 - ref)  # either side of a pair of two different draws
    distinct /= distinct.sum(-1, keepdims=True)
    for x in range(len(PROMPTS)):
        both = np.concatenate([chosen[prompt == x], rejected[prompt == x]])
        expected = distinct[x] * len(both)
        chi_square = ((np.bincount(both, minlength=512) - expected) ** 2 / expected).sum()
        assert abs(chi_square - 511) < 6 * np.sqrt(2 * 511)


def test_preferences_follow_bradley_terry(world: Bandit) -> None:
    prompt, chosen, rejected, probability = world.draw(200_000, np.random.default_rng(1))
    gap = world.reward.numpy()[prompt, chosen] - world.reward.numpy()[prompt, rejected]
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(-gap)), atol=1e-12)
    for low in np.arange(0, 4, 0.5):  # of pairs whose rewards differ by d, sigmoid(d) are won by the better one
        mine = (np.abs(gap) >= low) & (np.abs(gap) < low + 0.5)
        expected, found, n = (1 / (1 + np.exp(-np.abs(gap[mine])))).mean(), (gap[mine] > 0).mean(), mine.sum()
        assert abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / n)


def test_columns_are_exact_probabilities(world: Bandit) -> None:
    ref, reward = world.log_ref.exp(), world.reward
    for pair in world.file_pairs(20, seed=0):
        x = world.prompt_ids.index(pair.prompt_ids)
        assert pair.rejected_ids is not None
        c, r = world.response_ids.index(pair.chosen_ids), world.response_ids.index(pair.rejected_ids)
        assert set(pair.columns) == {"chosen_win_prob", "rejected_win_prob", "pair_win_prob"} | {
            "chosen_score",
            "rejected_score",
        }
        assert (pair.columns["chosen_score"], pair.columns["rejected_score"]) == (reward[x, c], reward[x, r])
        for name, y in (("chosen_win_prob", c), ("rejected_win_prob", r)):
            expected = float((ref[x] * torch.sigmoid(reward[x, y] - reward[x])).sum())
            assert pair.columns[name] == pytest.approx(expected, abs=1e-12)
        assert pair.columns["pair_win_prob"] == pytest.approx(
            float(torch.sigmoid(reward[x, c] - reward[x, r])), abs=1e-12
        )


def test_stream_gives_each_step_its_pairs_whatever_the_order(world: Bandit) -> None:
    forward, backward = world.stream(16, seed=3), world.stream(16, seed=3)
    asked = {step: backward.global_batch(step) for step in (5, 0, 3, 1, 5)}
    for step in range(6):
        batch = forward.global_batch(step)
        assert len(batch) == 16
        if step in asked:
            assert batch == asked[step]
    assert forward.global_batch(0) != forward.global_batch(1)
    assert forward.global_batch(0) != world.stream(16, seed=4).global_batch(0)
    assert forward.steps_per_epoch is None


def test_file_pairs_of_another_seed_are_others(world: Bandit) -> None:
    assert world.file_pairs(50, seed=0) == world.file_pairs(50, seed=0)
    assert world.file_pairs(50, seed=0) != world.file_pairs(50, seed=1)


def test_jsonl_rows_are_tokenised_to_the_same_ids(world: Bandit, tmp_path: Path) -> None:
    world.write_jsonl(tmp_path / "pairs.jsonl", 40, seed=2)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    encoder = Encoder(AutoTokenizer.from_pretrained(world.base_model_path), max_length=64)
    for row, pair in zip(rows, world.file_pairs(40, seed=2), strict=True):
        read = encoder.pair(PairRow(row["prompt"], row["chosen"], row["rejected"], {}, "test:1"))
        for field in ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask"):
            assert getattr(read, field) == getattr(pair, field)
        assert {key: row[key] for key in pair.columns} == pair.columns
