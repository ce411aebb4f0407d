"""The policy that answers: its thought format and end tokens, its size, and the inference engine that has it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefopt import generation, storage
from prefopt.data.encoder import pad_token
from prefopt.errors import ConfigError, TrainError
from prefopt.generation.base import Engine
from prefopt.generation.ends import end_tokens_of
from prefopt.settings.infer import InferConfig
from prefopt.thoughts import ThoughtFormat
from prefopt.training import adapter_loading, model_checks, model_hashes, model_sources, models

_SETTINGS = "generation_config.json"
_THOUGHT = ("template", "thought_marker", "response_marker", "on_repeated_marker")


@dataclass(frozen=True)
class UnloadedPolicy:
    """A policy whose weights are not loaded yet.

    Args:
        weights: where they are. tokenizer: theirs.
        thought: how it is asked to think, if it is.
        stop: texts that end its answers beside its own EOS and end-of-turn tokens, those of the user first.
        identity: a hash of the weights, base and adapter, and of their generation config.
        parameters: how many there are; None where that cannot be seen.
        note: a sentence to print once.
    """

    weights: model_sources.ModelSource
    tokenizer: Any
    thought: ThoughtFormat
    stop: tuple[str, ...]
    identity: str
    parameters: int | None
    note: str | None = None

    def open(self, config: InferConfig) -> Engine:
        """The engine that answers with it. Raises: RoundError or TrainError when it cannot be opened."""
        device = device_here()

        def load() -> Any:
            lm: Any = adapter_loading.load_frozen(self.weights, config.model, "model.path")
            return lm.to(device).eval()

        return generation.make(
            config.generate, path=self.weights.path, load=load, model=config.model, tokenizer=self.tokenizer
        )


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def find(path: str, config: InferConfig) -> UnloadedPolicy:
    """What `path` holds, read from its small files alone.

    Raises: TrainError for what is no language model; ConfigError for a thought format that cannot be read.
    """
    weights = model_sources.find(path, config.model)
    tokenizer = models.load_tokenizer(
        *model_sources.tokenizer_path(weights, config.model), config.chat_template, template_key="chat_template"
    )
    tokenizer.pad_token_id, note = pad_token(
        tokenizer, model_checks.vocabulary_size(models.load_config(weights.base, weights.base_settings(config.model)))
    )
    settings = _settings(weights.path, config) or (_settings(weights.base, config) if weights.adapter else {})
    places = [weights.path] if weights.adapter is None else [weights.base, weights.path]
    return UnloadedPolicy(
        weights=weights,
        tokenizer=tokenizer,
        thought=_thought(settings, weights.path),
        stop=(*config.generate.stop, *_ends(settings, weights, config, tokenizer)),
        identity="-".join([*(_hash(place, weights, config) for place in places), *_settings_hash(settings)]),
        parameters=_parameters(places),
        note=note,
    )


def _hash(place: str, weights: model_sources.ModelSource, config: InferConfig) -> str:
    if Path(place).is_dir():
        return model_hashes.fingerprint(place, None)
    return model_hashes.fingerprint(place, models.load_config(weights.base, weights.base_settings(config.model)))


def _settings(path: str, config: InferConfig) -> dict[str, Any]:
    """The generation config beside a model or an adapter as it was written; {} where there is none."""
    from transformers.utils import cached_file

    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(path, _SETTINGS, revision=config.model.revision, **quietly)
    if file is None:
        return {}
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise TrainError(f"{file}: cannot be read: {error}, expected the JSON object of a generation config") from None
    return found


def _settings_hash(settings: dict[str, Any]) -> list[str]:
    """Of a generation config, which decides where answers end and what of them is a thought; none where none is."""
    return [storage.digest(settings)[:16]] if settings else []


def _thought(settings: dict[str, Any], path: str) -> ThoughtFormat:
    value = settings.get("thought")
    if value is None:
        return ThoughtFormat(None)
    where = f"{path}: {_SETTINGS}: thought"
    if not isinstance(value, dict) or set(value) - {*_THOUGHT} or not {"template", "response_marker"} <= set(value):
        raise ConfigError(f"{where}: found {value!r}, expected an object with {', '.join(_THOUGHT)}")
    form = ThoughtFormat(**value)
    texts = (form.template, form.response_marker, form.thought_marker)
    if not all(isinstance(text, str) for text in texts) or not form.response_marker.strip():
        raise ConfigError(f"{where}: found {value!r}, expected texts, and a response marker")
    if form.on_repeated_marker not in ("error", "first"):
        raise ConfigError(f"{where}: on_repeated_marker: found {form.on_repeated_marker!r}, expected error or first")
    return form


def _ends(
    settings: dict[str, Any], weights: model_sources.ModelSource, config: InferConfig, tokenizer: Any
) -> list[str]:
    """What ends an answer by the generation config, and the engine would not know by itself.

    Stop strings, and the end tokens of an adapter's own config: inference engines read that of its base.
    """
    texts = settings.get("stop_strings") or []
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(f"{weights.path}: {_SETTINGS}: stop_strings: found {texts!r}, expected texts")
    named = settings.get("eos_token_id")
    named = named if isinstance(named, list) else [named]
    known = end_tokens_of(weights, config.model, tokenizer)
    more = [int(token) for token in named if token is not None and int(token) not in known]
    return texts + [
        str(tokenizer.added_tokens_decoder[token]) for token in more if token in tokenizer.added_tokens_decoder
    ]


def _parameters(places: list[str]) -> int | None:
    """Weights in the safetensors files of some folders, from their headers alone; None where there are none."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for place in places:
        files = sorted(Path(place).glob("*.safetensors")) if Path(place).is_dir() else []
        if not files:
            return None
        try:
            for file in files:
                with safe_open(file, framework="pt") as weights:
                    total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
    return total
