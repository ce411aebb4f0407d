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
    """The tensors of a policy that are saved, by name: weights and buffers, tied ones once; or those of its adapter."""
    every = lm.state_dict(keep_vars=True)  # state_dict makes FSDP2 reshard what a forward pass has gathered
    if has_adapter(lm):
        return {name: every[name] for name in saved_names(lm)}
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, value in every.items():
        if name not in (getattr(lm, "_keys_to_ignore_on_save", None) or ()):
            found.setdefault(id(value), (name, value))
    return dict(found.values())


def saved_names(lm: Any) -> dict[str, str]:
    """The names of an adapter's weights in peft's files, by the names of the parameters of `lm`."""
    import peft

    names = [name for name, _ in lm.named_parameters()]
    numbers = {name: torch.tensor(number) for number, name in enumerate(names)}
    with quiet_peft():
        renamed = peft.get_peft_model_state_dict(
            lm, state_dict=numbers, adapter_name=POLICY, save_embedding_layers=False
        )
    return {names[int(number)]: name for name, number in renamed.items()}


def as_published(lm: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a model under the names and in the shapes of its published checkpoints."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(lm, weights))


def save(lm: Any, folder: Path, weights: dict[str, torch.Tensor] | None = None, dtype: str | None = None) -> None:
    """Write a folder for `from_pretrained` of transformers or peft: the model, or its adapter with its base's name.

    Args: weights: by name, if not the model's own. dtype: dtype of the weights, for the config.
    """
    with models.quiet_transformers():
        if has_adapter(lm):
            # "auto" would query the hub for the base's vocabulary
            more = {"selected_adapters": [POLICY], "save_embedding_layers": False}
            lm.save_pretrained(folder, state_dict=weights, **more)
        else:
            lm.save_pretrained(folder, state_dict=weights)
    if dtype is not None:
        models.set_config_dtype(folder, dtype)


def saved_weights(lm: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The trained weights in a checkpoint, by the names of the parameters of `lm`."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("adapter_model*.safetensors" if has_adapter(lm) else "model*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    names = saved_names(lm) if has_adapter(lm) else {name: name for name, _ in lm.named_parameters()}
    return {name: found[saved] for name, saved in names.items() if saved in found}


def merge(lm: Any, adapter: Path, model: ModelConfig) -> None:
    """Merge an exported adapter of this policy into its base weights; `save_merged` writes the result."""
    adapter_loading.fill(lm, POLICY, str(adapter), model, "lora.merge")
    with quiet_peft():
        lm.merge_and_unload(adapter_names=[POLICY])


def save_merged(lm: Any, folder: Path, dtype: str | None = None) -> None:
    """Write a merged policy as a model without an adapter.

    Args: dtype: dtype of the saved weights; None: unchanged.
    """
    base = base_of(lm)
    head, words = output_head(base), base.get_input_embeddings()
    if head is not None and getattr(head, "weight", None) is not getattr(words, "weight", None):
        base.config.get_text_config().tie_word_embeddings = False  # a head in modules_to_save is no longer tied
        base.config.tie_word_embeddings = False
    weights = None if dtype is None else {n: w.to(getattr(torch, dtype)) for n, w in base.state_dict().items()}
    save(base, folder, weights, dtype)
