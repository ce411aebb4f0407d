"""Checks that the files of a model hold exactly the weights that it needs, each with the expected name and shape.

transformers initialises missing weights at random and ignores unknown ones; here both are errors.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from prefopt import storage
from prefopt.errors import TrainError, did_you_mean

_PEFT = "base_model.model."
# Prefix that a wrapper adds to the names of weights -> (the wrapper, what to save instead).
_WRAPPERS = {
    "_orig_mod.": ("torch.compile", "model._orig_mod"),
    "_fsdp_wrapped_module.": ("FSDP", "its full state dict"),
    "_checkpoint_wrapped_module.": ("an activation checkpoint's wrapper", "the model inside"),
    "_forward_module.": ("Lightning", "the model inside"),
    _PEFT: ("peft", "model.merge_and_unload()"),
}
_DDP = ("DDP", "model.module")
# Tables that current models compute themselves but older checkpoints contain, and the heads of other losses.
_COMPUTED_TABLES = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(attn|attention)\.(masked_)?bias|position_ids)$"
)
_VALUE_HEAD = re.compile(r"^v_head\.")
_LM_HEAD = re.compile(r"^(lm_head|embed_out|output_projection|cls\.predictions)\.")
_SCORE = "score."
_INTEGER_DTYPES = ("BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")  # safetensors' names


# The files, from their headers alone --------------------------------------------------------------------------------


def check_files(path: str, key: str) -> None:
    """Check that the weight files in a folder can be read and match its index.

    Models on the hub, and folders without weight files, are not checked here: loading them raises an error.

    Raises: TrainError naming `key`.
    """
    folder = Path(path)
    for file in sorted(folder.glob("*.*")) if folder.is_dir() else []:
        if file.exists():  # opening a named pipe would block
            _check_regular(file, key)
    adapter = folder / "adapter_model.safetensors"
    if os.path.lexists(adapter):
        _check_names((name.removeprefix(_PEFT) for name in weight_names(adapter, key)), path, key)
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        file, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if os.path.lexists(file):
            names = weight_names(file, key)
            _check_names(names, path, key)
            _check_experts(names, path, key)
            return
        if index.is_file():
            _check_shards(_weight_map(index, key), folder, index.name, key)
            return


def _weight_map(index: Path, key: str) -> Mapping[str, str]:
    """The file of each weight. Raises: TrainError for an invalid index, or a path that leaves the folder."""
    wanted = "expected a JSON object with metadata, and a weight_map that names the file of each weight"
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainError(f"{key}: '{index}' cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise TrainError(f"{key}: '{index}' is not JSON, {wanted}") from None
    mapped = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(mapped, dict) or not mapped or not all(isinstance(name, str) for name in mapped.values()):
        raise TrainError(f"{key}: '{index}' has no weight_map, {wanted}")
    if not isinstance(found.get("metadata"), dict):  # transformers reads it without a check
        raise TrainError(f"{key}: '{index}' has no metadata, {wanted}")
    for name in mapped.values():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or not parts.name or "\0" in name:
            raise TrainError(f"{key}: '{index}' names {name!r}, expected file names in the model's folder")
    return mapped


def _check_shards(mapped: Mapping[str, str], folder: Path, index: str, key: str) -> None:
    """Raises: TrainError when a shard is missing, holds a weight of another shard, or lacks one of the index."""
    _check_names(mapped, str(folder), key)
    held: dict[str, str] = {}
    for name in sorted(set(mapped.values())):
        if not (folder / name).is_file():
            raise TrainError(f"{key}: '{folder}' lacks {name}, which its {index} names (copy the whole model again)")
        inside = weight_names(folder / name, key)
        twice = next((weight for weight in inside if weight in held), None)
        if twice is not None:
            raise TrainError(f"{key}: '{folder}' holds {twice} in {held[twice]} and in {name}, expected one of them")
        held |= dict.fromkeys(inside, name)
    _check_experts(held, str(folder), key)
    lost = next((weight for weight, name in mapped.items() if held and held.get(weight) != name), None)
    if lost is not None:
        raise TrainError(f"{key}: '{folder}': its {index} names {lost} in {mapped[lost]}, which does not hold it")


def weight_names(file: Path, key: str) -> list[str]:
    """Names of the weights in a safetensors file; empty for another format. Raises: as `weight_shapes`."""
    _check_regular(file, key)
    return [*weight_shapes(file, key)] if file.suffix == ".safetensors" else []


def _check_regular(file: Path, key: str) -> None:
    try:
        storage.check_regular(file)
    except OSError as error:
        raise TrainError(f"{key}: '{file}' cannot be read: {error.strerror or error}") from None


def check_floating_point(path: str, key: str) -> None:
    """Check that weights are floating-point numbers; integers are from a quantised model, whose scales are not read.

    Raises: TrainError naming `key` and the first integer weight.
    """
    from safetensors import safe_open

    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as header:
            for name in header.keys():  # noqa: SIM118
                kind = header.get_slice(name).get_dtype()
                if name.endswith("weight") and kind in _INTEGER_DTYPES:
                    raise TrainError(
                        f"{key}: '{file}' holds {name} as integers ({kind}), expected floating-point weights "
                        "(use the model from which this one was quantised)"
                    )


def weight_shapes(file: Path, key: str) -> dict[str, tuple[int, ...]]:
    """The shape of each weight in a safetensors file, from its header.

    Raises: TrainError for a file that is damaged, truncated or unreadable.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as opened:  # safetensors raises the same error for every cause
            opened.read(1)
        with safe_open(file, framework="pt") as header:
            return {name: tuple(header.get_slice(name).get_shape()) for name in header.keys()}  # noqa: SIM118
    except OSError as error:
        raise TrainError(f"{key}: '{file}' cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise TrainError(f"{key}: '{file}' is damaged or truncated ({reason}); copy it again") from None


def hold_too_few_weights(path: str, expected: float, key: str) -> bool:
    """Whether the safetensors files in a folder hold less than a quarter of the expected number of weights."""
    files = sorted(Path(path).glob("model*.safetensors"))
    found = sum(math.prod(shape) for file in files for shape in weight_shapes(file, key).values())
    return bool(files) and found < expected / 4


def _check_names(names: Iterable[str], path: str, key: str) -> None:
    """Raises: TrainError for names with a wrapper's prefix."""
    wrapped = wrapper_problem(names)
    if wrapped is not None:
        raise TrainError(f"{key}: '{path}' holds {wrapped}")


def _check_experts(names: Iterable[str], path: str, key: str) -> None:
    """Raises: TrainError for an expert that lacks a weight of its layer's other experts; loading stacks them."""
    layers: dict[str, dict[str, set[str]]] = {}
    for name in names:
        found = re.match(r"(.*\.experts)\.(\d+)\.(.+)", name)
        if found:
            layers.setdefault(found[1], {}).setdefault(found[2], set()).add(found[3])
    for layer, experts in layers.items():
        every = set().union(*experts.values())
        for number, parts in experts.items():
            if parts != every:
                lost = f"{layer}.{number}.{min(every - parts)}"
                raise TrainError(f"{key}: '{path}' has no weights for {lost}; expected a complete checkpoint")


def wrapper_problem(names: Iterable[str]) -> str | None:
    """An error text for the first name with a wrapper's prefix, with the fix; None if no name has one."""
    for name in names:
        inside = [prefix for prefix in _WRAPPERS if name.startswith(prefix) or f".{prefix}" in name]
        inside += ["module."] if name.startswith("module.") else []
        if inside:
            wrapper, instead = _WRAPPERS.get(inside[0], _DDP)
            return (
                f"{name}: '{inside[0]}' is a prefix that {wrapper} adds to names; save {instead} instead, or remove "
                f"'{inside[0]}' from the names in the file"
            )
    return None


# The weights that a model has loaded ----------------------------------------------------------------------------------


def check_loaded(
    loaded: Mapping[str, Any], model: Any, path: str, key: str, *, classifier: bool = False, new_score: bool = False
) -> None:
    """Check that a model has loaded all of its weights, and that its files held no unknown ones.

    Exceptions: tied weights and those that the model's class declares, which transformers has removed from the lists
    already; the new score head of a classifier that is created from a language model, and the language model's head; a
    value head beside a language model; layers of multi-token prediction; and tables that are computed.

    Args:
        loaded: transformers' loading info. model: as it was loaded, or on the meta device.
        classifier: whether `model` is a classifier. new_score: whether its score head may be missing.
    Raises: TrainError naming `key` and the first missing, mismatched or unexpected weight.
    """
    missing = [name for name in loaded["missing_keys"] if not (new_score and name.startswith(_SCORE))]
    unexpected = [name for name in loaded["unexpected_keys"] if not _may_be_ignored(name, model, classifier)]
    _check_names(sorted(unexpected), path, key)
    if loaded["mismatched_keys"]:
        name, found, wanted = min(loaded["mismatched_keys"])
        raise TrainError(
            f"{key}: '{path}' holds {name} of shape {_shape(found)}, but its config.json requires {_shape(wanted)}"
            f"{_and_more(loaded['mismatched_keys'])}; expected weights and config of the same model"
        )
    if missing:
        score_alone = classifier and all(name.startswith(_SCORE) for name in missing)
        kind = "a trained classifier" if score_alone else f"a complete checkpoint of {type(model).__name__}"
        raise TrainError(
            f"{key}: '{path}' has no weights for {min(missing)}{_and_more(missing)}, which would be initialised at "
            f"random; expected {kind}"
        )
    if unexpected:
        raise TrainError(
            f"{key}: '{path}' holds {min(unexpected)}{_and_more(unexpected)}, which {type(model).__name__} does not "
            "have; expected weights and config of the same model"
        )


def _may_be_ignored(name: str, model: Any, classifier: bool) -> bool:
    """Whether an unexpected weight is one of the exceptions of `check_loaded`."""
    if _COMPUTED_TABLES.search(name) or (_LM_HEAD if classifier else _VALUE_HEAD).search(name):
        return True
    text = model.config.get_text_config()
    further = getattr(text, "num_nextn_predict_layers", None) or 0  # layers of multi-token prediction (DeepSeek-V3)
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    first = getattr(text, "num_hidden_layers", None)
    return bool(further and layer and first is not None and first <= int(layer[1]) < first + further)


def _and_more(names: Sequence[Any] | set[Any]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def check_path(key: str, path: str) -> None:
    """Check, without importing transformers, that a model path is a folder or may be a hub id.

    Raises: TrainError naming `key`.
    """
    folder = Path(path)  # `~` is expanded by the shell
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if folder.is_dir() or not (looks_local or folder.exists()):
        return
    siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    found = "is a file" if folder.is_file() else "does not exist"
    raise TrainError(
        f"{key}: '{path}' {found}, expected the folder of a model or a hub id{did_you_mean(folder.name, siblings)}"
    )
