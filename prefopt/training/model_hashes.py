"""Hashes of the files of a model: what caches and resumed runs compare."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prefopt import storage

_CONFIGS = ("config.json", "adapter_config.json")


def fingerprint(path: str, config: Any) -> str:
    """A hash of what the weights at `path` are: of the files in a folder, or the commit of a hub model.

    Of a folder: weights, their index, configs and code, in it and below it, by their paths in it.

    Raises: Unreadable.
    """
    folder = Path(path)
    if not folder.is_dir():
        return str(getattr(config, "_commit_hash", None) or path)
    digest = storage.running_hash()
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


def generation_config_hash(path: str) -> str | None:
    """A hash of a folder's generation config, which decides where answers end; None where there is none.

    Raises: Unreadable.
    """
    content = storage.read_bytes(Path(path) / "generation_config.json")
    return None if content is None else storage.text_hash(content)[:16]
