"""One token per row from its logits and its own uniform number: a function of the row alone, whatever is beside it."""

from __future__ import annotations

import numpy as np
import torch

from prefopt.generation.base import Sampling


def uniforms(seed: int, count: int) -> np.ndarray:
    """The numbers in [0, 1) from which the tokens of a completion are drawn, in order; a longer list begins alike."""
    return np.random.default_rng(seed).random(count)


def choose(logits: torch.Tensor, points: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The token whose stretch of the cumulative distribution holds each row's point; at temperature 0 the likeliest.

    The temperature comes first, then `top_k`, then `top_p` of what is left, as transformers and vLLM have it.

    Args: logits: shape `(B, V)`, float32 or float64. points: in [0, 1), float64. Shape `(B,)`.
    Returns: token ids, shape `(B,)`.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores = logits / sampling.temperature
    if not sampling.top_k and sampling.top_p >= 1:
        return _invert(scores.softmax(-1), points)
    scores, ids = scores.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        scores, ids = scores[:, : sampling.top_k], ids[:, : sampling.top_k]
    weights = scores.softmax(-1)
    if sampling.top_p < 1:
        before = _running_sum(weights) - weights
        weights = weights.masked_fill(before >= sampling.top_p, 0.0)
    return ids.gather(-1, _invert(weights, points)[:, None])[:, 0]


def _invert(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The first index at which the running sum of `weights` (B, K) exceeds that share of the total, (B,)."""
    running = _running_sum(weights)
    total = running[:, -1:]
    # below the total even where the product is rounded up to it
    share = torch.minimum(points[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(running, share, right=True)[:, 0].clamp(max=weights.shape[-1] - 1)  # NaN finds none


def _running_sum(weights: torch.Tensor) -> torch.Tensor:
    """In float64, (B, K).

    CUDA's may differ in its last bit from call to call, so deterministic runs forbid it. Here it is allowed: in
    float64, that bit decides one token in 1e15.
    """
    strict, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(False)
    try:
        return weights.cumsum(-1, dtype=torch.float64)
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
