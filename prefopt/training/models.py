"""Models and tokenizers from a folder or the hub: found, checked against each other, hashed, loaded."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefopt import storage
from prefopt.data import templates
from prefopt.errors import TrainError, did_you_mean
from prefopt.settings import ModelConfig
from prefopt.training import experts, quantized, sizes, weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from prefopt.data.encoding_report import DataReport


_CONFIGS = ("config.json", "adapter_config.json")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers' load reports and progress bars belong to its own commands, not to a run's first lines."""
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


def refuse(key: str, path: str, error: Exception, what: str = "a model") -> TrainError:
    """Why a model could not be opened, in one line."""
    folder = Path(path)
    if folder.is_dir():
        said = f"unknown {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        reason = textwrap.shorten(said, 200, placeholder=" ...")
        return TrainError(f"{key}: '{path}' is a folder without {what} that can be loaded: {reason}")
    siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    near = did_you_mean(folder.name, siblings)
    hint = near or " (check the spelling or the network)"
    return TrainError(f"{key}: '{path}' is neither a folder nor a model that the hub gave{hint}")


def load_config(path: str, settings: ModelConfig, key: str = "model.path") -> PretrainedConfig:
    """The model's config, whose sizes are those of a model. Raises: TrainError naming `key`."""
    config = _config(path, settings, key)
    if _pads_beyond(config):
        config.get_text_config().pad_token_id = None
    return config


def _config(path: str, settings: ModelConfig, key: str) -> PretrainedConfig:
    """The same as the file has it."""
    from transformers import AutoConfig

    _check_object(Path(path) / "config.json", key)
    try:
        config = AutoConfig.from_pretrained(
            path, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except Exception as error:
        raise refuse(key, path, error) from error
    sizes.check_sizes(config, path, key)
    return config


def _pads_beyond(config: Any) -> bool:
    """Whether a config pads with a token that the embedding has no row for; what pads is masked, so none will do."""
    text = config.get_text_config()
    pad, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    return isinstance(pad, int) and isinstance(rows, int) and pad >= rows


def _check_object(file: Path, key: str) -> None:
    """Raises: TrainError for a file that is there and holds no JSON object, or one of absurd sizes."""
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
    sizes.check_counts(found, str(file), key)


def load_tokenizer(
    path: str,
    settings: ModelConfig,
    chat_template: str | None = None,
    key: str = "model.path",
    template_key: str = "data.chat_template",
) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, with another chat template if one is named.

    Raises: TrainError naming `key` or `template_key` for what is no tokenizer, or no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except Exception as error:
        raise refuse(key, path, error, "a tokenizer") from error
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
    """Whether the causal language model at `path` is whole, by names and shapes alone: for whoever loads it elsewhere.

    Nothing for one that is held quantised, whose files have names of their own.

    Raises: TrainError as `load_model`.
    """
    from transformers import AutoModelForCausalLM

    if getattr(load_config(path, settings, key), "quantization_config", None) is None:
        _load(AutoModelForCausalLM, path, settings, key, hollow=True)


def load_scorer(path: str, settings: ModelConfig, key: str = "model.path") -> PreTrainedModel:
    """The classifier with one logit at `path`, like `load_model`; its head is new where `path` is a language model.

    A new head is drawn from torch's generator. No padding is known to it: it reads each sequence to its last token.

    Raises: TrainError naming `key` for what is no such classifier, and cannot become one.
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
    """A trained classifier as it was saved, whatever its architecture: to be asked, not to be trained.

    Args: kind: its class, where transformers has none.
    Raises: TrainError naming `key` when it cannot be loaded, or a part of it is missing.
    """
    from transformers import AutoModelForSequenceClassification

    return _load(kind or AutoModelForSequenceClassification, path, settings, key, classifier=True)


def check_classifier(path: str, settings: ModelConfig, key: str, kind: Any = None) -> None:
    """The same by names and shapes alone, as `check_model`, before what the classifier is to be asked is made."""
    from transformers import AutoModelForSequenceClassification

    if getattr(load_config(path, settings, key), "quantization_config", None) is None:
        _load(kind or AutoModelForSequenceClassification, path, settings, key, classifier=True, hollow=True)


def attention_of(config: PretrainedConfig, asked: str, auto: Any) -> str:
    """The attention to make a model with: eager where the one asked for is SDPA and the model's code has none.

    Args: auto: transformers' class of the kind of model.
    """
    kind = auto._model_mapping.get(type(config), None)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    without = kind is not None and not any(getattr(one, "_supports_sdpa", True) for one in kinds)
    return "eager" if asked == "sdpa" and without else asked


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether a config is that of a classifier, whose score has been trained."""
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
    """Tell a classifier that is to be saved what pads, so that it reads the same token when transformers pads for it.

    Nothing where EOS pads: transformers would look for the last token that is none, and refuses to guess without.
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
    hollow: bool = False,
    **more: Any,
) -> PreTrainedModel:
    """The model, whose weights are those of the files at `path`: none missing, none left over.

    Args:
        kind: its class. classifier, new_score: see `weight_files.check_loaded`. more: for `from_pretrained`.
        hollow: whether names and shapes are to be checked alone; the model is then on the meta device.
    """
    config = _config(path, settings, key)
    if _pads_beyond(config) and config.get_text_config() is config:
        more |= {"pad_token_id": None}
    weight_files.check_files(path, key)
    if getattr(config, "quantization_config", None) is None:
        weight_files.check_kinds(path, key)
    more |= {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    more |= {"dtype": getattr(torch, settings.dtype), "output_loading_info": True, "ignore_mismatched_sizes": True}
    check = functools.partial(weight_files.check_loaded, path=path, key=key, classifier=classifier, new_score=new_score)
    try:
        with quiet():
            with loaded_whole() as sharded:
                # ZeRO-3's way of loading sees no weight that is too many, and missing ones would be made first
                if hollow or sharded or weight_files.are_too_few(path, sizes.weights_of(config), key):
                    lm, loaded = kind.from_pretrained(path, device_map="meta", **more)
                    check(loaded, lm)
            if hollow:
                return lm
            model, loaded = kind.from_pretrained(path, **quantized.arguments(settings), **more)
    except TrainError:
        raise
    except Exception as error:
        raise refuse(key, path, error) from error
    check(loaded, model)
    quantized.settle(model)
    _forget_padding(model)
    experts.follow_autocast(model)
    align(model)
    bad = not_finite(model)
    if bad is not None:
        raise TrainError(f"{key}: '{path}' holds weights that are not finite ({bad}); name a model whose weights are")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):  # attention keeps its rate as a number
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 - not declared on nn.Module
    return model


def _forget_padding(model: nn.Module) -> None:
    """Let the embedding of the token that pads be trained like any other: EOS may pad, and stands in prompts too.

    Padding itself is never attended to, so no gradient comes from it. Tables of positions count from their padding.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" not in name.rpartition(".")[2]:
            module.padding_idx = None


@contextlib.contextmanager
def loaded_whole() -> Iterator[bool]:
    """While it lasts, ZeRO-3 shards nothing that is loaded. Yields whether it would."""
    from transformers.integrations import deepspeed as integration

    known = integration._hf_deepspeed_config_weak_ref
    if known is None or not integration.is_deepspeed_zero3_enabled():
        yield False
        return
    integration.unset_hf_deepspeed_config()
    try:
        yield True
    finally:
        integration.set_hf_deepspeed_config(known())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout; each module's mode is given back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def align(model: nn.Module) -> None:
    """Put weights where PyTorch would have put them itself, at multiples of 64 bytes.

    Those of a file stand where the file has them, and on some CPUs a product with a matrix that stands elsewhere rounds
    in another way: a run that was continued would not be the run that was left alone.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def held(parameter: Any) -> torch.Tensor:
    """What this process holds of a weight: all of it, or its part where a backend has sharded it."""
    part = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3
    return part.to_local() if hasattr(part, "to_local") else part  # FSDP2


def copies(parameter: Any) -> list[torch.Tensor]:
    """The same, and all of it beside its part where ZeRO-3 keeps a small weight whole too."""
    whole = hasattr(parameter, "ds_id") and parameter.ds_status.name == "AVAILABLE"
    return [held(parameter), *([parameter.data] if whole else [])]


def numel(parameter: Any) -> int:
    """How many entries a weight has, over all processes."""
    return int(parameter.ds_numel) if hasattr(parameter, "ds_numel") else quantized.numel(parameter)


def shape(parameter: Any) -> tuple[int, ...]:
    """The shape of a weight, whole."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def ndim(parameter: Any) -> int:
    """How many dimensions a weight has, whole."""
    return len(shape(parameter))


def not_finite(model: nn.Module) -> str | None:
    """The name of the first weight that has a NaN or an infinity in what this process holds of it, or None."""
    return next((name for name, weight in model.named_parameters() if not quantized.is_finite(held(weight))), None)


def is_sharded(model: nn.Module) -> bool:
    """Whether DeepSpeed has sharded the weights of a model as it was loaded."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


@contextlib.contextmanager
def gathered(*some: nn.Module | None) -> Iterator[None]:
    """While it lasts, every process holds all weights of models that DeepSpeed shards, and nothing is trained."""
    with gathered_tensors([p for model in some if model is not None for p in model.parameters()]):
        yield


@contextlib.contextmanager
def gathered_tensors(some: Sequence[nn.Parameter], from_first: bool = False) -> Iterator[None]:
    """The same of single weights.

    Args: from_first: what the first process makes of them is what they are afterwards.
    """
    sharded = [p for p in some if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if from_first else None):
        yield


@contextlib.contextmanager
def gathered_by_layer(model: nn.Module) -> Iterator[None]:
    """While it lasts, a layer of a model that DeepSpeed shards is whole as long as it is called, and no longer.

    For use without gradients, before a backend has the model; all processes must make the same calls of it.
    """
    if not is_sharded(model):
        yield
        return
    import deepspeed

    layers = {layer for some in model.modules() if isinstance(some, nn.ModuleList) for layer in some}
    inside = {part for layer in layers for part in layer.modules() if part is not layer}
    hooks = []
    for module in model.modules():
        mine = list(module.parameters(recurse=module in layers))
        if mine and module not in inside:
            gathering = deepspeed.zero.GatheredParameters(mine)
            hooks += [
                module.register_forward_pre_hook(lambda *_, g=gathering: g.__enter__()),
                module.register_forward_hook(lambda *_, g=gathering: g.__exit__(None, None, None), always_call=True),
            ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def recompute_activations(model: Any) -> None:
    """Gradient checkpointing, non-reentrant, under the name that this version of transformers has for it."""
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def parameters(path: str, settings: ModelConfig) -> int:
    """How many weights the causal language model at `path` has, from its config alone."""
    from transformers import AutoModelForCausalLM

    hollow = hollow_of(AutoModelForCausalLM, load_config(path, settings), path, settings)
    return sum(p.numel() for p in hollow.parameters())


def hollow_of(kind: Any, config: PretrainedConfig, path: str, settings: ModelConfig) -> PreTrainedModel:
    """A model of this kind without weights, as the config at `path` has it. Raises: TrainError if there is none."""
    try:
        with quiet(), torch.device("meta"):
            return kind.from_config(config, trust_remote_code=settings.trust_remote_code)
    except Exception as error:
        raise refuse("model.path", path, error) from error


def note_dtype(folder: Path, dtype: str) -> None:
    """Let a saved model's config tell the dtype of its weights, where the model in memory has another."""

    def noted(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: dtype if k in ("dtype", "torch_dtype") and v is not None else noted(v) for k, v in value.items()}

    file = folder / "config.json"
    file.write_text(json.dumps(noted(json.loads(file.read_text())), indent=2, sort_keys=True) + "\n")


def vocabulary(config: PretrainedConfig) -> int:
    """Rows of the embedding, as the config declares them."""
    return int(config.get_text_config().vocab_size)


def check_same_vocabulary(policy: PretrainedConfig, reference: PretrainedConfig, path: str) -> None:
    """Raises: TrainError when the reference scores another vocabulary than the policy."""
    mine, other = vocabulary(policy), vocabulary(reference)
    if mine != other:
        raise TrainError(
            f"reference.path: '{path}' has a vocabulary of {other} tokens, the policy {mine}; "
            "KL and log-ratios need the same one (name a reference of the policy's family)"
        )


def check_same_tokens(policy: PreTrainedTokenizerBase, path: str, settings: ModelConfig) -> None:
    """Hold the policy's tokenizer to that in a reference's folder, which may have none: it reads the policy's ids.

    Raises: TrainError where a token that both know has another id in the reference, which then reads other text.
    """
    from transformers import AutoTokenizer

    if not any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return
    try:
        reference = AutoTokenizer.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
    except Exception as error:
        raise refuse("reference.path", path, error, "a tokenizer") from error
    mine, other = policy.get_vocab(), reference.get_vocab()
    moved = next((token for token in sorted(mine.keys() & other.keys()) if mine[token] != other[token]), None)
    if moved is not None:
        raise TrainError(
            f"reference.path: the tokenizer of '{path}' has {moved!r} as token {other[moved]}, the policy's as token "
            f"{mine[moved]}; KL and log-ratios need the same ids (name a reference of the policy's family)"
        )


def check_positions(config: PretrainedConfig, report: DataReport, max_length: int) -> None:
    """Raises: TrainError when rows of this file may be longer than the model has positions."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(p[-1] for name, p in report.lengths.items() if name != "prompt") + report.lengths["prompt"][-1]
    needed = min(longest, max_length)
    if limit is not None and needed > limit:
        raise TrainError(
            f"data.max_length: found {max_length}, and {report.path} has rows of up to {needed} tokens, but the model "
            f"has {limit} positions; use --data.max_length {limit}"
        )


def fingerprint(path: str, config: Any) -> str:
    """A hash of what the weights at `path` are: of the files in a folder, or the commit of a hub model.

    Of a folder: weights, their index, configs and code, in it and below it, by their paths in it.

    Raises: Unreadable.
    """
    folder = Path(path)
    if not folder.is_dir():
        return str(getattr(config, "_commit_hash", None) or path)
    digest = hashlib.sha256()
    for name in _model_files(folder):
        digest.update(name.encode())
        digest.update(bytes.fromhex(storage.sha256(folder / name)))
    return digest.hexdigest()[:16]


def _model_files(folder: Path) -> list[str]:
    """Paths in a model's folder of all that decides what its weights are; links are followed, once each."""
    found: list[str] = []
    seen: set[str] = set()
    for place, below, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        below[:] = [] if real in seen else [name for name in below if name[0] != "."]
        if real in seen:
            continue
        seen.add(real)
        for name in names:
            if name.endswith((".safetensors", ".bin", ".index.json", ".py")) or name in _CONFIGS:
                found.append((Path(place) / name).relative_to(folder).as_posix())
    return sorted(found)


def generation_config(path: str) -> str | None:
    """A hash of a folder's generation config, which decides where answers end; None where there is none.

    Raises: Unreadable.
    """
    content = storage.read_bytes(Path(path) / "generation_config.json")
    return None if content is None else hashlib.sha256(content).hexdigest()[:16]
