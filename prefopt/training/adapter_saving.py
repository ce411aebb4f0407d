"""Saving a policy: all of its weights or those of its adapter, and an adapter merged into its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefopt.settings import ModelConfig
from prefopt.training import adapter_loading, models
from prefopt.training.adapters import POLICY, base_of, has_adapter, output_head, quiet_peft

if TYPE_CHECKING:
    pass


def tensors(lm: Any) -> dict[str, torch.Tensor]:
    """What is saved of a policy, by name: weights and buffers, tied ones once; or those of its adapter."""
    every = lm.state_dict(keep_vars=True)  # which makes FSDP2 shard again what a forward pass has gathered
    if has_adapter(lm):
        return {name: every[name] for name in saved_names(lm)}
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, value in every.items():
        if name not in (getattr(lm, "_keys_to_ignore_on_save", None) or ()):
            found.setdefault(id(value), (name, value))
    return dict(found.values())


def saved_names(lm: Any) -> dict[str, str]:
    """What peft calls the weights of an adapter in its file, by the names of the parameters of `lm`."""
    import peft

    names = [name for name, _ in lm.named_parameters()]
    numbers = {name: torch.tensor(number) for number, name in enumerate(names)}
    with quiet_peft():
        renamed = peft.get_peft_model_state_dict(
            lm, state_dict=numbers, adapter_name=POLICY, save_embedding_layers=False
        )
    return {names[int(number)]: name for name, number in renamed.items()}


def as_published(lm: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Some of a model's weights under the names, and in the pieces, that its published checkpoints have."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(lm, weights))


def save(lm: Any, folder: Path, weights: dict[str, torch.Tensor] | None = None, dtype: str | None = None) -> None:
    """Write what `from_pretrained` of transformers or peft opens: the model, or its adapter and a word of its base.

    Args: weights: by name, if not those that the model itself holds. dtype: of the weights, for the config.
    """
    with models.quiet_transformers():
        if has_adapter(lm):
            # "auto" would ask the hub whether the base's vocabulary is still the same
            more = {"selected_adapters": [POLICY], "save_embedding_layers": False}
            lm.save_pretrained(folder, state_dict=weights, **more)
        else:
            lm.save_pretrained(folder, state_dict=weights)
    if dtype is not None:
        models.set_config_dtype(folder, dtype)


def saved_weights(lm: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the trained weights, by the names of the parameters of `lm`."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("adapter_model*.safetensors" if has_adapter(lm) else "model*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    names = saved_names(lm) if has_adapter(lm) else {name: name for name, _ in lm.named_parameters()}
    return {name: found[saved] for name, saved in names.items() if saved in found}


def merge(lm: Any, adapter: Path, model: ModelConfig) -> None:
    """Put an exported adapter of this policy into the weights below it, for good; `save_merged` writes what remains."""
    adapter_loading.fill(lm, POLICY, str(adapter), model, "lora.merge")
    with quiet_peft():
        lm.merge_and_unload(adapter_names=[POLICY])


def save_merged(lm: Any, folder: Path, dtype: str | None = None) -> None:
    """Write what `merge` has left of a policy, as a model that knows of no adapter.

    Args: dtype: of the weights; None: as they are held.
    """
    base = base_of(lm)
    head, words = output_head(base), base.get_input_embeddings()
    if head is not None and getattr(head, "weight", None) is not getattr(words, "weight", None):
        base.config.get_text_config().tie_word_embeddings = False  # a head that was trained whole is one of its own
        base.config.tie_word_embeddings = False
    weights = None if dtype is None else {n: w.to(getattr(torch, dtype)) for n, w in base.state_dict().items()}
    save(base, folder, weights, dtype)
