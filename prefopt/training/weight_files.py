"""Whether the files of a model hold the weights that it needs: each under its name, in its shape, and no others.

transformers draws what is missing at random and drops what it does not know; what is found here is refused instead.
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
# What wrappers put into the names of weights: whose it is, and what to save instead.
_WRAPPERS = {
    "_orig_mod.": ("torch.compile", "model._orig_mod"),
    "_fsdp_wrapped_module.": ("FSDP", "its full state dict"),
    "_checkpoint_wrapped_module.": ("an activation checkpoint's wrapper", "the model inside"),
    "_forward_module.": ("Lightning", "the model inside"),
    _PEFT: ("peft", "model.merge_and_unload()"),
}
_DDP = ("DDP", "model.module")
# Tables that models of today compute by themselves and that older checkpoints have, and the heads of other losses.
_COMPUTED = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(attn|attention)\.(masked_)?bias|position_ids)$"
)
_VALUE_HEAD = re.compile(r"^v_head\.")
_LM_HEAD = re.compile(r"^(lm_head|embed_out|output_projection|cls\.predictions)\.")
_SCORE = "score."
_WHOLE = ("BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")  # whole numbers, as safetensors names them


# The files, from their headers alone --------------------------------------------------------------------------------


def check_files(path: str, key: str) -> None:
    """Whether the files of weights in a folder can be read, and are those that its index names.

    Nothing for a model on the hub, or a folder without such files, which whoever loads it refuses.

    Raises: TrainError naming `key`.
    """
    folder = Path(path)
    for file in sorted(folder.glob("*.*")) if folder.is_dir() else []:
        if file.exists():  # a pipe among them would be waited for
            _check_regular(file, key)
    adapter = folder / "adapter_model.safetensors"
    if os.path.lexists(adapter):
        _check_names((name.removeprefix(_PEFT) for name in names_in(adapter, key)), path, key)
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        file, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if os.path.lexists(file):
            names = names_in(file, key)
            _check_names(names, path, key)
            _check_experts(names, path, key)
            return
        if index.is_file():
            _check_shards(_weight_map(index, key), folder, index.name, key)
            return


def _weight_map(index: Path, key: str) -> Mapping[str, str]:
    """The file of each weight. Raises: TrainError for an index of another form, or one that leaves its folder."""
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
    if not isinstance(found.get("metadata"), dict):  # transformers cannot do without
        raise TrainError(f"{key}: '{index}' has no metadata, {wanted}")
    for name in mapped.values():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or not parts.name or "\0" in name:
            raise TrainError(f"{key}: '{index}' names {name!r}, expected files of the model's own folder")
    return mapped


def _check_shards(mapped: Mapping[str, str], folder: Path, index: str, key: str) -> None:
    _check_names(mapped, str(folder), key)
    held: dict[str, str] = {}
    for name in sorted(set(mapped.values())):
        if not (folder / name).is_file():
            raise TrainError(f"{key}: '{folder}' lacks {name}, which its {index} names (copy the whole model again)")
        inside = names_in(folder / name, key)
        twice = next((weight for weight in inside if weight in held), None)
        if twice is not None:
            raise TrainError(f"{key}: '{folder}' holds {twice} in {held[twice]} and in {name}, expected one of them")
        held |= dict.fromkeys(inside, name)
    _check_experts(held, str(folder), key)
    lost = next((weight for weight, name in mapped.items() if held and held.get(weight) != name), None)
    if lost is not None:
        raise TrainError(f"{key}: '{folder}': its {index} names {lost} in {mapped[lost]}, which does not hold it")


def names_in(file: Path, key: str) -> list[str]:
    """Names of the weights in a file of safetensors; none of a file of another kind. Raises: as `shapes_in`."""
    _check_regular(file, key)
    return [*shapes_in(file, key)] if file.suffix == ".safetensors" else []


def _check_regular(file: Path, key: str) -> None:
    try:
        storage.check_regular(file)
    except OSError as error:
        raise TrainError(f"{key}: '{file}' cannot be read: {error.strerror or error}") from None


def check_kinds(path: str, key: str) -> None:
    """Whether the weights in a folder are fractions: whole ones are a quantised model's, whose scales are elsewhere.

    Raises: TrainError naming `key` and the first such weight.
    """
    from safetensors import safe_open

    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as header:
            for name in header.keys():  # noqa: SIM118
                kind = header.get_slice(name).get_dtype()
                if name.endswith("weight") and kind in _WHOLE:
                    raise TrainError(
                        f"{key}: '{file}' holds {name} as whole numbers ({kind}), expected floating-point weights "
                        "(name the model that this one was quantised from)"
                    )


def shapes_in(file: Path, key: str) -> dict[str, tuple[int, ...]]:
    """The shape of each weight in a safetensors file, from its header.

    Raises: TrainError for a file that is damaged, cut short or not to be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as opened:  # safetensors has one error for all that it cannot open
            opened.read(1)
        with safe_open(file, framework="pt") as header:
            return {name: tuple(header.get_slice(name).get_shape()) for name in header.keys()}  # noqa: SIM118
    except OSError as error:
        raise TrainError(f"{key}: '{file}' cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise TrainError(f"{key}: '{file}' is damaged or cut short ({reason}); copy it again") from None


def are_too_few(path: str, expected: float, key: str) -> bool:
    """Whether the safetensors files in a folder hold far fewer weights than a model should have."""
    files = sorted(Path(path).glob("model*.safetensors"))
    found = sum(math.prod(shape) for file in files for shape in shapes_in(file, key).values())
    return bool(files) and found < expected / 4


def _check_names(names: Iterable[str], path: str, key: str) -> None:
    """Raises: TrainError for names that a wrapper has made."""
    wrapped = wrapper_of(names)
    if wrapped is not None:
        raise TrainError(f"{key}: '{path}' holds {wrapped}")


def _check_experts(names: Iterable[str], path: str, key: str) -> None:
    """Raises: TrainError for an expert that lacks what its neighbours have: one weight is made of all of them."""
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


def wrapper_of(names: Iterable[str]) -> str | None:
    """What is wrong with names that a wrapper has made, and the fix; None where no wrapper has."""
    for name in names:
        inside = [prefix for prefix in _WRAPPERS if name.startswith(prefix) or f".{prefix}" in name]
        inside += ["module."] if name.startswith("module.") else []
        if inside:
            wrapper, instead = _WRAPPERS.get(inside[0], _DDP)
            return (
                f"{name}: '{inside[0]}' is what {wrapper} puts before a name; save {instead} instead, or take "
                f"'{inside[0]}' out of the names in the file"
            )
    return None


# What a model was given of them ---------------------------------------------------------------------------------------


def check_loaded(
    loaded: Mapping[str, Any], model: Any, path: str, key: str, *, classifier: bool = False, new_score: bool = False
) -> None:
    """Whether a model has got all that it needs from its files, and they held nothing that it does not know.

    Known exceptions: tied weights and what the model's family declares, which transformers has taken out already; a
    new score of a classifier that is made from a language model, and that one's head; a value head beside a language
    model; layers that predict further tokens, and tables that are computed.

    Args:
        loaded: transformers' loading info. model: as it was loaded, or on the meta device.
        classifier: whether `model` is one. new_score: whether its score may be missing.
    Raises: TrainError naming `key` and the first such weight.
    """
    missing = [name for name in loaded["missing_keys"] if not (new_score and name.startswith(_SCORE))]
    unexpected = [name for name in loaded["unexpected_keys"] if not _is_harmless(name, model, classifier)]
    _check_names(sorted(unexpected), path, key)
    if loaded["mismatched_keys"]:
        name, found, wanted = min(loaded["mismatched_keys"])
        raise TrainError(
            f"{key}: '{path}' holds {name} of shape {_shape(found)}, and its config.json asks for {_shape(wanted)}"
            f"{_others(loaded['mismatched_keys'])}; expected weights and config of one model"
        )
    if missing:
        score_alone = classifier and all(name.startswith(_SCORE) for name in missing)
        kind = "a trained classifier" if score_alone else f"a complete checkpoint of {type(model).__name__}"
        raise TrainError(
            f"{key}: '{path}' has no weights for {min(missing)}{_others(missing)}, which would be drawn at random; "
            f"expected {kind}"
        )
    if unexpected:
        raise TrainError(
            f"{key}: '{path}' holds {min(unexpected)}{_others(unexpected)}, which {type(model).__name__} does not "
            "know; expected weights and config of one model"
        )


def _is_harmless(name: str, model: Any, classifier: bool) -> bool:
    if _COMPUTED.search(name) or (_LM_HEAD if classifier else _VALUE_HEAD).search(name):
        return True
    text = model.config.get_text_config()
    further = getattr(text, "num_nextn_predict_layers", None) or 0
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    first = getattr(text, "num_hidden_layers", None)
    return bool(further and layer and first is not None and first <= int(layer[1]) < first + further)


def _others(names: Sequence[Any] | set[Any]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def check_path(key: str, path: str) -> None:
    """Refuse, without any import, a model path that can be neither a folder nor a hub id.

    Raises: TrainError naming `key`.
    """
    folder = Path(path)  # `~` is the shell's to expand
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if folder.is_dir() or not (looks_local or folder.exists()):
        return
    siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    found = "is a file" if folder.is_file() else "does not exist"
    raise TrainError(
        f"{key}: '{path}' {found}, expected the folder of a model or a hub id{did_you_mean(folder.name, siblings)}"
    )
