"""Model paths: whether one holds a model or an adapter, and which weights are the reference of a run."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.errors import ConfigError, TrainError
from prefopt.settings import ModelConfig, RunConfig
from prefopt.training import models, weight_files
from prefopt.training.adapters import Frozen

if TYPE_CHECKING:
    pass


_CONFIG = "adapter_config.json"
_MOST_RANK = 65_536
# Ways of starting an adapter that leave the base weights as they are; the others move part of them into the adapter.
_STARTS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class ModelSource:
    """The content of a model path: a model, or an adapter and its base.

    Args:
        path: the path as it was given.
        base: path of the base model; `path` itself if there is no adapter.
        revision: revision of the base, if it is a hub model.
        adapter: peft's settings of the adapter, or None.
        commit: commit of the adapter, if it is on the hub.
    """

    path: str
    base: str
    revision: str | None = None
    adapter: Any = None
    commit: str | None = None

    def base_settings(self, settings: ModelConfig) -> ModelConfig:
        """The settings with which to load the base."""
        return dataclasses.replace(settings, revision=self.revision)


def find(path: str, settings: ModelConfig, key: str = "model.path") -> ModelSource:
    """The source at `path`, from its config files and the headers of its weights.

    Raises: TrainError naming `key` for an adapter that cannot be trained, or is not exact as a reference.
    """
    from transformers.utils.hub import extract_commit_hash
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(path, revision=settings.revision)
    except Exception as error:
        raise models.load_error(key, path, error) from error
    weight_files.check_files(path, key)
    if found is None:
        return ModelSource(path, path, settings.revision)
    from peft import PeftConfig

    try:
        adapter: Any = PeftConfig.from_pretrained(str(Path(found).parent))
    except Exception as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise TrainError(f"{key}: '{found}' is not readable: {reason}") from error
    kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
    start = getattr(adapter, "init_lora_weights", True)
    base = adapter.base_model_name_or_path
    rank, alpha = getattr(adapter, "r", None), getattr(adapter, "lora_alpha", None)
    for wrong, text in (
        (kind != "LORA", f"is a {kind} adapter, expected a LoRA adapter"),
        (
            not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= _MOST_RANK,
            f"has rank {rank!r}, expected a number from 1 to {_MOST_RANK:,}",
        ),
        (
            not isinstance(alpha, int | float) or not 0 < alpha < math.inf,
            f"has lora_alpha {alpha!r}, expected a number above 0: it is multiplied by that, and 0 trains nothing",
        ),
        (
            getattr(adapter, "bias", "none") != "none",
            f"was trained with bias '{getattr(adapter, 'bias', '')}', which changes the weights below it that the "
            "reference reads, expected 'none'",
        ),
        (
            start not in _STARTS,
            f"was started by '{start}', which changes the base weights below it, expected an adapter of unchanged ones "
            "(peft converts it when it saves)",
        ),
        (
            base and (Path(base) / _CONFIG).is_file(),
            f"names '{base}' as its base model, which holds an adapter itself, expected a model (merge that one first)",
        ),
        (not base, f"names no base model, expected base_model_name_or_path in {_CONFIG}"),
    ):
        if wrong:
            raise TrainError(f"{key}: the adapter '{path}' {text}")
    if not Path(base).is_dir() and (base.startswith((".", "/", "~")) or base.count("/") > 1):
        raise TrainError(
            f"{key}: '{path}' is an adapter of '{base}', which does not exist; "
            f"name the model's place as base_model_name_or_path in {found}"
        )
    weight_files.check_files(base, key)
    return ModelSource(path, base, adapter.revision, adapter, extract_commit_hash(found, None))


def tokenizer_path(weights: ModelSource, settings: ModelConfig) -> tuple[str, ModelConfig]:
    """(path of the tokenizer, settings to load it): beside the adapter if it has one, else beside the base."""
    if weights.adapter is not None:
        from transformers.utils import cached_file

        name = "tokenizer_config.json"
        quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        if cached_file(weights.path, name, revision=settings.revision, **quietly) is None:
            return weights.base, weights.base_settings(settings)
    return weights.path, settings


def same_place(path: str, other: str) -> bool:
    """Whether two paths are one folder, or two ids one id."""
    folders = Path(path).is_dir() and Path(other).is_dir()
    return Path(path).resolve() == Path(other).resolve() if folders else path == other


def choose_reference(config: RunConfig, start: ModelSource) -> Frozen | ModelSource | None:
    """The reference of a run: frozen weights of the policy, another model, or None.

    Args: start: the policy's starting weights.
    """
    named = config.reference.path
    if config.method.needs.reference == "none":
        return None
    moves = config.reference.sync_every is not None
    if moves and named is not None and (start.adapter is not None or config.lora.r is not None):
        raise ConfigError(
            "reference.sync_every: found with reference.path and LoRA, where the adapter's own start is what moves; "
            "leave reference.path out"
        )
    if named is None or same_place(named, start.path):
        if start.adapter is not None or (moves and config.lora.r is not None):
            return Frozen.SNAPSHOT
        return start if config.lora.r is None else Frozen.BASE
    if start.adapter is not None and same_place(named, start.base):
        return Frozen.BASE
    return find(named, config.model, "reference.path")


def source_of(reference: Frozen | ModelSource, start: ModelSource) -> ModelSource:
    """The source of the reference's weights. Args: start: the policy's starting weights."""
    if isinstance(reference, ModelSource):
        return reference
    return start if reference is Frozen.SNAPSHOT else ModelSource(start.base, start.base, start.revision)


def describe_reference(reference: Frozen | ModelSource, start: ModelSource, config: RunConfig) -> str:
    """A description of the reference, for the first lines of a run and its card."""
    held = "" if config.model.quantize is None else f", the base held in {config.model.quantize}"
    settings = config.reference
    copy = "" if settings.cache != "none" else ", a copy" if settings.sync_every is not None else ", a frozen copy"
    if reference is Frozen.BASE:
        text = f"{reference.value} (no second copy), {start.base}"
    elif isinstance(reference, Frozen):
        what = reference.value if settings.sync_every is None else "a snapshot of the adapter"
        text = f"{what} (no second copy of the base weights), {start.path}"
    else:
        what = "the policy's starting weights" if reference == start else "other weights"
        on = "" if reference.adapter is None else f" on {reference.base}"
        text = f"{what}{copy if reference == start else ''}, {reference.path}{on}"
    if settings.sync_every is not None:
        weight = "replaced by" if settings.sync_weight == 1 else f"mixed with {settings.sync_weight:g} of"
        held += f"; {weight} the policy every {settings.sync_every} steps"
    return text + held
