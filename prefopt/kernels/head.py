"""A language model's own head, made able to return token statistics instead of logits.

The statistics are computed inside the call of the head module, because that is where DDP, DeepSpeed and FSDP hang
their hooks: a head that is computed beside its module may read a sharded weight or miss the gradient all-reduce.
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
    """What to compute of the states that the head is called with; see `token_stats` for the members.

    Pass it by keyword: DeepSpeed wraps the tensors among a module's positional inputs, and a sharded reference weight
    would lose its identity.
    """

    labels: torch.Tensor  # (N,)
    want: tuple[str, ...] = ()
    ref_hidden: torch.Tensor | None = None  # (N, H of the reference)
    ref_weight: torch.Tensor | None = None  # (V, H of the reference)
    ref_bias: torch.Tensor | None = None  # (V,)
    ref_scale: float = 1.0
    ref_softcap: float | None = None
    scale: float = 1.0
    softcap: float | None = None
    token_tile: int | None = None
    vocab_tile: int | None = None
    cache_mb: int = CACHE_MB


class StatsLinear(nn.Linear):
    """An nn.Linear that answers a request with token statistics, and is the stock head without one."""

    def forward(self, x: torch.Tensor, request: HeadRequest | None = None) -> Any:
        """Logits without a request, else the tuple (logp, ref_logp, kl, reverse_kl, entropy).

        Args:
            x: hidden states, `(..., H)` without a request and `(N, H)` with one.
            request: labels, what is wanted, and the reference.
        Returns: with a request, a plain tuple of `(N,)` vectors in float32 or better, None where not wanted. It is a
            tuple because engines look for tensors in tuples only.
        """
        return super().forward(x) if request is None else answer(request, x, self.weight, self.bias)


def answer(request: HeadRequest, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """What a head of this weight, (V, H), and bias, (V,) or None, says of states `x`, (N, H): see `StatsLinear`."""
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
    """An nn.Linear that computes in float32 or better where it is asked to, whatever is autocast around it.

    Two scores are compared by their difference, of which bfloat16 would leave little.
    """

    def forward(self, x: torch.Tensor, precise: bool = False) -> torch.Tensor:
        if not precise:
            return super().forward(x)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            return nn.functional.linear(x.to(dtype), self.weight.to(dtype), bias)


class HasHead(Protocol):
    """A language model, as far as this floor knows one."""

    def get_output_embeddings(self) -> nn.Module | None: ...


def make_head_aware(lm: HasHead) -> StatsLinear:
    """Turns the output embedding of `lm` into a StatsLinear in place and returns it; call it before adding adapters.

    Weights, parameter names, tying, saving and generation are untouched: only the module's class changes.

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
    head.__class__ = StatsLinear
    return cast(StatsLinear, head)


def make_score_precise(classifier: nn.Module) -> None:
    """Turns the linear layer `score` of a classifier into a ScoreLinear in place; call it before adding adapters."""
    head = classifier.get_submodule("score")
    if type(head) is nn.Linear:
        head.__class__ = ScoreLinear


def _kind(head: object) -> str:
    return "missing" if head is None else f"a {type(head).__module__}.{type(head).__qualname__}"
