"""A world of one-shot answers: 8 prompts with 512 responses each, a known reward, and all quantities exact."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from prefopt.testbed import truth
from prefopt.testbed.words import WordWorld
from prefopt.testbed.world import WorldSettings
from prefopt.types import Judgement

MOODS = ("calm", "busy")
TIMES = ("dawn", "noon", "dusk", "night")
PROMPTS = tuple(f"{mood}-{time}" for mood in MOODS for time in TIMES)
WORDS = ("tea", "bread", "walk", "book", "music", "work", "friends", "sleep")
LENGTH = 3  # words per response


@dataclass(frozen=True)
class BanditSettings(WorldSettings):
    """What makes one bandit world; another value of any field is another world with its own base policy."""

    reward_sd: float = 1.4
    """Standard deviation of the reward over the responses of a prompt; 1.4 makes KL(pi* || ref) about 1 at beta 1."""
    interaction: float = 0.5
    """Share of the reward's variance that is in pairs of neighbouring words, hence not additive over tokens."""
    base_sd: float = 1.0
    """Standard deviation of the base distribution's log-probabilities over the responses of a prompt."""


def smooth_table(rng: np.random.Generator, responses: np.ndarray, interaction: float) -> np.ndarray:
    """A random table over (prompt, response) with mean 0 and standard deviation 1 in each row, (P, K).

    Each row is the sum of one part of the prompt's mood and one of its time. A part adds a random number per position
    and word, and one per pair of neighbouring positions and their words: `interaction` is the latter's fraction of the
    variance. Parts that prompts share are what lets a model learn more than a lookup table would from as many pairs.
    """

    def part() -> np.ndarray:
        single, pair = rng.normal(size=(LENGTH, len(WORDS))), rng.normal(size=(LENGTH - 1, len(WORDS), len(WORDS)))
        pair -= pair.mean(1, keepdims=True)  # centred both ways: no sum over single words is left in it
        pair -= pair.mean(2, keepdims=True)
        additive = sum(single[i][responses[:, i]] for i in range(LENGTH))
        joint = sum(pair[i][responses[:, i], responses[:, i + 1]] for i in range(LENGTH - 1))
        return math.sqrt(1 - interaction) * additive / additive.std() + math.sqrt(interaction) * joint / joint.std()

    moods, times = [part() for _ in MOODS], [part() for _ in TIMES]
    table = np.stack([mood + time for mood in moods for time in times])
    table -= table.mean(-1, keepdims=True)
    return table / table.std(-1, keepdims=True)


class Bandit(WordWorld):
    """One bandit world: its base policy, its preference pairs, and the truth about any policy.

    The reward of "outside" is the lowest of its prompt, so nothing is gained by leaving the world.

    Args:
        settings: which world.
        cache_dir: folder of the cached base policies; None is the user's cache directory.
    """

    name = "bandit"
    goal = "optimum pi*"
    columns = {  # noqa: RUF012 - never changed
        "reward": ("reward", ".3f"),
        "KL(.||ref)": ("kl_policy_ref", ".3f"),
        "KL(pi*||.)": ("kl_star_policy", ".4f"),
        "KL relative to start": ("kl_star_ratio", ".1%"),
        "entropy": ("entropy", ".3f"),
        "win rate": ("win_rate", ".3f"),
        "frontier gap": ("frontier_gap", ".3f"),
        "outside": ("outside", ".3%"),
    }
    prompt_words, words, length = PROMPTS, WORDS, LENGTH

    def __init__(self, settings: BanditSettings | None = None, cache_dir: Path | str | None = None) -> None:
        settings = settings or BanditSettings()
        rng = np.random.default_rng(settings.seed)
        words = np.array(list(itertools.product(range(len(WORDS)), repeat=LENGTH)))  # (K, 3)
        super().__init__(settings, cache_dir, smooth_table(rng, words, interaction=0.3) * settings.base_sd)
        reward = smooth_table(rng, words, settings.interaction) * settings.reward_sd
        self.reward = torch.tensor(np.concatenate([reward, reward.min(-1, keepdims=True)], -1))  # (P, K + 1)

    @property
    def scores(self) -> torch.Tensor:
        return self.reward

    @functools.cached_property
    def preference(self) -> torch.Tensor:
        """Bradley-Terry of the reward, (P, 513, 513)."""
        return truth.bradley_terry(self.reward)

    def optimum(self, beta: float) -> torch.Tensor:
        """Log-probabilities of pi* at this beta, (P, 513)."""
        return truth.optimum(self.log_ref, self.reward, beta)

    def measures(self, log_policy: torch.Tensor, beta: float) -> dict[str, float]:
        """Everything worth knowing about a policy, averaged over prompts; KL and entropy in nats.

        Args: log_policy: table (P, 513). beta: the one whose optimum pi* the policy is compared with.
        Returns: `exact/...` -> value. `kl_a_b` is KL(a || b), `kl_star_ratio` is KL(pi* || policy) / KL(pi* || ref),
            `frontier_gap` how much more reward the best policy of the same KL(policy || ref) has, `outside` the
            probability of writing none of the 512 responses.
        """
        star, ref, reward = self.optimum(beta), self.log_ref, self.reward
        values = {
            "reward": truth.expected(log_policy, reward),
            "kl_policy_ref": truth.kl(log_policy, ref),
            "kl_ref_policy": truth.kl(ref, log_policy),
            "kl_star_policy": truth.kl(star, log_policy),
            "kl_policy_star": truth.kl(log_policy, star),
            "entropy": truth.entropy(log_policy),
            "win_rate": truth.expected(log_policy, self.win_prob),
            "outside": log_policy[:, -1].exp(),
            "optimal_reward": truth.expected(star, reward),
            "kl_star_ref": truth.kl(star, ref),
        }
        exact = {f"exact/{name}": float(value.mean()) for name, value in values.items()}
        exact["exact/kl_star_ratio"] = exact["exact/kl_star_policy"] / exact["exact/kl_star_ref"]
        best = truth.frontier_reward(ref, reward, exact["exact/kl_policy_ref"])
        exact["exact/frontier_gap"] = best - exact["exact/reward"]
        return exact

    def frontier(self, betas: Iterable[float] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The optimal reward-KL curve: KL(pi* || ref) and expected reward of pi*, one point per beta.

        Args: betas: in the order wanted; None: 200 values from 100 down to 0.02, from next to the reference to next to
            the best response.
        """
        grid = np.logspace(2, math.log10(0.02), 200) if betas is None else np.array([*betas], dtype=np.float64)
        kls, rewards = truth.frontier(self.log_ref, self.reward, torch.from_numpy(grid))
        return kls.numpy(), rewards.numpy()

    def _judgement(self, prompt: int, outcomes: Sequence[int]) -> Judgement:
        return Judgement(scores=tuple(self.reward[prompt, outcomes].tolist()))
