"""The algebra of an enumerable world: optimum, divergences and frontier from tables of log-probabilities, float64.

A table has a row per prompt and a column per outcome, shape `(P, K)`; each row of a log-probability table sums to one
in probability. Nothing here knows a model or a tokenizer. Logs are natural: everything called KL or entropy is in nats.
"""

from __future__ import annotations

import math

import torch


def optimum(log_ref: torch.Tensor, reward: torch.Tensor, beta: float) -> torch.Tensor:
    """Log-probabilities of the policy that maximises `E_pi[r] - beta KL(pi || ref)`.

    `pi*(y|x) = ref(y|x) exp(r(x,y) / beta) / Z(x)`

    Args: log_ref, reward: tables `(P, K)`. beta: weight of the KL, above 0.
    Returns: log-probabilities, `(P, K)`.
    """
    return (log_ref + reward / beta).log_softmax(-1)


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """`KL(p || q) = sum p (log p - log q)` of each prompt, `(P,)`. An outcome of probability 0 under p adds nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def entropy(log_p: torch.Tensor) -> torch.Tensor:
    """`-sum p log p` of each prompt, `(P,)`."""
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(-1)


def expected(log_p: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`sum p v` of each prompt, `(P,)`."""
    return (log_p.exp() * value).sum(-1)


def win_probability(log_opponent: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry probability that each outcome beats a draw from the opponent.

    `P(y > mu | x) = sum_y' mu(y'|x) sigmoid(r(x,y) - r(x,y'))`

    Returns: probabilities, `(P, K)`.
    """
    beats = torch.sigmoid(reward[:, :, None] - reward[:, None, :])  # (P, K, K)
    return torch.einsum("pkl,pl->pk", beats, log_opponent.exp())


def frontier(log_ref: torch.Tensor, reward: torch.Tensor, betas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best expected reward at each KL: no policy lies above this curve.

    The average over prompts of the optimum at one common beta is the optimum of the averages, because beta is the
    multiplier of the one constraint on the average KL. The curve's slope at a point is that point's beta.

    Args: log_ref, reward: tables `(P, K)`. betas: `(N,)`.
    Returns: KL(pi* || ref) and expected reward of pi* at each beta, averaged over prompts, each `(N,)`.
    """
    tables = [optimum(log_ref, reward, float(beta)) for beta in betas]
    kls = torch.stack([kl(table, log_ref).mean() for table in tables])
    rewards = torch.stack([expected(table, reward).mean() for table in tables])
    return kls, rewards


def frontier_reward(log_ref: torch.Tensor, reward: torch.Tensor, at_kl: float) -> float:
    """The best expected reward, averaged over prompts, of any policy with `KL(pi || ref) <= at_kl`."""
    low, high = -12.0, 12.0  # log beta: KL falls as beta grows
    for _ in range(60):
        middle = (low + high) / 2
        table = optimum(log_ref, reward, math.exp(middle))
        low, high = (middle, high) if float(kl(table, log_ref).mean()) > at_kl else (low, middle)
    return float(expected(optimum(log_ref, reward, math.exp(high)), reward).mean())
