"""Finds the parts of a multimodal model that text inputs do not use: vision and audio towers, and their projectors.

These parts are frozen and get no adapter. A parameter is used by text if it is in the autograd graph of a forward pass
over text. That pass runs on fake tensors, which have shapes but no values: it needs no weights, and its result is the
same on every rank.
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

_TOKENS = 8  # length of the text in the trial forward pass
_FOUND: dict[tuple[type, str], tuple[str, ...]] = {}  # results by model class and config


def unreached_by_text(lm: Any) -> tuple[str, ...]:
    """Names of the largest modules, and of single weights beside them, that a forward pass over text does not use.

    If the trial pass fails, a warning is printed and the result is empty, so that all parts are trained.

    Args: lm: a causal language model or a classifier, without an adapter, on any device.
    """
    if not _may_have_towers(lm):
        return ()
    key = type(lm), lm.config.to_json_string(use_diff=False)
    if key not in _FOUND:
        try:
            with models.quiet_transformers():
                _FOUND[key] = _find(lm)
        except Exception as error:  # a model's own code may raise anything on tensors without values
            reason = str(error).partition("\n")[0][:100]
            print_rank_0(
                f"warning: cannot determine which parts of {type(lm).__name__} text uses ({reason}); all are trained"
            )
            _FOUND[key] = ()
    return _FOUND[key]


def freeze(base: Any, names: tuple[str, ...]) -> None:
    """Freeze these parts of a model."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        getattr(base.get_submodule(owner), leaf).requires_grad_(False)


def describe(base: Any, names: tuple[str, ...]) -> str:
    """A log line that lists the frozen parts. Args: base: the model without its adapter."""
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in base.named_parameters()}
    frozen = sum(size for name, size in sizes.items() if within(name, names))
    return f"frozen: {', '.join(names)} ({frozen:,} weights), which text does not use; they get no adapter"


def within(name: str, parts: tuple[str, ...]) -> bool:
    """Whether a module or weight is one of these parts or belongs to one of them."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _may_have_towers(lm: Any) -> bool:
    """Whether a model has sub-models or 2-D or 3-D convolutions; for other models the trial pass is skipped."""
    from transformers import PretrainedConfig

    several = any(isinstance(value, PretrainedConfig) for value in vars(lm.config).values())
    return several or any(isinstance(module, (nn.Conv2d, nn.Conv3d)) for module in lm.modules())


def _find(lm: Any) -> tuple[str, ...]:
    """The result of `unreached_by_text`, from a forward pass of an equal model over fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = copy.deepcopy(lm.config)
    config._attn_implementation = "eager"  # the result must not depend on installed attention packages
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    # some models create their towers by a nested `from_config`, which ZeRO-3 would shard
    with sharding.unsharded_loading(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        probe = type(lm)(config).to(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        replace_meta_tensors(probe)
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
    # compare names without list indices: an expert to which these tokens were not routed is not a tower
    used = {_pattern(name) for name in names}
    return tuple(_largest(probe, {id(p) for n, p in probe.named_parameters() if _pattern(n) not in used}))


def _pattern(name: str) -> str:
    """A weight's name with the indices of module lists replaced by `#`."""
    return re.sub(r"\.\d+(?=\.)", ".#", name)


def _largest(module: nn.Module, unused: set[int], prefix: str = "") -> Iterator[str]:
    """Names of the largest modules all of whose weights are in `unused`, and of single weights beside them."""
    for name, p in module.named_parameters(recurse=False):
        if id(p) in unused:
            yield prefix + name
    for name, child in module.named_children():
        ids = {id(p) for p in child.parameters()}
        if ids and ids <= unused:
            yield prefix + name
        elif ids & unused:
            yield from _largest(child, unused, f"{prefix}{name}.")


def _weights_in_graph(tensor: torch.Tensor) -> set[int]:
    """The ids of all leaf tensors in the autograd graph of a tensor, found without a backward pass."""
    todo, seen, found = [tensor.grad_fn], set(), set()
    while todo:
        function: Any = todo.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if hasattr(function, "variable"):  # an AccumulateGrad node, which belongs to a leaf
            found.add(id(function.variable))
        todo += [following for following, _ in function.next_functions]
    return found


def replace_meta_tensors(lm: nn.Module) -> None:
    """Replace tensors on the meta device by empty tensors of the default device; tied weights stay tied.

    On the meta device SDPA would choose another implementation than on a real device.
    """
    replaced: dict[int, nn.Parameter] = {}
    for module in lm.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) not in replaced:
                replaced[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
            module._parameters[name] = None if p is None else replaced[id(p)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
