"""Loading models and tokenizers from a folder or the hub."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefopt.data import templates
from prefopt.errors import TrainError, did_you_mean
from prefopt.settings import ModelConfig
from prefopt.training import experts, quantized, sharding, sizes, weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """While it lasts, transformers prints no load reports and progress bars."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def load_error(key: str, path: str, error: Exception, what: str = "a model") -> TrainError:
    """The one-line error for a model that could not be loaded."""
    folder = Path(path)
    if folder.is_dir():
        message = f"unknown {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        reason = textwrap.shorten(message, 200, placeholder=" ...")
        return TrainError(f"{key}: '{path}' is a folder without {what} that can be loaded: {reason}")
    siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    near = did_you_mean(folder.name, siblings)
    hint = near or " (check the spelling or the network)"
    return TrainError(f"{key}: '{path}' is neither a folder nor a model that the hub gave{hint}")


def load_config(path: str, settings: ModelConfig, key: str = "model.path") -> PretrainedConfig:
    """The model's config, with plausible sizes. Raises: TrainError naming `key`."""
    config = _config(path, settings, key)
    if _pads_beyond(config):
        config.get_text_config().pad_token_id = None
    return config


def _config(path: str, settings: ModelConfig, key: str) -> PretrainedConfig:
    """The config as the file has it."""
    from transformers import AutoConfig

    _check_object(Path(path) / "config.json", key)
    try:
        config = AutoConfig.from_pretrained(
            path, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except Exception as error:
        raise load_error(key, path, error) from error
    sizes.check_sizes(config, path, key)
    return config


def _pads_beyond(config: Any) -> bool:
    """Whether the padding token has no row in the embedding; padding is masked, so None is used instead."""
    text = config.get_text_config()
    pad, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    return isinstance(pad, int) and isinstance(rows, int) and pad >= rows


def _check_object(file: Path, key: str) -> None:
    """Raises: TrainError for a file that is not a JSON object, or has implausible sizes."""
    if not file.exists():
        return
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else "no file"
    except OSError as error:
        raise TrainError(f"{key}: '{file}' cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        found = "no JSON"
    if not isinstance(found, dict):
        what = found if found in ("no file", "no JSON") else f"a JSON {type(found).__name__}"
        raise TrainError(f"{key}: '{file}' holds {what}, expected the JSON object of a model's config")
    sizes.check_config_values(found, str(file), key)


def load_tokenizer(
    path: str,
    settings: ModelConfig,
    chat_template: str | None = None,
    key: str = "model.path",
    template_key: str = "data.chat_template",
) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, with another chat template if one is named.

    Raises: TrainError naming `key` or `template_key` for an invalid tokenizer or chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except Exception as error:
        raise load_error(key, path, error, "a tokenizer") from error
    named = key if chat_template is None else template_key
    if chat_template is not None:
        tokenizer.chat_template = templates.read_template(chat_template, named, TrainError)
    templates.check_template(tokenizer, named if chat_template is None else f"{named}: '{chat_template}'", TrainError)
    return tokenizer


def load_model(path: str, settings: ModelConfig, key: str = "model.path") -> PreTrainedModel:
    """The causal language model at `path`, dropout off, in the dtype and attention of the settings.

    Raises: TrainError naming `key` when it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(path, settings, key)
    attention = attention_of(config, settings.attention, AutoModelForCausalLM)
    return _load(AutoModelForCausalLM, path, settings, key, attn_implementation=attention)


def check_model(path: str, settings: ModelConfig, key: str = "model.path") -> None:
    """Check names and shapes of the weights at `path` without loading them, for a model that another program loads.

    Quantised models are not checked, because their files have other names.

    Raises: TrainError as `load_model`.
    """
    from transformers import AutoModelForCausalLM

    if getattr(load_config(path, settings, key), "quantization_config", None) is None:
        _load(AutoModelForCausalLM, path, settings, key, on_meta=True)


def load_scorer(path: str, settings: ModelConfig, key: str = "model.path") -> PreTrainedModel:
    """The classifier with one logit at `path`, like `load_model`; a language model receives a new head.

    A new head is drawn from torch's generator. The padding token is unset, so that each sequence is read to its end.

    Raises: TrainError naming `key` for a model that is no such classifier and cannot be turned into one.
    """
    from transformers import AutoModelForSequenceClassification

    config = load_config(path, settings, key)
    check_scorer(config, path, key)
    attention = attention_of(config, settings.attention, AutoModelForSequenceClassification)
    more: dict[str, Any] = {"attn_implementation": attention, "num_labels": 1}
    new = not is_classifier(config)
    model = _load(AutoModelForSequenceClassification, path, settings, key, classifier=True, new_score=new, **more)
    check_head(model, key)
    text: Any = model.config.get_text_config()
    text.pad_token_id = None
    return model


def load_classifier(path: str, settings: ModelConfig, key: str, kind: Any = None) -> PreTrainedModel:
    """A trained classifier of any architecture, for inference only.

    Args: kind: its class, if transformers has none.
    Raises: TrainError naming `key` when it cannot be loaded, or a part of it is missing.
    """
    from transformers import AutoModelForSequenceClassification

    return _load(kind or AutoModelForSequenceClassification, path, settings, key, classifier=True)


def check_classifier(path: str, settings: ModelConfig, key: str, kind: Any = None) -> None:
    """Check names and shapes of a trained classifier without loading it, as `check_model`."""
    from transformers import AutoModelForSequenceClassification

    if getattr(load_config(path, settings, key), "quantization_config", None) is None:
        _load(kind or AutoModelForSequenceClassification, path, settings, key, classifier=True, on_meta=True)


def attention_of(config: PretrainedConfig, asked: str, auto: Any) -> str:
    """The attention implementation of a model: eager if SDPA is requested and the model's code does not support it.

    Args: auto: transformers' auto class of the kind of model.
    """
    kind = auto._model_mapping.get(type(config), None)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    without = kind is not None and not any(getattr(one, "_supports_sdpa", True) for one in kinds)
    return "eager" if asked == "sdpa" and without else asked


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether a config is that of a trained classifier."""
    return any("ForSequenceClassification" in name for name in config.architectures or ())


def check_scorer(config: PretrainedConfig, path: str, key: str = "model.path") -> None:
    """Raises: TrainError for a classifier of other than one logit, before its weights are loaded."""
    if is_classifier(config) and config.num_labels != 1:
        raise TrainError(f"{key}: '{path}' is a classifier with {config.num_labels} logits, expected one logit")


def check_head(classifier: nn.Module, key: str = "model.path") -> None:
    """Raises: TrainError for a classifier that does not read its score at the last token."""
    if not isinstance(getattr(classifier, "score", None), nn.Linear):
        raise TrainError(
            f"{key}: {type(classifier).__name__} does not read its score at the last token, expected a causal language "
            "model, or a classifier made from one"
        )


def set_padding(scorer: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the padding token of a classifier before saving, so that transformers reads the same last token in a batch.

    Not if EOS pads: transformers would then read the last token that is not EOS; without one it refuses batches.
    """
    text: Any = scorer.config.get_text_config()
    text.pad_token_id = None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id


def _load(
    kind: Any,
    path: str,
    settings: ModelConfig,
    key: str,
    *,
    classifier: bool = False,
    new_score: bool = False,
    on_meta: bool = False,
    **more: Any,
) -> PreTrainedModel:
    """Load the model at `path`, whose files must hold exactly its weights: none missing, none unexpected.

    Args:
        kind: its class. classifier, new_score: see `weight_files.check_loaded`. more: for `from_pretrained`.
        on_meta: whether to check names and shapes only; the returned model is on the meta device.
    """
    config = _config(path, settings, key)
    if _pads_beyond(config) and config.get_text_config() is config:
        more |= {"pad_token_id": None}
    weight_files.check_files(path, key)
    if getattr(config, "quantization_config", None) is None:
        weight_files.check_floating_point(path, key)
    more |= {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    more |= {"dtype": getattr(torch, settings.dtype), "output_loading_info": True, "ignore_mismatched_sizes": True}
    check = functools.partial(weight_files.check_loaded, path=path, key=key, classifier=classifier, new_score=new_score)
    try:
        with quiet_transformers():
            with sharding.unsharded_loading() as sharded:
                # ZeRO-3's loading does not report unexpected weights, and would initialise missing ones first
                if on_meta or sharded or weight_files.hold_too_few_weights(path, sizes.estimated_weights(config), key):
                    lm, loaded = kind.from_pretrained(path, device_map="meta", **more)
                    check(loaded, lm)
            if on_meta:
                return lm
            model, loaded = kind.from_pretrained(path, **quantized.loading_arguments(settings), **more)
    except TrainError:
        raise
    except Exception as error:
        raise load_error(key, path, error) from error
    check(loaded, model)
    quantized.disable_repacking(model)
    _forget_padding(model)
    experts.follow_autocast(model)
    align_storage(model)
    bad = sharding.not_finite(model)
    if bad is not None:
        raise TrainError(f"{key}: '{path}' holds weights that are not finite ({bad}); name a model whose weights are")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):  # attention keeps its rate as a number
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 - not declared on nn.Module
    return model


def _forget_padding(model: nn.Module) -> None:
    """Let the embedding of the padding token be trained: it may be EOS, which occurs in prompts too.

    Padding is never attended to and has no gradient. Position embeddings keep theirs, from which they count.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" not in name.rpartition(".")[2]:
            module.padding_idx = None


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's mode is restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def align_storage(model: nn.Module) -> None:
    """Move weights to addresses that are multiples of 64 bytes, as PyTorch allocates them.

    Weights read from a file keep the file's alignment, and on some CPUs a matmul with another alignment rounds
    differently: a resumed run would differ from an uninterrupted one.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def recompute_activations(model: Any) -> None:
    """Turn on non-reentrant gradient checkpointing, which has another name in newer versions of transformers."""
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def parameter_count(path: str, settings: ModelConfig) -> int:
    """Number of weights of the causal language model at `path`, from its config only."""
    from transformers import AutoModelForCausalLM

    model = model_on_meta(AutoModelForCausalLM, load_config(path, settings), path, settings)
    return sum(p.numel() for p in model.parameters())


def model_on_meta(kind: Any, config: PretrainedConfig, path: str, settings: ModelConfig) -> PreTrainedModel:
    """A model of this class on the meta device, from the config at `path`. Raises: TrainError if that fails."""
    try:
        with quiet_transformers(), torch.device("meta"):
            return kind.from_config(config, trust_remote_code=settings.trust_remote_code)
    except Exception as error:
        raise load_error("model.path", path, error) from error


def set_config_dtype(folder: Path, dtype: str) -> None:
    """Set the dtype in a saved model's config to that of its weights, where the model in memory has another."""

    def noted(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: dtype if k in ("dtype", "torch_dtype") and v is not None else noted(v) for k, v in value.items()}

    file = folder / "config.json"
    file.write_text(json.dumps(noted(json.loads(file.read_text())), indent=2, sort_keys=True) + "\n")
