"""What a reference says of each scored token, computed once and kept on disk.

A cache is a folder named by the hash of all that its numbers depend on (weights, tokens, masks, precision, attention,
head) and of nothing else: runs that differ in learning rate, beta, method or output share it. Values are found by the
content of a sequence, so no order, split or mixture of the data can give one sequence the values of another.

Manifest and index are verified when a cache is opened, each value when it is read: caches of hidden states are too
large to be read at every start.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import SystemRandom
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from prefopt import storage
from prefopt.data.collate import collate
from prefopt.data.loader import padded_length
from prefopt.errors import TrainError
from prefopt.settings import RunConfig
from prefopt.storage import Damaged, Lock, Unreadable, write_by, write_sealed
from prefopt.training import adapters, models, sharding
from prefopt.training.forward import PolicyWithReference, scored_states, to_device, token_stats_of
from prefopt.training.launcher import print_rank_0
from prefopt.training.layout_choice import choose_layouts, relative_gap
from prefopt.training.logits import head_scaling
from prefopt.training.runtime import Runtime
from prefopt.training.step0_check import tolerance
from prefopt.types import EncodedPair, PairBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1  # raise it whenever the same identity would give other numbers, or files are laid out in another way
SAMPLE = 4  # pairs of each cache that are computed again when it is opened
_MANIFEST, _INDEX, _PASSES = "cache.json", "index.safetensors", "passes.jsonl"
_SHARD_BYTES = 64 << 20  # of values in one file, about: what a killed pass does again
_SHARD_PAIRS = 4096  # at most


@dataclass(frozen=True)
class Source:
    """Pairs that one pass covers. Args: fingerprint: a hash of their content and order."""

    pairs: Sequence[EncodedPair]
    fingerprint: str


@dataclass(frozen=True)
class Oracle:
    """The reference itself, as long as there is something to ask it.

    Args:
        lm: on the run's device; with an adapter, or without.
        frozen: which weights of `lm` are the reference, where `lm` is the policy and has an adapter.
        weights: hashes of what it was loaded from, by name.
    """

    lm: PreTrainedModel
    frozen: adapters.Frozen | None
    weights: Mapping[str, str | None]

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        with adapters.as_reference(self.lm, self.frozen) if self.frozen else contextlib.nullcontext():
            yield


# What a cache is of -----------------------------------------------------------------------------------------------


def identity(config: RunConfig, oracle: Oracle) -> dict[str, Any]:
    """All that a kept number depends on beside the tokens, by name."""
    scale, softcap = head_scaling(oracle.lm)
    return {
        "format": FORMAT,
        "kind": config.reference.cache,
        **{f"weights.{name}": value for name, value in oracle.weights.items()},
        "dtype": config.model.dtype,
        "mixed_precision": config.train.mixed_precision,
        "attention": config.model.attention,
        "quantize": config.model.quantize,
        "compute_dtype": config.model.compute_dtype,
        "head.scale": scale,
        "head.softcap": softcap,
        "stored": _stored(config),
    }


def _stored(config: RunConfig) -> str:
    """The dtype of kept values."""
    if config.reference.cache == "hidden":
        return config.reference.cache_dtype
    return "float64" if config.model.dtype == "float64" else "float32"


def sequence_key(prompt: Sequence[int], completion: Sequence[int], mask: Sequence[bool]) -> bytes:
    """16 bytes that name a sequence by its tokens and by which of them are scored."""
    lengths = array("i", (len(prompt), len(completion)))
    return storage.sequence_hash([lengths, array("i", prompt), array("i", completion), bytearray(mask)])


def _sequences(pair: EncodedPair, need_rejected: bool) -> list[tuple[bytes, int]]:
    """(key, scored tokens) of the chosen side and, where it is read, of the rejected one."""
    sides = [(pair.chosen_ids, pair.chosen_mask)]
    if need_rejected:
        sides.append((pair.rejected_ids or [], pair.rejected_mask or []))
    return [(sequence_key(pair.prompt_ids, ids, mask), sum(mask)) for ids, mask in sides]


def _tokens(source: Source, need_rejected: bool, cache_dir: Path) -> dict[str, Any]:
    """A hash of the tokens and masks of a source, and how many they are; remembered by the source's fingerprint."""
    name = storage.text_hash(f"{FORMAT} {source.fingerprint} {need_rejected}")[:32]
    memo = cache_dir / "tokens" / f"{name}.json"
    with contextlib.suppress(Damaged, Unreadable, KeyError):  # to hash them again costs time alone
        known = storage.read_sealed(memo) or {}
        return {"sha256": known["content"], "pairs": known["pairs"], "scored": known["scored"]}
    digest, scored = storage.running_hash(), 0
    for pair in source.pairs:
        for key, count in _sequences(pair, need_rejected):
            digest.update(key)
            scored += count
    found = {"sha256": digest.hexdigest(), "pairs": len(source.pairs), "scored": scored}
    write_sealed(memo, {"content": found["sha256"], "pairs": found["pairs"], "scored": scored})
    return found


# Getting it -------------------------------------------------------------------------------------------------------


def obtain(
    config: RunConfig,
    runtime: Runtime,
    oracle: Oracle,
    sources: Sequence[Source],
    cache_dir: Path,
    pad_id: int,
) -> ReferenceValues:
    """The values of all pairs of the sources: found on disk, or computed by one pass that a later call continues.

    Of several runs that need the same cache one computes and the others wait; its processes share the work. A random
    sample of what was found is computed again.

    Args:
        oracle: asked for what is missing and for the sample.
        cache_dir: parent of all caches.
        pad_id: fills batches.
    Raises: TrainError for a cache that is not what it says it is, or a disk without room.
    """
    work = _Pass(config, runtime, oracle, pad_id)
    kept = [work.folder(source, cache_dir) for source in sources if len(source.pairs)]
    return ReferenceValues(kept, config.reference.cache)


class _Pass:
    """One run's way to its caches. All processes call each method together."""

    def __init__(self, config: RunConfig, runtime: Runtime, oracle: Oracle, pad_id: int) -> None:
        self.config, self.runtime, self.oracle, self.pad_id = config, runtime, oracle, pad_id
        self.kind = config.reference.cache
        self.need_rejected = config.method.needs.rows == "pairs"
        self.in_step = sharding.is_sharded(oracle.lm)  # all processes must call it as often
        self.policy = PolicyWithReference(oracle.lm, None, config.kernel)
        self.layouts, _ = choose_layouts(config, self.policy, runtime.device)
        self.identity = identity(config, oracle)
        self.dtype = getattr(torch, self.identity["stored"])
        head: Any = oracle.lm.get_output_embeddings()
        self.width = int(head.in_features) if self.kind == "hidden" else 1

    def folder(self, source: Source, cache_dir: Path) -> CachedReference:
        runtime = self.runtime
        tokens = runtime.on_main(lambda: _tokens(source, self.need_rejected, cache_dir))
        whole = self.identity | {"tokens": tokens["sha256"]}
        name = storage.digest(whole)[:32]
        folder = cache_dir / name
        found = runtime.on_main(lambda: storage.is_there(folder / _MANIFEST))
        if not found:
            found = self._compute_or_wait(folder, source, whole, tokens)
        kept = CachedReference(folder, whole)
        what = {"logps": "log-probabilities", "hidden": "hidden states"}[self.kind]
        print_rank_0(f"reference: {what} of {tokens['pairs']:,} pairs {'found' if found else 'kept'} in {folder}")
        if found:
            self._verify(kept, source)
        return kept

    def _compute_or_wait(self, folder: Path, source: Source, whole: dict[str, Any], tokens: dict[str, Any]) -> bool:
        """Whether another run has computed it meanwhile."""
        runtime, lock = self.runtime, Lock(folder.with_suffix(".lock"))
        told = False

        def take() -> bool:
            lock.path.parent.mkdir(parents=True, exist_ok=True)
            return lock.take()

        while not runtime.on_main(take):
            if not told:
                owner = storage.owner_of(lock.path) if runtime.is_main else None
                name = "another run" if owner is None else f"process {owner[0]} on {owner[1]}"
                print_rank_0(f"reference: waiting for the pass of {name}")
            told = True
            time.sleep(1)
        try:
            if runtime.on_main(lambda: storage.is_there(folder / _MANIFEST)):
                return True
            runtime.stop.exit_at_once()
            self._compute(folder, source, whole, tokens)
            runtime.stop.coordinate_exit()
        finally:
            lock.release()
        return False

    def _compute(self, folder: Path, source: Source, whole: dict[str, Any], tokens: dict[str, Any]) -> None:
        runtime, pairs = self.runtime, source.pairs
        size = self.width * self.dtype.itemsize
        need = tokens["scored"] * size + tokens["pairs"] * 2 * 28
        per_pair = max(1, tokens["scored"] * size // max(1, tokens["pairs"]))
        step = max(1, min(_SHARD_PAIRS, _SHARD_BYTES // per_pair))
        names = {first: f"pairs_{first:09d}.safetensors" for first in range(0, len(pairs), step)}

        def begin() -> list[int]:
            folder.mkdir(parents=True, exist_ok=True)
            storage.sweep(folder)
            missing = [first for first, name in names.items() if not self._is_whole(folder / name)]
            need_now = need * len(missing) // len(names)
            free = shutil.disk_usage(folder).free
            print_rank_0(
                f"reference: one pass over {len(pairs):,} pairs; it takes {_size(need_now)} of disk in {folder}"
            )
            if free < need_now:
                raise TrainError(
                    f"reference.cache: {_size(need_now)} are needed in {folder}, found {_size(free)} free; free space, "
                    "or name another place (--reference.cache_dir DIR)"
                )
            with (folder / _PASSES).open("a") as file:
                began = time.strftime("%Y-%m-%dT%H:%M:%S%z")
                file.write(json.dumps({"began": began, "shards": len(missing), "of": len(names)}) + "\n")
            return missing

        missing = runtime.on_main(begin)
        mine = missing[runtime.rank :: runtime.world]
        from tqdm import tqdm

        count = sum(min(step, len(pairs) - first) for first in mine)
        with tqdm(total=count, unit="pair", desc="reference", disable=not runtime.is_main) as bar:
            for turn, first in enumerate(missing[:: runtime.world]):
                # the first process has as many pairs as any in each turn
                passes = self._passes(len(pairs[first : first + step]))
                if turn < len(mine):
                    self._shard(folder / names[mine[turn]], pairs[mine[turn] : mine[turn] + step], passes, bar)
                elif self.in_step:
                    self._values(pairs[:1], passes)
        runtime.wait()
        runtime.on_main(lambda: _finish(folder, list(names.values()), whole, tokens))

    def _passes(self, pairs: int) -> int:
        """Forward passes over so many pairs."""
        return -(-pairs // self.config.eval.batch)

    def _shard(self, path: Path, pairs: Sequence[EncodedPair], passes: int, bar: Any) -> None:
        """Score some pairs and keep their values in the order of the pairs, chosen before rejected."""
        from safetensors.torch import save_file

        keys: list[bytes] = []
        values: list[torch.Tensor] = []
        for pair, sides in zip(pairs, self._values(pairs, passes, bar), strict=True):
            keys += [key for key, _ in _sequences(pair, self.need_rejected)]
            values += sides
        tensors = {
            "key": torch.from_numpy(np.frombuffer(b"".join(keys), np.int64).reshape(-1, 2).copy()),
            "end": torch.tensor([len(value) for value in values]).cumsum(0),
            "check": torch.tensor([_check(key, value) for key, value in zip(keys, values, strict=True)]),
            "values": torch.cat(values),
        }
        write_by(path, lambda scratch: save_file(tensors, scratch))

    def _is_whole(self, path: Path) -> bool:
        """Whether a shard that an earlier pass has left can be used; a damaged one is named, and computed again."""
        if not storage.is_there(path):
            return False
        try:
            with storage.reading(path):
                tensors = _tensors(path)
                keys = [key.tobytes() for key in tensors["key"].numpy()]
                begins = [0, *tensors["end"].tolist()]
                checks = tensors["check"].tolist()
                for key, begin, end, check in zip(keys, begins[:-1], begins[1:], checks, strict=True):
                    if _check(key, tensors["values"][begin:end]) != check:
                        raise ValueError("its values do not match their checksum")
        except Unreadable:
            raise
        except Exception as error:  # whatever a damaged file raises
            print_rank_0(f"{path}: damaged, it is computed again: {str(error).splitlines()[0]}")
            return False
        return True

    def _values(self, pairs: Sequence[EncodedPair], passes: int = 0, bar: Any = None) -> list[list[torch.Tensor]]:
        """Of each pair: the values of its sides, each `(scored tokens,)` or `(scored tokens, H)`, as they are kept.

        Args: passes: how many forward passes other processes do meanwhile, where this one must do as many.
        """
        out: list[list[torch.Tensor]] = [[] for _ in pairs]
        order = sorted(range(len(pairs)), key=lambda i: padded_length(pairs[i]), reverse=True)
        size, device = self.config.eval.batch, self.runtime.device
        with self.oracle.standing(), models.evaluation_mode(self.policy), self.runtime.accelerator.autocast():
            for begin in range(0, len(order), size):
                numbers = order[begin : begin + size]
                chunk = [pairs[i] for i in numbers]
                layout = self.layouts.of(chunk, self.need_rejected)
                settings = self.layouts.settings(layout)
                batch = collate(chunk, pad_id=self.pad_id, need_rejected=self.need_rejected, **settings)
                found = self._of_tokens(to_device(batch, device))
                rejected = () if batch.rejected_lengths is None else batch.rejected_lengths.tolist()
                sides = found.split([*batch.chosen_lengths.tolist(), *rejected])
                for place, side in enumerate(sides):
                    out[numbers[place % len(numbers)]].append(side)
                if bar is not None:
                    bar.update(len(numbers))
            for _ in range(passes - self._passes(len(pairs)) if self.in_step else 0):
                self._of_tokens(to_device(batch, device))
        return out

    def _of_tokens(self, batch: PairBatch) -> torch.Tensor:
        if self.kind == "hidden":
            found = scored_states(self.oracle.lm, self.policy.attention, batch)
        else:
            found = token_stats_of(self.policy, batch, ()).logp
        return found.to(self.dtype).cpu()

    def _verify(self, kept: CachedReference, source: Source) -> None:
        """Raises: TrainError when a random sample, computed again, is not what was kept."""
        count = min(SAMPLE, len(source.pairs))
        numbers = self.runtime.from_main(sorted(SystemRandom().sample(range(len(source.pairs)), count)))
        pairs = [source.pairs[i] for i in numbers]
        values = self._values(pairs) if self.in_step or self.runtime.is_main else []
        self.runtime.on_main(lambda: self._compare(kept, pairs, values))

    def _compare(
        self, kept: CachedReference, pairs: Sequence[EncodedPair], values: Sequence[Sequence[torch.Tensor]]
    ) -> None:
        tol = tolerance(self.oracle.lm, self.config.train.mixed_precision)
        for pair, sides in zip(pairs, values, strict=True):
            for (key, _), expected in zip(_sequences(pair, self.need_rejected), sides, strict=True):
                found = kept.of(key)
                if found is None:
                    raise kept.refuse(f"has no row for {pair.where or 'a pair'}")
                if self.kind == "hidden":
                    loose = 5e-2 if torch.bfloat16 in (self.dtype, self.oracle.lm.dtype) else tol
                    gap, reach = relative_gap(expected.double(), found.double()), loose
                else:
                    gap = float((found - expected).abs().div(expected.abs().clamp(min=1.0)).max())
                    reach = tol
                if not gap <= reach:
                    raise kept.refuse(f"says something else of {pair.where or 'a pair'} than the reference ({gap:.2g})")


def _size(count: float) -> str:
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, max(0, (len(str(int(count))) - 1) // 3))
    return f"{count / 1000**power:.3g} {units[power]}"


def _check(key: bytes, values: torch.Tensor) -> int:
    """A checksum that binds values to their sequence."""
    return zlib.crc32(values.contiguous().view(torch.uint8).numpy().tobytes(), zlib.crc32(key))


def _finish(folder: Path, names: Sequence[str], whole: Mapping[str, Any], tokens: Mapping[str, Any]) -> None:
    """Write the index of all shards, then the manifest, with which the cache is complete."""
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
    write_by(folder / _INDEX, lambda scratch: save_file(index, scratch))
    sizes = {name: (folder / name).stat().st_size for name in (*names, _INDEX)}
    manifest = {"identity": whole, "pairs": tokens["pairs"], "scored": tokens["scored"], "bytes": sizes}
    write_sealed(folder / _MANIFEST, manifest | {"index": storage.sha256(folder / _INDEX)})


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in ("key", "end", "check", "values")}


# Using it ---------------------------------------------------------------------------------------------------------


class CachedReference:
    """One cache folder, open.

    Args: folder: a complete one. whole: what it must be of.
    Raises: TrainError when it is of something else, or not whole.
    """

    def __init__(self, folder: Path, whole: Mapping[str, Any]) -> None:
        from safetensors import safe_open

        self.folder = folder
        try:
            manifest = storage.read_sealed(folder / _MANIFEST, unsealed=True) or {}
            found, sizes = manifest["identity"], dict(manifest["bytes"])
        except (Damaged, KeyError, TypeError, ValueError):
            raise self.refuse(f"has a {_MANIFEST} that was edited or damaged") from None
        for name in sorted(found.keys() | whole.keys()):
            if found.get(name) != whole.get(name):
                raise self.refuse(f"is of another {name}: {found.get(name)}, expected {whole.get(name)}")
        for name, size in sizes.items():
            path = folder / name
            if not storage.is_there(path):
                raise self.refuse(f"lacks {name}")
            if path.stat().st_size != size:
                raise self.refuse(f"holds {path.stat().st_size} bytes of {name}, expected {size}")
        if "index" in manifest and storage.sha256(folder / _INDEX) != manifest["index"]:
            raise self.refuse(f"has an {_INDEX} that does not match its hash")
        names = sorted(name for name in sizes if name != _INDEX)
        try:
            for name in (*names, _INDEX):  # where a library reads it, the system's error would look like damage
                with storage.opened(folder / name) as file:
                    file.read(1)
            self._shards = [safe_open(folder / name, framework="pt").__enter__() for name in names]
            index = safe_open(folder / _INDEX, framework="pt").__enter__()
            self._key, self._place = (index.get_tensor(name).numpy() for name in ("key", "place"))
        except Unreadable:
            raise
        except Exception as error:  # whatever a damaged file raises
            raise self.refuse(f"cannot be read: {str(error).splitlines()[0]}") from None
        self._open: dict[int, dict[str, torch.Tensor]] = {}

    def refuse(self, what: str) -> TrainError:
        return TrainError(f"reference.cache: {self.folder} {what}; delete the folder, and it is computed again")

    def of(self, key: bytes) -> torch.Tensor | None:
        """The values of a sequence, `(scored tokens,)` or `(scored tokens, H)`; None where it is not in here.

        Raises: TrainError when they are not what was written.
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
                raise self.refuse(f"cannot be read: {str(error).splitlines()[0]}") from None
        tensors = self._open[shard]
        begin = int(tensors["end"][row - 1]) if row else 0
        values = tensors["values"][begin : int(tensors["end"][row])]
        if _check(key, values) != int(tensors["check"][row]):
            raise self.refuse("holds values that do not match their checksum")
        return values


class ReferenceValues:
    """The kept values of all pairs of a run. Args: kind: `logps` or `hidden`."""

    def __init__(self, kept: Sequence[CachedReference], kind: str) -> None:
        self._kept, self.kind = kept, kind

    @property
    def in_bfloat16(self) -> bool:
        """Whether the reference's part is rounded, whatever the precision of the run."""
        return self._empty().dtype == torch.bfloat16

    def fill(self, batch: PairBatch, pairs: Sequence[EncodedPair]) -> PairBatch:
        """The batch with the reference's part in it.

        Raises: TrainError for a pair that no cache of this run has.
        """
        need_rejected = batch.rejected_lengths is not None
        both = [_sequences(pair, need_rejected) for pair in pairs]
        parts = []
        for side in range(2 if need_rejected else 1):
            for pair, sequences in zip(pairs, both, strict=True):
                parts.append(self._of(sequences[side][0], pair))
        values = torch.cat(parts) if parts else self._empty()
        return replace(batch, ref_logps=values) if self.kind == "logps" else replace(batch, ref_hidden=values)

    def _empty(self) -> torch.Tensor:
        first = self._kept[0]
        return first._shards[0].get_slice("values")[:0]

    def _of(self, key: bytes, pair: EncodedPair) -> torch.Tensor:
        for kept in self._kept:
            found = kept.of(key)
            if found is not None:
                return found
        where = ", ".join(str(kept.folder) for kept in self._kept)
        raise TrainError(f"{pair.where or 'a pair'}: the reference's values are in none of its caches ({where})")
