"""Mixture-of-experts models: the router's load-balancing loss, and autocast for stacked experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prefopt.data.layouts import block_and_branch
from prefopt.errors import ConfigError
from prefopt.training import sharding
from prefopt.types import PairBatch

# Names that configs use for the number of experts, and for the number of experts per token.
_EXPERT_COUNT_SETTINGS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_K_SETTINGS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts")


# The router's loss ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Routing:
    """Sums over the tokens of all layers in one forward pass, for E experts.

    Args:
        chosen: how often each expert was among the top k of a token; without gradient. Shape `(E,)`.
        probabilities: the router's probability of each expert. Shape `(E,)`.
        tokens: number of tokens times layers. Shape `()`.
    """

    chosen: torch.Tensor
    probabilities: torch.Tensor
    tokens: torch.Tensor

    def to_vector(self) -> torch.Tensor:
        """The three members concatenated, (2 E + 1,), for one all-reduce."""
        return torch.cat((self.chosen, self.probabilities.detach(), self.tokens[None]))


def router_weight(config: Any, given: float | None) -> float:
    """The coefficient of the router's loss: the setting if given, else that of the model's config; 0 without routers.

    The loss applies if the model's config has the field `output_router_logits`, whether true or false, as in TRL.

    Raises: ConfigError when the setting is given for a model that does not return router logits.
    """
    text: Any = config.get_text_config()
    known = hasattr(text, "output_router_logits") and _first(text, _TOP_K_SETTINGS) is not None
    if given and not known:
        raise ConfigError(
            f"model.router_aux_weight: found {given:g}, but models of type {text.model_type} return no router logits, "
            "expected a mixture-of-experts model such as Mixtral or Qwen3-MoE, or 0"
        )
    own = getattr(text, "router_aux_loss_coef", None) or 0.0
    return float((own if given is None else given) if known else 0.0)


def token_weights(batch: PairBatch) -> torch.Tensor:
    """The number of sequences that each position belongs to, (R * T,): 0 in padding, 2 in a shared prompt."""
    weights = batch.attention_mask.reshape(-1).float()
    shared = batch.segments is not None and batch.rejected_lengths is not None and len(batch.segments) == batch.pairs
    if not (shared and batch.pairs):
        return weights
    assert batch.segments is not None
    block, branch = block_and_branch(batch.segments, len(weights))
    both = torch.from_numpy((block >= 0) & (branch == 0)).to(weights.device)
    return weights * (1 + both)


def routing(logits: Sequence[torch.Tensor], config: Any, weights: torch.Tensor) -> Routing:
    """Sum the routers' choices and probabilities over the tokens of a forward pass.

    Args:
        logits: of each layer's router. Shapes `(R * T, E)` or `(R, T, E)`.
        config: the model's config.
        weights: `token_weights` of the batch. Shape `(R * T,)`.
    """
    top = int(_first(config.get_text_config(), _TOP_K_SETTINGS) or 1)
    experts = logits[0].shape[-1]
    weights = weights.to(torch.promote_types(logits[0].dtype, torch.float32))
    chosen = probabilities = weights.new_zeros(experts)
    for of_layer in logits:
        at_least = torch.promote_types(of_layer.dtype, torch.float32)
        p = of_layer.reshape(-1, experts).to(at_least).softmax(-1)
        picked = p.detach().topk(top, -1).indices  # (R * T, top)
        chosen = chosen.index_add(0, picked.reshape(-1), weights.repeat_interleave(top))
        probabilities = probabilities + weights @ p
    return Routing(chosen, probabilities, weights.sum() * len(logits))


def balance_loss(mine: Routing, chosen: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """One micro-batch's part of the load-balancing loss of a step, E sum_e f_e P_e, shape `()`.

    f_e is the fraction of the step's tokens that were routed to expert e, P_e the mean probability of expert e over
    these tokens, both over all layers together. The parts of all micro-batches of a step add up to its loss.

    Args:
        mine: the sums of this micro-batch.
        chosen, tokens: as in Routing, of the whole step.
    Reference: Fedus et al., Switch Transformers, arXiv 2101.03961, equations 4 to 6. For a step of one micro-batch the
        value is that of transformers' `load_balancing_loss_func`.
    """
    chosen, tokens = (value.to(mine.probabilities.dtype) for value in (chosen, tokens.clamp(min=1)))
    return len(chosen) * ((chosen / tokens) @ (mine.probabilities / tokens))


def _first(config: Any, names: Sequence[str]) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


# Experts --------------------------------------------------------------------------------------------------------------


def stacked_experts(lm: Any) -> dict[str, nn.Module]:
    """The modules that hold all routed experts of a layer in one 3-D parameter, (E, in, out) or (E, out, in)."""
    text: Any = lm.config.get_text_config()
    counts = {int(n) for name in _EXPERT_COUNT_SETTINGS if isinstance(n := getattr(text, name, None), int)}
    if not counts:
        return {}
    return {
        name: module
        for name, module in lm.named_modules()
        if any(_is_stack(p, counts) for p in _own_parameters(module))
    }


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module._parameters.values() if p is not None]


def _is_stack(parameter: Any, counts: set[int]) -> bool:
    shape = sharding.shape(parameter)
    return len(shape) == 3 and shape[0] in counts


class _Autocast:
    """Mixin for stacked experts: casts inputs and weights under autocast, which does not cover their matmuls."""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        own: dict[str, Any] = self._parameters  # type: ignore[has-type]
        device = next(p.device.type for p in own.values() if p is not None)
        is_float32 = any(p is not None and p.dtype == torch.float32 for p in own.values())
        if not (is_float32 and torch.is_autocast_enabled(device)):
            return super().forward(*args, **inputs)  # type: ignore[misc]
        dtype = torch.get_autocast_dtype(device)
        # the first argument is the hidden states; the others are routing indices and weights
        args = tuple(_rounded(a, dtype) if i == 0 else a for i, a in enumerate(args))
        self._parameters = {name: _rounded(p, dtype) for name, p in own.items()}
        try:
            return super().forward(*args, **inputs)  # type: ignore[misc]
        finally:
            self._parameters = own


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    """A float32 tensor in another dtype; any other value unchanged."""
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value


def follow_autocast(lm: Any) -> None:
    """Make stacked experts compute in 16 bits under autocast, as linear layers do; changes their classes in place."""
    for module in stacked_experts(lm).values():
        kind = type(module)
        module.__class__ = type(kind.__name__, (_Autocast, kind), {"__module__": kind.__module__})


def adapter_notes(lm: Any, base: Any) -> list[str]:
    """Log lines about experts that get no adapter. Args: lm: the policy; base: the model without its adapter."""
    experts = stacked_experts(base)
    if lm is base or not experts:
        return []
    weights = sum(math.prod(sharding.shape(p)) for module in experts.values() for p in _own_parameters(module))
    return [
        f"adapter: none on routed experts ({weights:,} weights in {len(experts)} stacked modules), which are not "
        "linear layers; they are frozen"
    ]
