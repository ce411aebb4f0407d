"""Checks of the LoRA settings and of an adapter's files against the model, before any weight is loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefopt.errors import ConfigError, TrainError
from prefopt.settings import LoraConfig, ModelConfig, RunConfig
from prefopt.training import adapter_loading, adapter_saving, adapters, models, towers, weight_files
from prefopt.training.adapters import CLASSIFIER
from prefopt.training.model_sources import ModelSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def check(config: RunConfig, start: ModelSource, architecture: PretrainedConfig) -> None:
    """Check the LoRA settings against the model, before any weight is loaded.

    Raises: ConfigError naming the setting.
    """
    _check_with_adapter(config.lora, start)
    _check_quantized(config, start, architecture)
    scores = config.method.needs.output == "scores"
    if start.adapter is None and scores:
        models.check_scorer(architecture, start.base)
    if start.adapter is not None and (start.adapter.task_type == CLASSIFIER) != scores:
        kind, wanted = ("language model", "classifier") if scores else ("classifier", "language model")
        raise ConfigError(
            f"model.path: '{start.path}' is an adapter of a {kind}, and method '{config.method_name}' trains a "
            f"{wanted} (merge the adapter into its base first, or name the base)"
        )
    if start.adapter is None and config.lora.r is None and not scores:
        return
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind_of_model: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    if scores:
        architecture = copy.deepcopy(architecture)
        architecture.num_labels = 1
    base: Any = models.model_on_meta(kind_of_model, architecture, start.base, config.model)
    if scores:
        models.check_head(base)
    if start.adapter is not None:
        _check_adapter(start, base, config.model)
    elif config.lora.r is not None:
        adapters.check_modules(config.lora, base, towers.unreached_by_text(base))
        if config.model.quantize is not None:
            _check_trained_in_full(config, base)


def _check_adapter(start: ModelSource, base: Any, settings: ModelConfig, key: str = "model.path") -> None:
    """Check that an adapter fits its base, and its file holds its weights. Args: base: on the meta device."""
    with torch.device("meta"):
        adapted = adapter_loading.attach(base, start.adapter, None, settings, key, start.path)
    file = Path(start.path) / "adapter_model.safetensors"
    if not file.is_file():
        return
    found = weight_files.weight_shapes(file, key)
    parameters = dict(adapted.named_parameters())
    wanted = {saved: tuple(parameters[name].shape) for name, saved in adapter_saving.saved_names(adapted).items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            what = "is missing" if name not in found else "is unknown" if name not in wanted else "has another shape"
            raise TrainError(f"{key}: the adapter '{start.path}' does not fit {type(base).__name__}: {name} {what}")


def _check_quantized(config: RunConfig, start: ModelSource, architecture: PretrainedConfig) -> None:
    """Quantised weights are frozen, so an adapter must be trained. Raises: ConfigError."""
    quantize = config.model.quantize
    before: Any = getattr(architecture, "quantization_config", None)
    if before is not None:
        how = before.get("quant_method") if isinstance(before, dict) else getattr(before, "quant_method", before)
        raise ConfigError(
            f"model.path: '{start.base}' is quantised ({getattr(how, 'value', how)}), expected the model it was "
            "made from (--model.quantize nf4 quantises it when it is loaded)"
        )
    if quantize is not None and config.lora.r is None and start.adapter is None:
        raise ConfigError(
            f"model.quantize: found '{quantize}' without LoRA; quantised weights are frozen, so name a rank "
            "(--lora.r 16) or an adapter as model.path, or leave it out"
        )


def _check_trained_in_full(config: RunConfig, lm: PreTrainedModel) -> None:
    """Modules in modules_to_save must not be quantised. Raises: ConfigError."""
    head = adapters.output_head(lm)
    for name, module in lm.named_modules():
        named = next((target for target in config.lora.modules_to_save if name.endswith(target)), None)
        if named is not None and any(adapters.is_linear(part) and part is not head for part in module.modules()):
            raise ConfigError(
                f"lora.modules_to_save: '{named}' is held in {config.model.quantize}, which cannot be trained; "
                "expected the output head or an embedding (or give it an adapter by lora.target_modules)"
            )


def _check_with_adapter(lora: LoraConfig, start: ModelSource) -> None:
    """Settings of `lora` must match a given adapter; without an adapter they need a rank. Raises: ConfigError."""
    adapter = start.adapter
    runs_own = ("dropout", "merge")  # not the adapter's
    for name in ("r", "alpha", "use_rslora", "dropout", "target_modules", "modules_to_save", "merge"):
        given = getattr(lora, name)
        if given is None or given == () or (name in runs_own and not given):
            continue
        if adapter is None and lora.r is None:
            raise ConfigError(
                f"lora.{name}: found {given!r} without lora.r; name the rank (--lora.r 16) to turn LoRA on"
            )
        if adapter is None or name in runs_own:
            continue
        its = getattr(adapter, {"alpha": "lora_alpha"}.get(name, name))
        its = its or () if isinstance(given, tuple) else its
        same = {*given} == {*([its] if isinstance(its, str) else its)} if isinstance(given, tuple) else given == its
        if not same:
            shown = ",".join(sorted(its)) if isinstance(its, (set, list)) else its
            raise ConfigError(
                f"lora.{name}: found {','.join(given) if isinstance(given, tuple) else given}, but model.path "
                f"'{start.path}' holds an adapter with {shown or 'none'}, which is continued; leave it out"
            )
