"""Parts of a model that no text reaches: vision and audio towers, projectors. They are frozen and take no adapter.

What text reaches is what the autograd graph of a text pass holds. The pass is made over fake tensors, which have shapes
and no values, so it needs no weights and finds the same on every rank.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from prefopt.training import models, sharding
from prefopt.training.launcher import print_rank_0

_TOKENS = 8
_FOUND: dict[tuple[type, str], tuple[str, ...]] = {}  # by class and config


def unreached(lm: Any) -> tuple[str, ...]:
    """The largest modules of a model, and single weights, that no text pass reads, by name.

    Args: lm: a causal language model or a classifier, without an adapter, on whatever device.
    """
    if not _may_have_towers(lm):
        return ()
    key = type(lm), lm.config.to_json_string(use_diff=False)
    if key not in _FOUND:
        try:
            with models.quiet_transformers():
                _FOUND[key] = _find(lm)
        except Exception as error:  # whatever a model's own code raises on tensors without values
            reason = str(error).partition("\n")[0][:100]
            print_rank_0(
                f"warning: which parts of {type(lm).__name__} text reaches is not known ({reason}); all are trained"
            )
            _FOUND[key] = ()
    return _FOUND[key]


def freeze(base: Any, names: tuple[str, ...]) -> None:
    """Take these parts of a model out of training, and what an adapter has on them."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        getattr(base.get_submodule(owner), leaf).requires_grad_(False)


def describe(base: Any, names: tuple[str, ...]) -> str:
    """One line on what is frozen. Args: base: holds the parts."""
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in base.named_parameters()}
    frozen = sum(size for name, size in sizes.items() if within(name, names))
    return f"frozen: {', '.join(names)} ({frozen:,} weights), which text does not reach; no adapter goes there"


def within(name: str, parts: tuple[str, ...]) -> bool:
    """Whether a module or weight is one of these parts, or in one of them."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _may_have_towers(lm: Any) -> bool:
    """Whether a model is of several models, or reads what has more dimensions than text. Others cost no pass."""
    from transformers import PretrainedConfig

    several = any(isinstance(value, PretrainedConfig) for value in vars(lm.config).values())
    return several or any(isinstance(module, (nn.Conv2d, nn.Conv3d)) for module in lm.modules())


def _find(lm: Any) -> tuple[str, ...]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = copy.deepcopy(lm.config)
    config._attn_implementation = "eager"  # whatever is installed here
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    # a tower is made by a call of its own, which ZeRO-3 would shard
    with sharding.unsharded_loading(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        probe = type(lm)(config).to(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        off_meta(probe)
        probe.requires_grad_(True)
        ids = torch.zeros(1, _TOKENS, dtype=torch.long)
        positions = torch.arange(_TOKENS)[None]
        outputs = probe.base_model(
            input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False
        )
        reached = _weights_in_graph(outputs.last_hidden_state)
    head = getattr(probe, "score", None) or probe.get_output_embeddings()
    reached |= {id(p) for p in head.parameters()}
    names = {name for name, p in probe.named_parameters() if id(p) in reached}
    alike = {_pattern(name) for name in names}  # an expert that these tokens were not routed to is no tower
    return tuple(_largest(probe, {id(p) for n, p in probe.named_parameters() if _pattern(n) not in alike}))


def _pattern(name: str) -> str:
    """A weight's name without the numbers of the lists that it is in."""
    return re.sub(r"\.\d+(?=\.)", ".#", name)


def _largest(module: nn.Module, out: set[int], prefix: str = "") -> Iterator[str]:
    """Names of the largest modules all of whose weights are in `out`, and of single weights beside them."""
    for name, p in module.named_parameters(recurse=False):
        if id(p) in out:
            yield prefix + name
    for name, child in module.named_children():
        ids = {id(p) for p in child.parameters()}
        if ids and ids <= out:
            yield prefix + name
        elif ids & out:
            yield from _largest(child, out, f"{prefix}{name}.")


def _weights_in_graph(tensor: torch.Tensor) -> set[int]:
    """The ids of all leaves that a tensor was made of, without a backward pass."""
    todo, seen, found = [tensor.grad_fn], set(), set()
    while todo:
        function: Any = todo.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if hasattr(function, "variable"):
            found.add(id(function.variable))
        todo += [following for following, _ in function.next_functions]
    return found


def off_meta(lm: nn.Module) -> None:
    """Empty tensors in the place of those on the meta device, where attention would not be that of a real device."""
    made: dict[int, nn.Parameter] = {}
    for module in lm.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) not in made:
                made[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
            module._parameters[name] = None if p is None else made[id(p)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
