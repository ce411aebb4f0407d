"""Loading the policy with its adapter, and a frozen model with one."""

from __future__ import annotations

import dataclasses
import functools
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefopt.errors import ConfigError, TrainError
from prefopt.kernels.head import HeadRequest, make_head_aware, make_score_precise, stats_of_request
from prefopt.settings import LoraConfig, ModelConfig, RunConfig
from prefopt.training import models, quantized, towers
from prefopt.training.adapters import (
    ALL_LINEAR,
    CLASSIFIER,
    POLICY,
    SNAPSHOT,
    Frozen,
    base_of,
    check_modules,
    is_linear,
    output_head,
    quiet_peft,
    snapshot_pairs,
)
from prefopt.training.model_sources import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_policy(
    config: RunConfig, start: ModelSource, reference: Frozen | ModelSource | None, resume_from: Path | None = None
) -> PreTrainedModel:
    """The policy at the start of the run or from a checkpoint, with an adapter if the settings or the path have one.

    The weights of a new adapter and of a new head depend on the run's seed only.
    """
    trained = config.lora.r is not None or start.adapter is not None
    load = models.load_scorer if config.method.needs.output == "scores" else models.load_model
    torch.manual_seed(config.seed)
    if not trained:
        lm = load(str(resume_from or start.base), start.base_settings(config.model))
        towers.freeze(lm, towers.unreached_by_text(lm))
        return lm
    lm = load(start.base, start.base_settings(config.model))
    settings = start.adapter or _settings(config.lora, lm, start.revision)
    settings = dataclasses.replace(settings, lora_dropout=config.lora.dropout)
    begun = str(resume_from) if resume_from else start.path if start.adapter is not None else None
    torch.manual_seed(config.seed)
    lm = attach(lm, settings, begun, config.model)
    if reference is Frozen.SNAPSHOT:
        _add_snapshot(lm, settings, start.path if start.adapter is not None else None, config.model)
        # peft has made all of the policy's adapter trainable again
        towers.freeze(base_of(lm), towers.unreached_by_text(base_of(lm)))
    return lm


def attach_like(lm: Any, config: RunConfig, start: ModelSource) -> Any:
    """A model whose weights do not matter (for planning), with an adapter like the run's if it has one."""
    if config.lora.r is None and start.adapter is None:
        towers.freeze(lm, towers.unreached_by_text(lm))
        return lm
    quantized.silence_log()
    return attach(lm, start.adapter or _settings(config.lora, lm, start.revision), None, config.model)


def load_frozen(weights: ModelSource, settings: ModelConfig, key: str) -> PreTrainedModel:
    """A frozen model; an adapter is not merged, because merging would round its weights."""
    if weights.adapter is None:
        return models.load_model(weights.base, weights.base_settings(settings), key)
    load = models.load_scorer if weights.adapter.task_type == CLASSIFIER else models.load_model
    lm = load(weights.base, weights.base_settings(settings), key)
    return attach(lm, dataclasses.replace(weights.adapter, lora_dropout=0.0), weights.path, settings, key)


def _settings(lora: LoraConfig, lm: PreTrainedModel, revision: str | None) -> Any:
    import peft

    assert lora.r is not None
    head, unread = output_head(lm), towers.unreached_by_text(lm)
    all_linear = {
        name.rpartition(".")[2]
        for name, m in lm.named_modules()
        if is_linear(m) and m is not head and not towers.within(name, unread)
    }
    return peft.LoraConfig(
        task_type=CLASSIFIER if hasattr(lm, "score") else "CAUSAL_LM",
        r=lora.r,
        lora_alpha=2 * lora.r if lora.alpha is None else lora.alpha,
        use_rslora=bool(lora.use_rslora),
        lora_dropout=lora.dropout,
        target_modules=[*({*lora.target_modules} - {ALL_LINEAR})] or sorted(all_linear - {*lora.modules_to_save}),
        modules_to_save=list(lora.modules_to_save) or None,
        exclude_modules="|".join(rf"{re.escape(part)}(\..*)?" for part in unread) or None,
        revision=revision,
    )


def attach(
    lm: Any,
    settings: Any,
    weights: str | None,
    model: ModelConfig,
    key: str = "model.path",
    path: str | None = None,
) -> PreTrainedModel:
    """`lm` with an adapter, with new weights or those of a folder. Args: path: the adapter's, for errors.

    The head becomes a StatsLinear first, so that a copy of it in modules_to_save is one too.
    """
    import peft

    unread = towers.unreached_by_text(lm)
    path = weights if path is None else path
    classifies = hasattr(lm, "score")
    if classifies:  # peft adds the usual names of a classifier's head to modules_to_save
        saved = {*(settings.modules_to_save or ())} - {"classifier", "score"}
        settings = dataclasses.replace(settings, modules_to_save=sorted(saved))
    named = tuple(sorted(settings.target_modules)) if isinstance(settings.target_modules, (list, set)) else ()
    try:
        check_modules(LoraConfig(target_modules=named, modules_to_save=tuple(settings.modules_to_save or ())), lm)
    except ConfigError as error:
        if path is None:
            raise
        raise TrainError(f"{key}: the adapter '{path}' cannot be used: {error}") from error
    if classifies:
        make_score_precise(lm)
    else:
        make_head_aware(lm)
    base = lm.name_or_path  # saved as an absolute path, so that the adapter can be loaded from any folder
    lm.name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    settings = dataclasses.replace(settings, inference_mode=False, base_model_name_or_path=lm.name_or_path)
    try:
        with quiet_peft():
            adapted: Any = peft.get_peft_model(lm, settings, adapter_name=POLICY)
    except Exception as error:  # peft raises various errors for invalid settings
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
        what = f"the adapter '{path}' has settings" if path is not None else "found settings of an adapter"
        raise TrainError(f"{key}: {what} that peft cannot build on {type(lm).__name__}: {reason}") from error
    head = output_head(adapted)
    if isinstance(head, peft.tuners.tuners_utils.BaseTunerLayer):
        raise TrainError(
            f"{key}: the adapter has a part on the output head, expected a plain head or one in modules_to_save"
        )
    if isinstance(head, peft.utils.TrainableTokensWrapper):  # tied to an embedding of which some rows are trained
        head.__class__ = _stats_tokens()
    if weights is not None:
        fill(adapted, POLICY, weights, model, key)
    towers.freeze(adapted.get_base_model(), unread)
    return adapted


@functools.cache
def _stats_tokens() -> type:
    """A StatsLinear of heads that are tied to an embedding of which peft trains some rows."""
    from peft.utils import TrainableTokensWrapper

    class StatsTokens(TrainableTokensWrapper):
        def forward(self, x: torch.Tensor, request: HeadRequest | None = None) -> Any:
            return super().forward(x) if request is None else stats_of_request(request, x, self.weight, self.bias)

        @property
        def bias(self) -> torch.Tensor | None:
            return self.token_adapter.base_layer.bias

        @property
        def in_features(self) -> int:
            return self.token_adapter.in_features

        @property
        def out_features(self) -> int:
            return self.token_adapter.out_features

    return StatsTokens


def _add_snapshot(lm: Any, settings: Any, path: str | None, model: ModelConfig) -> None:
    """Add a second, frozen adapter on the same base. Args: path: its weights; None: a copy of the policy's."""
    with quiet_peft():
        lm.add_adapter(SNAPSHOT, dataclasses.replace(settings, lora_dropout=0.0, inference_mode=True))
    if path is not None:
        fill(lm, SNAPSHOT, path, model, "model.path")
    else:
        with torch.no_grad():
            for policy, snapshot in snapshot_pairs(lm).values():
                snapshot.copy_(policy)
    lm.set_requires_grad(SNAPSHOT, False)
    lm.set_adapter(POLICY)


def fill(lm: Any, adapter: str, path: str, model: ModelConfig, key: str) -> None:
    """Load an adapter's weights. Raises: TrainError for a missing, an unexpected or a non-finite weight."""
    import peft

    try:
        hub: dict[str, Any] = {} if Path(path).is_dir() else {"revision": model.revision}
        found = peft.load_peft_weights(path, device="cpu", **hub)
        result: Any = peft.set_peft_model_state_dict(lm, found, adapter_name=adapter)
    except Exception as error:
        raise models.load_error(key, path, error, "an adapter") from error
    models.align_storage(lm)
    # peft reports weights as missing that are tied to one that it has loaded
    named = dict(lm.named_parameters(remove_duplicate=False))
    there = {id(weight) for name, weight in named.items() if name not in result.missing_keys}
    missing = [name for name in result.missing_keys if f".{adapter}." in name or name.endswith(f".{adapter}")]
    missing = [name for name in missing if id(named.get(name)) not in there]
    wrong = [f"{name} is missing" for name in missing] + [f"{name} is unknown" for name in result.unexpected_keys]
    bad = next((name for name, weight in found.items() if not bool(weight.isfinite().all())), None)
    wrong += [f"{bad} is not finite"] if bad is not None else []
    whole = next((name for name, weight in found.items() if not weight.is_floating_point()), None)
    wrong += [f"{whole} holds whole numbers, expected floating-point weights"] if whole is not None else []
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise TrainError(f"{key}: the adapter '{path}' does not fit {type(base_of(lm)).__name__}: {wrong[0]}{more}")
