"""A language model's own output head, changed in place so that it can return token statistics instead of logits.

The statistics are computed inside the call of the head module, because DDP, DeepSpeed and FSDP attach their hooks
there: computed outside its module, a head might read a sharded weight or miss the gradient all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn

from prefopt.errors import TrainError
from prefopt.kernels.token_stats import CACHE_MB, ORDER, token_stats


@dataclass(frozen=True, eq=False)
class HeadRequest:
    """The statistics to compute from the hidden states of a call of the head; see `token_stats` for the members.

    Pass it by keyword: DeepSpeed wraps tensors among a module's positional inputs, and a sharded reference weight would
    lose its identity.
    """

    labels: torch.Tensor  # (N,)
    want: tuple[str, ...] = ()  # statistics in addition to the log-probability
    ref_hidden: torch.Tensor | None = None  # (N, H of the reference)
    ref_weight: torch.Tensor | None = None  # (V, H of the reference)
    ref_bias: torch.Tensor | None = None  # (V,)
    # z = softcap tanh(scale (h W^T + b) / softcap), of the reference and of the policy
    ref_scale: float = 1.0
    ref_softcap: float | None = None
    scale: float = 1.0
    softcap: float | None = None
    # memory: logits of one tile, (token_tile, vocab_tile), and of the tiles that are cached for the backward pass
    token_tile: int | None = None
    vocab_tile: int | None = None
    cache_mb: int = CACHE_MB


class StatsLinear(nn.Linear):
    """An nn.Linear that returns token statistics when it is called with a request, and logits without one."""

    def forward(self, x: torch.Tensor, request: HeadRequest | None = None) -> Any:
        """Logits without a request, else the tuple (logp, ref_logp, kl, reverse_kl, entropy, log_sum_p2).

        Args:
            x: hidden states, `(..., H)` without a request and `(N, H)` with one.
            request: labels, the statistics to compute, and the reference.
        Returns: with a request, a plain tuple of `(N,)` vectors in float32 or better, None where not wanted. It is a
            tuple because the hooks of parallel backends look for tensors in tuples only.
        """
        # the weight is read inside forward, where a parallel backend's hooks have gathered it
        return super().forward(x) if request is None else stats_of_request(request, x, self.weight, self.bias)


def stats_of_request(request: HeadRequest, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """The statistics of hidden states `x` (N, H) under a head of weight (V, H) and bias (V,): see `StatsLinear`."""
    stats = token_stats(
        x,
        weight,
        request.labels,
        bias=bias,
        scale=request.scale,
        softcap=request.softcap,
        ref_hidden=request.ref_hidden,
        ref_weight=request.ref_weight,
        ref_bias=request.ref_bias,
        ref_scale=request.ref_scale,
        ref_softcap=request.ref_softcap,
        want=request.want,
        token_tile=request.token_tile,
        vocab_tile=request.vocab_tile,
        cache_mb=request.cache_mb,
    )
    return tuple(getattr(stats, name) for name in ORDER)


class ScoreLinear(nn.Linear):
    """An nn.Linear that computes in float32 or better when `precise` is set, also under autocast.

    A loss compares two scores by their difference, which bfloat16 would round away.
    """

    def forward(self, x: torch.Tensor, precise: bool = False) -> torch.Tensor:
        if not precise:
            return super().forward(x)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)  # float64 weights keep their dtype
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            return nn.functional.linear(x.to(dtype), self.weight.to(dtype), bias)


class HasHead(Protocol):
    """A language model; this module uses its output embedding only."""

    def get_output_embeddings(self) -> nn.Module | None: ...


def make_head_aware(lm: HasHead) -> StatsLinear:
    """Turn the output embedding of `lm` into a StatsLinear in place and return it; call it before adding adapters.

    Weights, parameter names, tying, saving and generation do not change: only the module's class does.

    Raises: TrainError if the head is not a plain nn.Linear (an adapter on the head, a quantised head).
    """
    head = lm.get_output_embeddings()
    if type(head) is StatsLinear:
        return head
    if type(head) is not nn.Linear:
        raise TrainError(
            f"{type(lm).__name__}: its output head is {_kind(head)}, expected a plain torch.nn.Linear "
            "(no adapter on the head, no quantised head)"
        )
    # changing the class in place keeps the parameter object, so tied embeddings stay tied
    head.__class__ = StatsLinear
    return cast(StatsLinear, head)


def make_score_precise(classifier: nn.Module) -> None:
    """Turn the linear layer `score` of a classifier into a ScoreLinear in place; call it before adding adapters."""
    head = classifier.get_submodule("score")
    if type(head) is nn.Linear:
        head.__class__ = ScoreLinear


def _kind(head: object) -> str:
    return "missing" if head is None else f"a {type(head).__module__}.{type(head).__qualname__}"
