"""A world without a best answer: 2 prompts with 64 responses each, of which every one is beaten by others.

Preferences run in circles, so no reward explains them. What self-play can reach is an equilibrium: a distribution over
responses that no response beats more than half the time. How far a policy is from that is computed exactly.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from prefopt.errors import ConfigError
from prefopt.testbed import truth
from prefopt.testbed.words import WordWorld
from prefopt.testbed.world import WorldSettings
from prefopt.types import Judgement

PROMPTS = ("day", "night")
WORDS = ("rock", "paper", "scissors", "well", "fire", "water", "wind", "snake")
LENGTH = 2  # words per response


@dataclass(frozen=True)
class CyclicSettings(WorldSettings):
    """What makes one cyclic world; another value of any field is another world with its own base policy."""

    base_steps: int = 200
    """Optimizer steps of the base policy's maximum-likelihood training."""
    logit_sd: float = 1.5
    """Root mean square of the preference logits of two different responses; 1.5: the better one wins 4 times in 5."""
    transitive: float = 0.0
    """Share of the logits' variance that is a difference of two scores, such as a reward would give; 0: none of it."""
    second: float = 0.1
    """Fraction of the rest that is a second circle, with the responses in another order."""
    lean: float = 2.0
    """How much the base policy leans to one side of the first circle: half the log-ratio of its two ends."""
    base_sd: float = 0.3
    """Standard deviation of what else distinguishes the base distribution's log-probabilities."""


def circle(places: np.ndarray) -> np.ndarray:
    """Preference logits of responses that lie evenly on a circle: each is beaten by those up to half a turn ahead.

    `L(y, y') = sin(angle of y - angle of y')`, scaled to a root mean square of 1 over pairs of different responses.
    Every row sums to 0: on average over all opponents no response is better than another.

    Args: places: a permutation of 0..K-1, `(K,)`. Returns: skew-symmetric, `(K, K)`.
    """
    angle = 2 * np.pi * places / len(places)
    return _unit(np.sin(angle[:, None] - angle[None, :]))


def _unit(logits: np.ndarray) -> np.ndarray:
    return logits / math.sqrt((logits**2).sum() / (len(logits) * (len(logits) - 1)))


class Cyclic(WordWorld):
    """One cyclic world: its base policy, its preferences, and the truth about any policy.

    "Outside" loses to every response. The preference logits are skew-symmetric: a transitive part, the differences of
    a random score per response, and a cyclic part whose rows sum to 0. The two are orthogonal, and every such table is
    the sum of two such parts in one way only, so `transitive` is the fraction of a ranking in it.

    Args:
        settings: which world.
        cache_dir: folder of the cached base policies; None is the user's cache directory.
    Raises: ConfigError for a fraction that is not between 0 and 1.
    """

    name = "cyclic"
    goal = "equilibrium"
    columns = {  # noqa: RUF012 - never changed
        "exploitability": ("exploitability", ".3f"),
        "KL(.||ref)": ("kl_policy_ref", ".3f"),
        "entropy": ("entropy", ".3f"),
        "win rate": ("win_rate", ".3f"),
        "outside": ("outside", ".1e"),
    }
    prompt_words, words, length = PROMPTS, WORDS, LENGTH

    def __init__(self, settings: CyclicSettings | None = None, cache_dir: Path | str | None = None) -> None:
        settings = settings or CyclicSettings()
        for key in ("transitive", "second"):
            if not 0 <= getattr(settings, key) <= 1:
                raise ConfigError(f"{key}: found {getattr(settings, key)!r}, expected a fraction from 0 to 1")
        rng = np.random.default_rng(settings.seed)
        first, second = np.array(list(itertools.product(range(len(WORDS)), repeat=LENGTH))).T  # words, (K,) each
        logits, base = [], []
        for _ in PROMPTS:
            # the first word is an eighth of the circle, the second one a place within it
            places = len(WORDS) * rng.permutation(len(WORDS))[first] + rng.permutation(len(WORDS))[second]
            rounds = math.sqrt(1 - settings.second) * circle(places)
            rounds += math.sqrt(settings.second) * circle(rng.permutation(len(places)))
            score = rng.normal(size=len(places))
            table = math.sqrt(1 - settings.transitive) * _unit(rounds)
            table += math.sqrt(settings.transitive) * _unit(score[:, None] - score[None, :])
            logits.append(settings.logit_sd * table)
            side = np.cos(2 * np.pi * (places / len(places) - rng.random()))
            base.append(settings.lean * side + settings.base_sd * rng.normal(size=len(places)))
        super().__init__(settings, cache_dir, np.stack(base))
        self.logits = torch.tensor(np.stack(logits))  # (P, K, K), row against column

    @functools.cached_property
    def preference(self) -> torch.Tensor:
        """Sigmoid of the logits; "outside" loses to all others, (P, 65, 65)."""
        prompts, responses = self.logits.shape[:2]
        table = torch.full((prompts, responses + 1, responses + 1), 0.5, dtype=torch.float64)
        table[:, :-1, :-1] = self.logits.sigmoid()
        table[:, :-1, -1], table[:, -1, :-1] = 1.0, 0.0
        return table

    @functools.cached_property
    def equilibrium(self) -> torch.Tensor:
        """Log-probabilities of a Nash equilibrium, (P, 65), -inf where the probability is 0; there may be others."""
        return truth.nash(self.preference)

    def optimum(self, beta: float) -> torch.Tensor:
        """The equilibrium, whatever beta is."""
        return self.equilibrium

    def measures(self, log_policy: torch.Tensor, beta: float) -> dict[str, float]:
        """Everything worth knowing about a policy, averaged over prompts; KL and entropy in nats.

        Args: log_policy: table (P, 65). beta: not read, there is no optimum that depends on it.
        Returns: `exact/...` -> value. `exploitability` is how much more than half the time the best single response to
            the policy wins, `win_rate` how often the policy wins against the reference, `outside` the probability of
            writing none of the 64 responses.
        """
        values = {
            "exploitability": truth.exploitability(log_policy, self.preference),
            "kl_policy_ref": truth.kl(log_policy, self.log_ref),
            "kl_ref_policy": truth.kl(self.log_ref, log_policy),
            "entropy": truth.entropy(log_policy),
            "win_rate": truth.expected(log_policy, self.win_prob),
            "outside": log_policy[:, -1].exp(),
        }
        return {f"exact/{name}": float(value.mean()) for name, value in values.items()}

    def _judgement(self, prompt: int, outcomes: Sequence[int]) -> Judgement:
        index = torch.tensor(list(outcomes), dtype=torch.long)
        table = self.preference[prompt][index][:, index]
        return Judgement(probs=tuple(tuple(row) for row in table.tolist()))
