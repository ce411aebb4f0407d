"""LoRA: what a path holds, the policy with its adapter, and the reference that needs no second copy of the base.

The only file that knows peft, which is imported when an adapter is met and not before.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import functools
import math
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefopt.errors import ConfigError, TrainError, did_you_mean
from prefopt.kernels.head import HeadRequest, answer, make_head_aware, make_score_precise
from prefopt.settings import LoraConfig, ModelConfig, RunConfig
from prefopt.training import experts, models, quantized, towers, weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_POLICY = "default"  # peft's own name for an only adapter: it is saved at the top of a folder
_SNAPSHOT = "reference"
_CONFIG = "adapter_config.json"
CLASSIFIER = "SEQ_CLS"  # peft's name of a classifier's task
_MOST_RANK = 65_536
ALL_LINEAR = "all-linear"  # peft's word for all linear layers but the head
# Ways of starting an adapter that leave the base weights as they are; the others move part of them into the adapter.
_STARTS = (True, False, "gaussian", "orthogonal", "eva")


class Frozen(enum.Enum):
    """Which weights of a policy with an adapter stand still and serve as the reference."""

    BASE = "the base weights under the disabled adapter"
    SNAPSHOT = "a frozen snapshot of the adapter that the policy starts from"


@dataclass(frozen=True)
class Weights:
    """What a path holds: a model, or an adapter of one.

    Args:
        path: as it was named.
        base: the model, which is `path` itself where that is no adapter.
        revision: of the base, if it is a hub model.
        adapter: peft's settings of the adapter, or None.
        commit: of the adapter, if it lies on the hub.
    """

    path: str
    base: str
    revision: str | None = None
    adapter: Any = None
    commit: str | None = None

    def base_settings(self, settings: ModelConfig) -> ModelConfig:
        """The settings with which to load the base."""
        return dataclasses.replace(settings, revision=self.revision)


# Before any weight is loaded ------------------------------------------------------------------------------------------


def find(path: str, settings: ModelConfig, key: str = "model.path") -> Weights:
    """What `path` holds, read from its small files alone.

    Raises: TrainError naming `key` for an adapter that cannot be trained or compared with exactly.
    """
    from transformers.utils.hub import extract_commit_hash
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(path, revision=settings.revision)
    except Exception as error:
        raise models.load_error(key, path, error) from error
    weight_files.check_files(path, key)
    if found is None:
        return Weights(path, path, settings.revision)
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
    return Weights(path, base, adapter.revision, adapter, extract_commit_hash(found, None))


def tokenizer_path(weights: Weights, settings: ModelConfig) -> tuple[str, ModelConfig]:
    """Where the tokenizer lies, and its settings: beside the adapter where it has one, else beside the base."""
    if weights.adapter is not None:
        from transformers.utils import cached_file

        name = "tokenizer_config.json"
        quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        if cached_file(weights.path, name, revision=settings.revision, **quietly) is None:
            return weights.base, weights.base_settings(settings)
    return weights.path, settings


def reference(config: RunConfig, start: Weights) -> Frozen | Weights | None:
    """What the policy is compared with: weights that it holds anyway, other weights, or nothing.

    Args: start: what the policy starts from.
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


def weights_of(reference: Frozen | Weights, start: Weights) -> Weights:
    """Where the reference's weights lie. Args: start: what the policy starts from."""
    if isinstance(reference, Weights):
        return reference
    return start if reference is Frozen.SNAPSHOT else Weights(start.base, start.base, start.revision)


def describe(reference: Frozen | Weights, start: Weights, config: RunConfig) -> str:
    """What a run says of its reference."""
    held = "" if config.model.quantize is None else f", the base held in {config.model.quantize}"
    settings = config.reference
    copy = "" if settings.cache != "none" else ", a copy" if settings.sync_every is not None else ", a frozen copy"
    if reference is Frozen.BASE:
        said = f"{reference.value} (no second copy), {start.base}"
    elif isinstance(reference, Frozen):
        what = reference.value if settings.sync_every is None else "a snapshot of the adapter"
        said = f"{what} (no second copy of the base weights), {start.path}"
    else:
        what = "the policy's starting weights" if reference == start else "other weights"
        on = "" if reference.adapter is None else f" on {reference.base}"
        said = f"{what}{copy if reference == start else ''}, {reference.path}{on}"
    if settings.sync_every is not None:
        weight = "replaced by" if settings.sync_weight == 1 else f"mixed with {settings.sync_weight:g} of"
        held += f"; {weight} the policy every {settings.sync_every} steps"
    return said + held


def check(config: RunConfig, start: Weights, architecture: PretrainedConfig) -> None:
    """Hold the LoRA settings to the model, before any weight is loaded.

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
    hollow: Any = models.model_on_meta(kind_of_model, architecture, start.base, config.model)
    if scores:
        models.check_head(hollow)
    if start.adapter is not None:
        _check_adapter(start, hollow, config.model)
    elif config.lora.r is not None:
        _check_modules(config.lora, hollow, towers.unreached(hollow))
        if config.model.quantize is not None:
            _check_trained_whole(config, hollow)


def _check_adapter(start: Weights, hollow: Any, settings: ModelConfig, key: str = "model.path") -> None:
    """Whether an adapter can be built on its base, and its file holds what that needs. Args: hollow: the base."""
    with torch.device("meta"):
        adapted = _attach(hollow, start.adapter, None, settings, key, start.path)
    file = Path(start.path) / "adapter_model.safetensors"
    if not file.is_file():
        return
    found = weight_files.shapes_in(file, key)
    parameters = dict(adapted.named_parameters())
    wanted = {saved: tuple(parameters[name].shape) for name, saved in _saved_names(adapted).items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            what = "is missing" if name not in found else "is unknown" if name not in wanted else "has another shape"
            raise TrainError(f"{key}: the adapter '{start.path}' does not fit {type(hollow).__name__}: {name} {what}")


def _check_quantized(config: RunConfig, start: Weights, architecture: PretrainedConfig) -> None:
    """Weights in few bits stand still: something else must be trained."""
    quantize = config.model.quantize
    before: Any = getattr(architecture, "quantization_config", None)
    if before is not None:
        how = before.get("quant_method") if isinstance(before, dict) else getattr(before, "quant_method", before)
        raise ConfigError(
            f"model.path: '{start.base}' is held quantised ({getattr(how, 'value', how)}), expected the model it was "
            "made from (--model.quantize nf4 quantises it when it is loaded)"
        )
    if quantize is not None and config.lora.r is None and start.adapter is None:
        raise ConfigError(
            f"model.quantize: found '{quantize}' without LoRA; quantised weights stand still, so name a rank "
            "(--lora.r 16) or an adapter as model.path, or leave it out"
        )


def _check_trained_whole(config: RunConfig, lm: PreTrainedModel) -> None:
    """Only what is not quantised can be trained whole."""
    head = _head(lm)
    for name, module in lm.named_modules():
        named = next((target for target in config.lora.modules_to_save if name.endswith(target)), None)
        if named is not None and any(is_linear(part) and part is not head for part in module.modules()):
            raise ConfigError(
                f"lora.modules_to_save: '{named}' is held in {config.model.quantize}, which cannot be trained; "
                "expected the output head or an embedding (or give it an adapter by lora.target_modules)"
            )


def _check_with_adapter(lora: LoraConfig, start: Weights) -> None:
    """What of `lora` is given must be true of the adapter; without one, nothing may be given but with a rank."""
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


def _check_modules(lora: LoraConfig, lm: PreTrainedModel, unread: tuple[str, ...] = ()) -> None:
    """Every name must be a module of the model that can be trained in the way that is asked for.

    Args: unread: parts that text does not reach, where a new adapter has no business.
    """
    modules = {name: module for name, module in lm.named_modules() if not towers.within(name, unread)}
    head = _head(lm)
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
        raise ConfigError(f"lora.target_modules: '{ALL_LINEAR}' stands beside other names, expected it alone")
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


def _head(lm: PreTrainedModel) -> nn.Module | None:
    """The output head, of a language model or a classifier."""
    return getattr(lm, "score", None) or lm.get_output_embeddings()


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, by whatever class."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def same_place(path: str, other: str) -> bool:
    """Whether two paths are one folder, or two ids one id."""
    folders = Path(path).is_dir() and Path(other).is_dir()
    return Path(path).resolve() == Path(other).resolve() if folders else path == other


# Models with adapters -------------------------------------------------------------------------------------------------


def load_policy(
    config: RunConfig, start: Weights, reference: Frozen | Weights | None, resume_from: Path | None = None
) -> PreTrainedModel:
    """The policy at the start of the run, or as the checkpoint has it; with an adapter if settings or path say so.

    The weights of a new adapter and of a new head depend on the run's seed alone.
    """
    trained = config.lora.r is not None or start.adapter is not None
    load = models.load_scorer if config.method.needs.output == "scores" else models.load_model
    torch.manual_seed(config.seed)
    if not trained:
        lm = load(str(resume_from or start.base), start.base_settings(config.model))
        towers.freeze(lm, towers.unreached(lm))
        return lm
    lm = load(start.base, start.base_settings(config.model))
    settings = start.adapter or _settings(config.lora, lm, start.revision)
    settings = dataclasses.replace(settings, lora_dropout=config.lora.dropout)
    begun = str(resume_from) if resume_from else start.path if start.adapter is not None else None
    torch.manual_seed(config.seed)
    lm = _attach(lm, settings, begun, config.model)
    if reference is Frozen.SNAPSHOT:
        _add_snapshot(lm, settings, start.path if start.adapter is not None else None, config.model)
        towers.freeze(
            base_of(lm), towers.unreached(base_of(lm))
        )  # peft has set all of the policy's adapter to be trained
    return lm


def attached(lm: Any, config: RunConfig, start: Weights) -> Any:
    """A model whose weights do not matter, with an adapter like the run's, or as it is where the run has none."""
    if config.lora.r is None and start.adapter is None:
        towers.freeze(lm, towers.unreached(lm))
        return lm
    quantized.hush()
    return _attach(lm, start.adapter or _settings(config.lora, lm, start.revision), None, config.model)


def load_frozen(weights: Weights, settings: ModelConfig, key: str) -> PreTrainedModel:
    """A model to compare with; its adapter, if it has one, stays beside the base weights, where it is exact."""
    if weights.adapter is None:
        return models.load_model(weights.base, weights.base_settings(settings), key)
    load = models.load_scorer if weights.adapter.task_type == CLASSIFIER else models.load_model
    lm = load(weights.base, weights.base_settings(settings), key)
    return _attach(lm, dataclasses.replace(weights.adapter, lora_dropout=0.0), weights.path, settings, key)


def _settings(lora: LoraConfig, lm: PreTrainedModel, revision: str | None) -> Any:
    import peft

    assert lora.r is not None
    head, unread = _head(lm), towers.unreached(lm)
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No word of what is as it should be here.

    peft sets fan_in_fan_out right by itself, calls transformers by an older name, and says of a tied head that is
    trained whole that it is a copy, which is what was asked for.
    """
    with models.quiet_transformers(), warnings.catch_warnings():
        for words in ("fan_in_fan_out", "is_gradient_checkpointing", "tie_word_embeddings"):
            warnings.filterwarnings("ignore", message=f".*{words}.*")
        yield


def _attach(
    lm: Any,
    settings: Any,
    weights: str | None,
    model: ModelConfig,
    key: str = "model.path",
    path: str | None = None,
) -> PreTrainedModel:
    """`lm` with an adapter, whose weights are new or those of a folder. Args: path: the adapter's, if not there.

    The head is made head-aware first, so that a copy that is trained whole is too.
    """
    import peft

    unread = towers.unreached(lm)
    path = weights if path is None else path
    classifies = hasattr(lm, "score")
    if classifies:  # peft adds the names that a classifier's head may have to those that are trained whole
        saved = {*(settings.modules_to_save or ())} - {"classifier", "score"}
        settings = dataclasses.replace(settings, modules_to_save=sorted(saved))
    named = tuple(sorted(settings.target_modules)) if isinstance(settings.target_modules, (list, set)) else ()
    try:
        _check_modules(LoraConfig(target_modules=named, modules_to_save=tuple(settings.modules_to_save or ())), lm)
    except ConfigError as error:
        if path is None:
            raise
        raise TrainError(f"{key}: the adapter '{path}' cannot be used: {error}") from error
    if classifies:
        make_score_precise(lm)
    else:
        make_head_aware(lm)
    base = lm.name_or_path
    lm.name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base  # opens from any folder
    settings = dataclasses.replace(settings, inference_mode=False, base_model_name_or_path=lm.name_or_path)
    try:
        with _quiet():
            adapted: Any = peft.get_peft_model(lm, settings, adapter_name=_POLICY)
    except Exception as error:  # whatever peft makes of settings that are none
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
        what = f"the adapter '{path}' has settings" if path is not None else "found settings of an adapter"
        raise TrainError(f"{key}: {what} that peft cannot build on {type(lm).__name__}: {reason}") from error
    head = _head(adapted)
    if isinstance(head, peft.tuners.tuners_utils.BaseTunerLayer):
        raise TrainError(
            f"{key}: the adapter has a part on the output head, expected a plain head or one in modules_to_save"
        )
    if isinstance(head, peft.utils.TrainableTokensWrapper):  # tied to an embedding that some rows are trained of
        head.__class__ = _stats_tokens()
    if weights is not None:
        _fill(adapted, _POLICY, weights, model, key)
    towers.freeze(adapted.get_base_model(), unread)
    return adapted


@functools.cache
def _stats_tokens() -> type:
    """A class of heads tied to an embedding of which peft trains some rows, that answer requests as a StatsLinear."""
    from peft.utils import TrainableTokensWrapper

    class StatsTokens(TrainableTokensWrapper):
        def forward(self, x: torch.Tensor, request: HeadRequest | None = None) -> Any:
            return super().forward(x) if request is None else answer(request, x, self.weight, self.bias)

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
    """A second adapter on the same base, which is never trained. Args: path: None: as the policy's is now."""
    with _quiet():
        lm.add_adapter(_SNAPSHOT, dataclasses.replace(settings, lora_dropout=0.0, inference_mode=True))
    if path is not None:
        _fill(lm, _SNAPSHOT, path, model, "model.path")
    else:
        with torch.no_grad():
            for policy, snapshot in snapshot_pairs(lm).values():
                snapshot.copy_(policy)
    lm.set_requires_grad(_SNAPSHOT, False)
    lm.set_adapter(_POLICY)


def snapshot_pairs(lm: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """(the policy's weight, the snapshot's) by the snapshot's name: all that an adapter has of its own."""
    weights = dict(lm.named_parameters())
    found = {}
    for name, weight in weights.items():
        parts = name.split(".")
        if _SNAPSHOT in parts:
            found[name] = (weights[".".join(_POLICY if part == _SNAPSHOT else part for part in parts)], weight)
    return found


def _fill(lm: Any, adapter: str, path: str, model: ModelConfig, key: str) -> None:
    """Load an adapter's weights. Raises: TrainError if there is one too few, one too many or one that is not finite."""
    import peft

    try:
        hub: dict[str, Any] = {} if Path(path).is_dir() else {"revision": model.revision}
        found = peft.load_peft_weights(path, device="cpu", **hub)
        result: Any = peft.set_peft_model_state_dict(lm, found, adapter_name=adapter)
    except Exception as error:
        raise models.load_error(key, path, error, "an adapter") from error
    models.align_storage(lm)
    # peft counts as missing what is tied to a weight that it has
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


def has_adapter(lm: nn.Module) -> bool:
    """Whether `lm` is a model with an adapter."""
    return hasattr(lm, "peft_config") and hasattr(lm, "get_base_model")


def base_of(lm: Any) -> PreTrainedModel:
    """The causal language model itself, with the adapter's layers in it where there is one."""
    return lm.get_base_model() if has_adapter(lm) else lm


@contextlib.contextmanager
def standing_still(lm: Any, which: Frozen) -> Iterator[None]:
    """While it lasts, `lm` computes with the weights that serve as the reference. For use without gradients."""
    tuner = lm.base_model
    if which is Frozen.BASE:
        tuner.disable_adapter_layers()
    else:
        lm.set_adapter(_SNAPSHOT, inference_mode=True)
    try:
        yield
    finally:
        if which is Frozen.BASE:
            tuner.enable_adapter_layers()
        else:
            lm.set_adapter(_POLICY)


def describe_policy(lm: Any) -> str:
    """How much of a model is trained, and by what adapter; nothing where all of it is."""
    if not has_adapter(lm):
        return ""
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    settings = lm.peft_config[_POLICY]
    targets = settings.target_modules
    names = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    whole = sorted({name for name in settings.modules_to_save or () if any(name in n for n, _ in lm.named_modules())})
    saved = f", and {', '.join(whole)} whole" if whole else ""
    tokens = getattr(settings, "trainable_token_indices", None) or {}
    rows = sum(map(len, tokens.values())) if isinstance(tokens, dict) else len(tokens)
    saved += f", and {rows} rows of the embedding" if rows else ""
    quantize = {q for m in lm.modules() if (q := quantized.kind(m)) is not None}
    held = "".join(f"the others' matrices held in {kind}, " for kind in sorted(quantize))
    return f"{held}{trained:,} of them trained (LoRA r {settings.r}, alpha {settings.lora_alpha} on {names}{saved})"


def remarks(lm: Any) -> list[str]:
    """What a run's first lines say of the parts of a model that are not trained, or take no adapter."""
    base = base_of(lm)
    unread = towers.unreached(base)
    return ([towers.describe(base, unread)] if unread else []) + experts.remark(lm, base)


def tensors(lm: Any) -> dict[str, torch.Tensor]:
    """What is saved of a policy, by name: weights and buffers, tied ones once; or those of its adapter."""
    every = lm.state_dict(keep_vars=True)  # which makes FSDP2 shard again what a forward pass has gathered
    if has_adapter(lm):
        return {name: every[name] for name in _saved_names(lm)}
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, value in every.items():
        if name not in (getattr(lm, "_keys_to_ignore_on_save", None) or ()):
            found.setdefault(id(value), (name, value))
    return dict(found.values())


def _saved_names(lm: Any) -> dict[str, str]:
    """What peft calls the weights of an adapter in its file, by the names of the parameters of `lm`."""
    import peft

    names = [name for name, _ in lm.named_parameters()]
    numbers = {name: torch.tensor(number) for number, name in enumerate(names)}
    with _quiet():
        renamed = peft.get_peft_model_state_dict(
            lm, state_dict=numbers, adapter_name=_POLICY, save_embedding_layers=False
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
            more = {"selected_adapters": [_POLICY], "save_embedding_layers": False}
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
    names = _saved_names(lm) if has_adapter(lm) else {name: name for name, _ in lm.named_parameters()}
    return {name: found[saved] for name, saved in names.items() if saved in found}


def merge(lm: Any, adapter: Path, model: ModelConfig) -> None:
    """Put an exported adapter of this policy into the weights below it, for good; `save_merged` writes what remains."""
    _fill(lm, _POLICY, str(adapter), model, "lora.merge")
    with _quiet():
        lm.merge_and_unload(adapter_names=[_POLICY])


def save_merged(lm: Any, folder: Path, dtype: str | None = None) -> None:
    """Write what `merge` has left of a policy, as a model that knows of no adapter.

    Args: dtype: of the weights; None: as they are held.
    """
    base = base_of(lm)
    head, words = _head(base), base.get_input_embeddings()
    if head is not None and getattr(head, "weight", None) is not getattr(words, "weight", None):
        base.config.get_text_config().tie_word_embeddings = False  # a head that was trained whole is one of its own
        base.config.tie_word_embeddings = False
    weights = None if dtype is None else {n: w.to(getattr(torch, dtype)) for n, w in base.state_dict().items()}
    save(base, folder, weights, dtype)
