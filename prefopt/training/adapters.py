"""A model with a LoRA adapter: its base, its output head, and computing as the reference without a second base.

This module, `adapter_loading`, `adapter_saving`, `adapter_checks` and `model_sources` are the only ones that know peft,
which is imported when a run has an adapter and not before.
"""

from __future__ import annotations

import contextlib
import enum
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from prefopt.errors import ConfigError, did_you_mean
from prefopt.settings import LoraConfig
from prefopt.training import experts, models, quantized, towers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POLICY = "default"  # peft's own name for an only adapter: it is saved at the top of a folder
SNAPSHOT = "reference"
CLASSIFIER = "SEQ_CLS"  # peft's name of a classifier's task
ALL_LINEAR = "all-linear"  # peft's name for all linear layers but the head


class Frozen(enum.Enum):
    """Which weights of a policy with an adapter are frozen and serve as the reference."""

    BASE = "the base weights under the disabled adapter"
    SNAPSHOT = "a frozen snapshot of the adapter that the policy starts from"


def check_modules(lora: LoraConfig, lm: PreTrainedModel, unread: tuple[str, ...] = ()) -> None:
    """Check that target_modules and modules_to_save name modules of the model that can be trained so.

    Args: unread: parts that no text pass reaches, which take no new adapter.
    Raises: ConfigError naming the module.
    """
    modules = {name: module for name, module in lm.named_modules() if not towers.within(name, unread)}
    head = output_head(lm)
    leaves = sorted({name.rpartition(".")[2] for name, module in modules.items() if is_linear(module)})
    for key, targets in (("target_modules", lora.target_modules), ("modules_to_save", lora.modules_to_save)):
        for target in targets:
            named = [name for name, _ in lm.named_modules() if name.endswith(target)]
            if named and not any(name in modules for name in named):
                raise ConfigError(
                    f"lora.{key}: '{target}' is a part that text does not reach ({named[0]}), expected one of the "
                    "text model"
                )
    if ALL_LINEAR in lora.target_modules and len(lora.target_modules) > 1:
        raise ConfigError(f"lora.target_modules: '{ALL_LINEAR}' is given with other names, expected it alone")
    for target in lora.target_modules:
        if target == ALL_LINEAR:
            continue
        hit = [module for name, module in modules.items() if name == target or name.endswith(f".{target}")]
        if not hit:
            raise ConfigError(
                f"lora.target_modules: '{target}' is no module of {type(lm).__name__}{did_you_mean(target, leaves)}; "
                f"its linear layers are {', '.join(leaves)}"
            )
        if head in hit:
            raise ConfigError(
                f"lora.target_modules: '{target}' is the output head, which takes no adapter; "
                f"train it whole (--lora.modules_to_save {target}) or leave it out"
            )
        other = next((module for module in hit if not is_linear(module)), None)
        if other is not None:
            raise ConfigError(
                f"lora.target_modules: '{target}' is a {type(other).__name__}, expected linear layers, such as "
                f"{', '.join(leaves)}"
            )
    for target in lora.modules_to_save:
        if not any(name.endswith(target) for name in modules):
            known = sorted({name.rpartition(".")[2] for name in modules if name})
            raise ConfigError(
                f"lora.modules_to_save: '{target}' is no module of {type(lm).__name__}{did_you_mean(target, known)}"
            )


def output_head(lm: PreTrainedModel) -> nn.Module | None:
    """The output head, of a language model or a classifier."""
    return getattr(lm, "score", None) or lm.get_output_embeddings()


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, nn.Linear or transformers' Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """While it lasts, warnings of peft and transformers about intended behaviour are suppressed.

    peft corrects fan_in_fan_out by itself, calls a deprecated name of transformers, and warns that a tied head in
    modules_to_save becomes a copy, which is intended.
    """
    with models.quiet_transformers(), warnings.catch_warnings():
        for words in ("fan_in_fan_out", "is_gradient_checkpointing", "tie_word_embeddings"):
            warnings.filterwarnings("ignore", message=f".*{words}.*")
        yield


def snapshot_pairs(lm: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """(the policy's weight, the snapshot's) by the snapshot's name, for all weights of the adapter."""
    weights = dict(lm.named_parameters())
    found = {}
    for name, weight in weights.items():
        parts = name.split(".")
        if SNAPSHOT in parts:
            found[name] = (weights[".".join(POLICY if part == SNAPSHOT else part for part in parts)], weight)
    return found


def has_adapter(lm: nn.Module) -> bool:
    """Whether `lm` is a model with an adapter."""
    return hasattr(lm, "peft_config") and hasattr(lm, "get_base_model")


def base_of(lm: Any) -> PreTrainedModel:
    """The transformers model itself, which contains the layers of its adapter if there is one."""
    return lm.get_base_model() if has_adapter(lm) else lm


@contextlib.contextmanager
def as_reference(lm: Any, which: Frozen) -> Iterator[None]:
    """While it lasts, `lm` computes with the frozen weights of the reference. For use without gradients."""
    tuner = lm.base_model
    if which is Frozen.BASE:
        tuner.disable_adapter_layers()
    else:
        lm.set_adapter(SNAPSHOT, inference_mode=True)
    try:
        yield
    finally:
        if which is Frozen.BASE:
            tuner.enable_adapter_layers()
        else:
            lm.set_adapter(POLICY)


def describe_policy(lm: Any) -> str:
    """The trained part of a model and its adapter, for the first lines of a run; "" if all weights are trained."""
    if not has_adapter(lm):
        return ""
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    settings = lm.peft_config[POLICY]
    targets = settings.target_modules
    names = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    whole = sorted({name for name in settings.modules_to_save or () if any(name in n for n, _ in lm.named_modules())})
    saved = f", and {', '.join(whole)} whole" if whole else ""
    tokens = getattr(settings, "trainable_token_indices", None) or {}
    rows = sum(map(len, tokens.values())) if isinstance(tokens, dict) else len(tokens)
    saved += f", and {rows} rows of the embedding" if rows else ""
    quantize = {q for m in lm.modules() if (q := quantized.quantization_type(m)) is not None}
    held = "".join(f"the other matrices quantised in {kind}, " for kind in sorted(quantize))
    return f"{held}{trained:,} of them trained (LoRA r {settings.r}, alpha {settings.lora_alpha} on {names}{saved})"


def remarks(lm: Any) -> list[str]:
    """Lines about the parts of a model that are frozen or take no adapter."""
    base = base_of(lm)
    unread = towers.unreached_by_text(base)
    return ([towers.describe(base, unread)] if unread else []) + experts.adapter_notes(lm, base)
