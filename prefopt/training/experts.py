"""Mixture-of-experts: the loss that balances the router, and experts that compute in the precision of autocast."""

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

_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # names that configs have for it
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts")


# The router's loss ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Routing:
    """What a pass says of its routers, summed over the tokens of all layers.

    Args:
        chosen: (E,) how often an expert was among those of a token; no gradient.
        probabilities: (E,) the router's probability of each expert.
        tokens: () tokens times layers.
    """

    chosen: torch.Tensor
    probabilities: torch.Tensor
    tokens: torch.Tensor

    def packed(self) -> torch.Tensor:
        """All of it in one tensor, (2 E + 1,), which ranks can sum."""
        return torch.cat((self.chosen, self.probabilities.detach(), self.tokens[None]))


def router_weight(config: Any, given: float | None) -> float:
    """The coefficient of the router's loss: the setting, else the one in the model's config; 0 where it has no routers.

    A family is trained with it if its config has `output_router_logits`, as in TRL; whether that is true does not
    matter.

    Raises: ConfigError where a setting asks for it of a model that does not give its routers' logits.
    """
    text: Any = config.get_text_config()
    known = hasattr(text, "output_router_logits") and _first(text, _CHOSEN) is not None
    if given and not known:
        raise ConfigError(
            f"model.router_aux_weight: found {given:g}, but the model's family ({text.model_type}) does not give the "
            "logits of routers, expected a mixture-of-experts model such as Mixtral or Qwen3-MoE, or 0"
        )
    own = getattr(text, "router_aux_loss_coef", None) or 0.0
    return float((own if given is None else given) if known else 0.0)


def token_weights(batch: PairBatch) -> torch.Tensor:
    """How many sequences each cell of a batch is a token of, (R * T,): 0 in padding, 2 in a prompt of both sides."""
    weights = batch.attention_mask.reshape(-1).float()
    shared = batch.segments is not None and batch.rejected_lengths is not None and len(batch.segments) == batch.pairs
    if not (shared and batch.pairs):
        return weights
    assert batch.segments is not None
    block, branch = block_and_branch(batch.segments, len(weights))
    both = torch.from_numpy((block >= 0) & (branch == 0)).to(weights.device)
    return weights * (1 + both)


def routing(logits: Sequence[torch.Tensor], config: Any, weights: torch.Tensor) -> Routing:
    """Sums over the tokens of a pass.

    Args:
        logits: of each layer's router, (R * T, E) or (R, T, E).
        config: of the model.
        weights: (R * T,) of each token.
    """
    top = int(_first(config.get_text_config(), _CHOSEN) or 1)
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
    """The share of a pass in the load-balancing loss of a step: E sum_e f_e P_e.

    f_e is the share of a step's tokens that went to expert e, P_e the mean over them of its probability; both over all
    layers together. Shares of all passes of a step add up to its loss.

    Args: chosen, tokens: as in Routing, of the whole step.
    Reference: Fedus et al., Switch Transformers, arXiv 2101.03961, equations 4 to 6, as transformers'
        `load_balancing_loss_func` has it, whose value this is for a step of one pass.
    """
    chosen, tokens = (value.to(mine.probabilities.dtype) for value in (chosen, tokens.clamp(min=1)))
    return len(chosen) * ((chosen / tokens) @ (mine.probabilities / tokens))


def _first(config: Any, names: Sequence[str]) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


# Experts --------------------------------------------------------------------------------------------------------------


def stacked(lm: Any) -> dict[str, nn.Module]:
    """The modules that hold all routed experts of a layer in one matrix of three dimensions, by name."""
    text: Any = lm.config.get_text_config()
    counts = {int(n) for name in _COUNTS if isinstance(n := getattr(text, name, None), int)}
    if not counts:
        return {}
    return {name: module for name, module in lm.named_modules() if any(_is_stack(p, counts) for p in _own(module))}


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module._parameters.values() if p is not None]


def _is_stack(parameter: Any, counts: set[int]) -> bool:
    shape = sharding.shape(parameter)
    return len(shape) == 3 and shape[0] in counts


class _Autocast:
    """Experts whose matrices are rounded under autocast, which knows no product of stacked ones."""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        own: dict[str, Any] = self._parameters  # type: ignore[has-type]
        kind = next(p.device.type for p in own.values() if p is not None)
        wide = any(p is not None and p.dtype == torch.float32 for p in own.values())
        if not (wide and torch.is_autocast_enabled(kind)):
            return super().forward(*args, **inputs)  # type: ignore[misc]
        narrow = torch.get_autocast_dtype(kind)
        args = tuple(_rounded(a, narrow) if i == 0 else a for i, a in enumerate(args))
        self._parameters = {name: _rounded(p, narrow) for name, p in own.items()}
        try:
            return super().forward(*args, **inputs)  # type: ignore[misc]
        finally:
            self._parameters = own


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value


def follow_autocast(lm: Any) -> None:
    """Let routed experts that are stacked compute in 16 bits under autocast, as all other linear layers do."""
    for module in stacked(lm).values():
        kind = type(module)
        module.__class__ = type(kind.__name__, (_Autocast, kind), {"__module__": kind.__module__})


def remark(lm: Any, base: Any) -> list[str]:
    """What a run's first lines say of experts that an adapter leaves out. Args: lm: the policy; base: below it."""
    experts = stacked(base)
    if lm is base or not experts:
        return []
    weights = sum(math.prod(sharding.shape(p)) for module in experts.values() for p in _own(module))
    return [
        f"adapter: none on routed experts ({weights:,} weights in {len(experts)} stacked modules), which are no linear "
        "layers; they stay as they are"
    ]
