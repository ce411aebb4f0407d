"""The algebra of an enumerable world: optimum, equilibrium, divergences and frontier from tables of log-probabilities.

A table has a row per prompt and a column per outcome, shape `(P, K)`; each row of a log-probability table sums to one
in probability, all in float64. Nothing here knows a model or a tokenizer. Logs are natural: everything called KL or
entropy is in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
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


def best_of_n(log_p: torch.Tensor, value: torch.Tensor, n: int) -> torch.Tensor:
    """Expected highest value of `n` independent draws, of each prompt, `(P,)`.

    With values in rising order and F_k the probability of at most the k-th, `E[max] = sum_k v_k (F_k^n - F_{k-1}^n)`;
    where values are equal the sum of their summands does not depend on their order.

    Args: log_p, value: tables `(P, K)`. n: at least 1; 1 is `expected`.
    Reference: the maximum is the n-th order statistic; its distribution function is F^n.
    """
    values, order = value.sort(-1)
    reached = log_p.exp().gather(-1, order).cumsum(-1)
    reached = (reached / reached[:, -1:]) ** n  # probabilities sum to one but for rounding
    return (values * reached.diff(dim=-1, prepend=torch.zeros_like(reached[:, :1]))).sum(-1)


def bradley_terry(reward: torch.Tensor) -> torch.Tensor:
    """`P(y > y' | x) = sigmoid(r(x,y) - r(x,y'))`, row against column, `(P, K, K)`."""
    return torch.sigmoid(reward[:, :, None] - reward[:, None, :])


def win_probability(log_opponent: torch.Tensor, preference: torch.Tensor) -> torch.Tensor:
    """Probability that each outcome beats a draw from the opponent.

    `P(y > mu | x) = sum_y' mu(y'|x) P(y > y' | x)`

    Args: log_opponent: table `(P, K)`. preference: of row against column, `(P, K, K)`.
    Returns: probabilities, `(P, K)`.
    """
    return torch.einsum("pkl,pl->pk", preference, log_opponent.exp())


def exploitability(log_policy: torch.Tensor, preference: torch.Tensor) -> torch.Tensor:
    """How much more than half the time the best single answer to this policy wins, of each prompt, `(P,)`.

    `max_y P(y > pi) - 1/2`: 0 for a Nash equilibrium of the game in which two players answer and the preferred answer
    wins, above 0 for every other policy.
    """
    return win_probability(log_policy, preference).max(-1).values - 0.5


def nash(preference: torch.Tensor) -> torch.Tensor:
    """A policy that no answer beats more than half the time, of each prompt: the equilibrium, by linear programming.

    Minimises v over distributions pi with `P(y > pi) <= 1/2 + v` for all y. The game is symmetric, so its value is 0.
    Where there are several equilibria, this is one of them.

    Args: preference: of row against column, `P + P^T = 1`. Shape `(P, K, K)`.
    Returns: log-probabilities, `(P, K)`, -inf where it never answers.
    Raises: ArithmeticError when the program is not solved.
    """
    from scipy.optimize import linprog

    tables = []
    for table in (preference - 0.5).numpy():
        outcomes = len(table)
        # interior points: the simplex method runs in circles on some of these programs, whose vertices are degenerate
        found = linprog(
            [0.0] * outcomes + [1.0],
            A_ub=np.column_stack([table, np.full(outcomes, -1.0)]),
            b_ub=np.zeros(outcomes),
            A_eq=[[1.0] * outcomes + [0.0]],
            b_eq=[1.0],
            bounds=[(0, None)] * outcomes + [(None, None)],
            method="highs-ipm",
        )
        if not found.success:
            raise ArithmeticError(f"no equilibrium found: {found.message}")
        tables.append(found.x[:outcomes].clip(0))
    policy = torch.tensor(np.stack(tables))
    return (policy / policy.sum(-1, keepdim=True)).log()


def multiplicative_weights(log_policy: torch.Tensor, preference: torch.Tensor, eta: float) -> torch.Tensor:
    """One exact step of self-play: `pi'(y|x) ∝ pi(y|x) exp(eta P(y > pi | x))`, log-probabilities `(P, K)`.

    Reference: Wu et al., arXiv 2405.00675, equation 3.1; Freund and Schapire, Adaptive game playing using
        multiplicative weights, 1999.
    """
    return (log_policy + eta * win_probability(log_policy, preference)).log_softmax(-1)


def total_variation(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """`1/2 sum |p - q|` of each prompt, `(P,)`."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def mixture(log_policies: Sequence[torch.Tensor]) -> torch.Tensor:
    """The policy that first draws one of these, each as likely, and then answers as it does; all `(P, K)`."""
    return torch.stack([*log_policies]).logsumexp(0) - math.log(len(log_policies))


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
