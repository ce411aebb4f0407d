"""The reference cache on disk: what a reference computes for each loss token, found by the content of a sequence.

A cache is a folder named by the hash of everything its values depend on (weights, tokens, masks, precision, attention,
head) and of nothing else: runs that differ in learning rate, beta, method or output share it. Values are found by the
content of a sequence, so no order, split or mixture of the data can give one sequence the values of another.

Manifest and index are verified when a cache is opened, each value when it is read: caches of hidden states are too
large to be read at every start.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt import storage
from prefopt.errors import TrainError
from prefopt.storage import Damaged, Unreadable, write_by, write_sealed
from prefopt.types import EncodedPair, PairBatch

FORMAT = 1  # raise it whenever the same identity would give other values, or the files have another layout
MANIFEST, INDEX, PASSES = "cache.json", "index.safetensors", "passes.jsonl"


def sequence_key(prompt: Sequence[int], completion: Sequence[int], mask: Sequence[bool]) -> bytes:
    """16 bytes that identify a sequence by its tokens and its loss mask."""
    lengths = array("i", (len(prompt), len(completion)))
    return storage.sequence_hash([lengths, array("i", prompt), array("i", completion), bytearray(mask)])


def sequences_of(pair: EncodedPair, need_rejected: bool) -> list[tuple[bytes, int]]:
    """(key, number of loss tokens) of the chosen completion and, where it is read, of the rejected one."""
    sides = [(pair.chosen_ids, pair.chosen_mask)]
    if need_rejected:
        sides.append((pair.rejected_ids or [], pair.rejected_mask or []))
    return [(sequence_key(pair.prompt_ids, ids, mask), sum(mask)) for ids, mask in sides]


def checksum(key: bytes, values: torch.Tensor) -> int:
    """A checksum that binds values to their sequence."""
    return zlib.crc32(values.contiguous().view(torch.uint8).numpy().tobytes(), zlib.crc32(key))


def read_shard(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in ("key", "end", "check", "values")}


def complete(folder: Path, names: Sequence[str], identity: Mapping[str, Any], tokens: Mapping[str, Any]) -> None:
    """Write the index of all shards, then the manifest, which makes the cache complete."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    keys, places = [], []
    for number, name in enumerate(names):
        with safe_open(folder / name, framework="pt") as file:
            keys.append(file.get_tensor("key").clone())
        places.append(torch.stack((torch.full((len(keys[-1]),), number), torch.arange(len(keys[-1]))), 1))
    key, place = torch.cat(keys), torch.cat(places)
    order = key[:, 0].argsort(stable=True)
    index = {"key": key[order].contiguous(), "place": place[order].contiguous()}
    write_by(folder / INDEX, lambda scratch: save_file(index, scratch))
    sizes = {name: (folder / name).stat().st_size for name in (*names, INDEX)}
    manifest = {"identity": identity, "pairs": tokens["pairs"], "scored": tokens["scored"], "bytes": sizes}
    write_sealed(folder / MANIFEST, manifest | {"index": storage.sha256(folder / INDEX)})


class CachedReference:
    """One open cache folder.

    Args: folder: a complete cache. identity: what its values must depend on, by name.
    Raises: TrainError when its identity is another one, or a file is missing or damaged.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        from safetensors import safe_open

        self.folder = folder
        try:
            manifest = storage.read_sealed(folder / MANIFEST, unsealed=True) or {}
            found, sizes = manifest["identity"], dict(manifest["bytes"])
        except (Damaged, KeyError, TypeError, ValueError):
            raise self.error(f"has a {MANIFEST} that was edited or damaged") from None
        for name in sorted(found.keys() | identity.keys()):
            if found.get(name) != identity.get(name):
                raise self.error(f"was computed with another {name}: {found.get(name)}, expected {identity.get(name)}")
        for name, size in sizes.items():
            path = folder / name
            if not storage.is_there(path):
                raise self.error(f"lacks {name}")
            if path.stat().st_size != size:
                raise self.error(f"holds {path.stat().st_size} bytes of {name}, expected {size}")
        if "index" in manifest and storage.sha256(folder / INDEX) != manifest["index"]:
            raise self.error(f"has an {INDEX} that does not match its hash")
        names = sorted(name for name in sizes if name != INDEX)
        try:
            for name in (*names, INDEX):  # where a library reads it, the system's error would look like damage
                with storage.opened(folder / name) as file:
                    file.read(1)
            self._shards = [safe_open(folder / name, framework="pt").__enter__() for name in names]
            index = safe_open(folder / INDEX, framework="pt").__enter__()
            self._key, self._place = (index.get_tensor(name).numpy() for name in ("key", "place"))
        except Unreadable:
            raise
        except Exception as error:  # whatever a damaged file raises
            raise self.error(f"cannot be read: {str(error).splitlines()[0]}") from None
        self._open: dict[int, dict[str, torch.Tensor]] = {}

    def no_values(self) -> torch.Tensor:
        """A tensor of no tokens, in the dtype and width of the cached values."""
        return self._shards[0].get_slice("values")[:0]

    def error(self, what: str) -> TrainError:
        return TrainError(f"reference.cache: {self.folder} {what}; delete the folder, and it is recomputed")

    def of(self, key: bytes) -> torch.Tensor | None:
        """The values of a sequence, `(loss tokens,)` or `(loss tokens, H)`; None where the cache does not have it.

        Raises: TrainError when they do not match their checksum.
        """
        high, low = np.frombuffer(key, np.int64)
        at = int(np.searchsorted(self._key[:, 0], high))
        while at < len(self._key) and self._key[at, 0] == high and self._key[at, 1] != low:
            at += 1
        if at == len(self._key) or tuple(self._key[at]) != (high, low):
            return None
        shard, row = map(int, self._place[at])
        if shard not in self._open:
            try:
                self._open[shard] = {name: self._shards[shard].get_tensor(name) for name in ("end", "check", "values")}
            except Exception as error:  # whatever a damaged file raises
                raise self.error(f"cannot be read: {str(error).splitlines()[0]}") from None
        tensors = self._open[shard]
        begin = int(tensors["end"][row - 1]) if row else 0
        values = tensors["values"][begin : int(tensors["end"][row])]
        if checksum(key, values) != int(tensors["check"][row]):
            raise self.error("holds values that do not match their checksum")
        return values


class ReferenceValues:
    """The cached values of all pairs of a run. Args: kind: `logps` or `hidden`."""

    def __init__(self, caches: Sequence[CachedReference], kind: str) -> None:
        self._caches, self.kind = caches, kind

    @property
    def in_bfloat16(self) -> bool:
        """Whether the cached values are bfloat16, whatever the precision of the run."""
        return self._empty().dtype == torch.bfloat16

    def fill(self, batch: PairBatch, pairs: Sequence[EncodedPair]) -> PairBatch:
        """The batch with the reference's values.

        Raises: TrainError for a pair that no cache of this run has.
        """
        need_rejected = batch.rejected_lengths is not None
        both = [sequences_of(pair, need_rejected) for pair in pairs]
        parts = []
        for side in range(2 if need_rejected else 1):
            for pair, sequences in zip(pairs, both, strict=True):
                parts.append(self._of(sequences[side][0], pair))
        values = torch.cat(parts) if parts else self._empty()
        return replace(batch, ref_logps=values) if self.kind == "logps" else replace(batch, ref_hidden=values)

    def _empty(self) -> torch.Tensor:
        return self._caches[0].no_values()

    def _of(self, key: bytes, pair: EncodedPair) -> torch.Tensor:
        for cache in self._caches:
            found = cache.of(key)
            if found is not None:
                return found
        where = ", ".join(str(cache.folder) for cache in self._caches)
        raise TrainError(f"{pair.where or 'a pair'}: the reference's values are in none of its caches ({where})")
