"""Precomputes the reference's values for all pairs and writes them to the cache that `reference_cache` describes."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from prefopt.training.forward import PolicyWithReference, loss_token_states, to_device, token_stats_of
from prefopt.training.launcher import print_rank_0
from prefopt.training.layout_choice import choose_layouts, relative_gap
from prefopt.training.logits import head_scaling
from prefopt.training.reference_cache import (
    FORMAT,
    MANIFEST,
    PASSES,
    CachedReference,
    ReferenceValues,
    checksum,
    complete,
    read_shard,
    sequences_of,
)
from prefopt.training.runtime import Runtime
from prefopt.training.step0_check import tolerance
from prefopt.types import EncodedPair, PairBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLE = 4  # number of pairs of a cache that are recomputed for verification when it is opened
_SHARD_BYTES = 64 << 20  # approximate size of the values in one file; an interrupted pass recomputes at most one
_SHARD_PAIRS = 4096  # maximum number of pairs in one file


@dataclass(frozen=True)
class Source:
    """Pairs whose values form one cache. Args: fingerprint: a hash of their content and order."""

    pairs: Sequence[EncodedPair]
    fingerprint: str


@dataclass(frozen=True)
class ReferenceModel:
    """The loaded reference model, which computes values that the cache lacks.

    Args:
        lm: the model on the run's device, with or without an adapter.
        frozen: which weights of `lm` are the reference, where `lm` is the policy with an adapter.
        weights: hashes of the files that it was loaded from, by name.
    """

    lm: PreTrainedModel
    frozen: adapters.Frozen | None
    weights: Mapping[str, str | None]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Context manager in which `lm` computes as the reference."""
        with adapters.as_reference(self.lm, self.frozen) if self.frozen else contextlib.nullcontext():
            yield


# Identity of a cache -----------------------------------------------------------------------------------------------


def identity(config: RunConfig, reference: ReferenceModel) -> dict[str, Any]:
    """Everything except the tokens that a cached value depends on, by name."""
    scale, softcap = head_scaling(reference.lm)
    return {
        "format": FORMAT,
        "kind": config.reference.cache,
        **{f"weights.{name}": value for name, value in reference.weights.items()},
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
    """The dtype of cached values."""
    if config.reference.cache == "hidden":
        return config.reference.cache_dtype
    return "float64" if config.model.dtype == "float64" else "float32"


def _tokens(source: Source, need_rejected: bool, cache_dir: Path) -> dict[str, Any]:
    """A hash of the tokens and masks of a source, and their number; stored under the source's fingerprint."""
    name = storage.text_hash(f"{FORMAT} {source.fingerprint} {need_rejected}")[:32]
    memo = cache_dir / "tokens" / f"{name}.json"
    with contextlib.suppress(Damaged, Unreadable, KeyError):  # then the tokens are hashed again
        known = storage.read_sealed(memo) or {}
        return {"sha256": known["content"], "pairs": known["pairs"], "scored": known["scored"]}
    digest, scored = storage.running_hash(), 0
    for pair in source.pairs:
        for key, count in sequences_of(pair, need_rejected):
            digest.update(key)
            scored += count
    found = {"sha256": digest.hexdigest(), "pairs": len(source.pairs), "scored": scored}
    write_sealed(memo, {"content": found["sha256"], "pairs": found["pairs"], "scored": scored})
    return found


# The pass ---------------------------------------------------------------------------------------------------------


def obtain(
    config: RunConfig,
    runtime: Runtime,
    reference: ReferenceModel,
    sources: Sequence[Source],
    cache_dir: Path,
    pad_id: int,
) -> ReferenceValues:
    """The reference's values for all pairs of the sources, read from disk or computed in one pass that can be resumed.

    If several runs need the same cache, one run computes it, partitioned over its ranks, and the others wait. For a
    cache that exists already, a random sample is recomputed and compared.

    Args:
        reference: computes missing values and the sample.
        cache_dir: parent folder of all caches.
        pad_id: token id for padding.
    Raises: TrainError for a cache that does not match its manifest or the sample, or if the disk lacks space.
    """
    work = _Pass(config, runtime, reference, pad_id)
    caches = [work.folder(source, cache_dir) for source in sources if len(source.pairs)]
    return ReferenceValues(caches, config.reference.cache)


class _Pass:
    """Finds or computes the caches of one run. All ranks must call each method together."""

    def __init__(self, config: RunConfig, runtime: Runtime, reference: ReferenceModel, pad_id: int) -> None:
        self.config, self.runtime, self.reference, self.pad_id = config, runtime, reference, pad_id
        self.kind = config.reference.cache
        self.need_rejected = config.method.needs.rows == "pairs" or config.method.needs.mismatched
        self.lockstep = sharding.is_sharded(reference.lm)  # a sharded model needs equally many calls on all ranks
        self.policy = PolicyWithReference(reference.lm, None, config.kernel)
        self.layouts, _ = choose_layouts(config, self.policy, runtime.device)
        self.identity = identity(config, reference)
        self.dtype = getattr(torch, self.identity["stored"])
        head: Any = reference.lm.get_output_embeddings()
        self.width = int(head.in_features) if self.kind == "hidden" else 1

    def folder(self, source: Source, cache_dir: Path) -> CachedReference:
        """The cache of a source, which is computed if it does not exist yet."""
        runtime = self.runtime
        tokens = runtime.on_main(lambda: _tokens(source, self.need_rejected, cache_dir))
        full = self.identity | {"tokens": tokens["sha256"]}
        name = storage.digest(full)[:32]
        folder = cache_dir / name
        found = runtime.on_main(lambda: storage.is_there(folder / MANIFEST))
        if not found:
            found = self._compute_or_wait(folder, source, full, tokens)
        cache = CachedReference(folder, full)
        what = {"logps": "log-probabilities", "hidden": "hidden states"}[self.kind]
        print_rank_0(f"reference: {what} of {tokens['pairs']:,} pairs {'found' if found else 'cached'} in {folder}")
        if found:
            self._verify(cache, source)
        return cache

    def _compute_or_wait(self, folder: Path, source: Source, full: dict[str, Any], tokens: dict[str, Any]) -> bool:
        """Compute the cache, or wait for another run that computes it. Returns: whether another run did."""
        runtime, lock = self.runtime, Lock(folder.with_suffix(".lock"))
        printed = False

        def take() -> bool:
            lock.path.parent.mkdir(parents=True, exist_ok=True)
            return lock.take()

        while not runtime.on_main(take):
            if not printed:
                owner = storage.owner_of(lock.path) if runtime.is_main else None
                name = "another run" if owner is None else f"process {owner[0]} on {owner[1]}"
                print_rank_0(f"reference: waiting for the pass of {name}")
            printed = True
            time.sleep(1)
        try:
            if runtime.on_main(lambda: storage.is_there(folder / MANIFEST)):
                return True
            runtime.stop.exit_at_once()
            self._compute(folder, source, full, tokens)
            runtime.stop.coordinate_exit()
        finally:
            lock.release()
        return False

    def _compute(self, folder: Path, source: Source, full: dict[str, Any], tokens: dict[str, Any]) -> None:
        """Compute the missing shards, partitioned over ranks, and complete the cache."""
        runtime, pairs = self.runtime, source.pairs
        size = self.width * self.dtype.itemsize
        need = tokens["scored"] * size + tokens["pairs"] * 2 * 28
        per_pair = max(1, tokens["scored"] * size // max(1, tokens["pairs"]))
        step = max(1, min(_SHARD_PAIRS, _SHARD_BYTES // per_pair))
        names = {first: f"pairs_{first:09d}.safetensors" for first in range(0, len(pairs), step)}

        def begin() -> list[int]:
            folder.mkdir(parents=True, exist_ok=True)
            storage.sweep(folder)
            missing = [first for first, name in names.items() if not self._is_usable(folder / name)]
            need_now = need * len(missing) // len(names)
            free = shutil.disk_usage(folder).free
            print_rank_0(
                f"reference: one pass over {len(pairs):,} pairs; it takes {_human_size(need_now)} of disk in {folder}"
            )
            if free < need_now:
                raise TrainError(
                    f"reference.cache: {_human_size(need_now)} are needed in {folder}, found {_human_size(free)} free; "
                    "free space, or name another place (--reference.cache_dir DIR)"
                )
            with (folder / PASSES).open("a") as file:
                began = time.strftime("%Y-%m-%dT%H:%M:%S%z")
                file.write(json.dumps({"began": began, "shards": len(missing), "of": len(names)}) + "\n")
            return missing

        missing = runtime.on_main(begin)
        mine = missing[runtime.rank :: runtime.world]
        from tqdm import tqdm

        count = sum(min(step, len(pairs) - first) for first in mine)
        with tqdm(total=count, unit="pair", desc="reference", disable=not runtime.is_main) as bar:
            for turn, first in enumerate(missing[:: runtime.world]):
                # only the last shard may be shorter, so in each turn rank 0 has at least as many pairs as other ranks
                passes = self._passes(len(pairs[first : first + step]))
                if turn < len(mine):
                    self._shard(folder / names[mine[turn]], pairs[mine[turn] : mine[turn] + step], passes, bar)
                elif self.lockstep:
                    self._values(pairs[:1], passes)  # this rank has no shard left but must join the forward passes
        runtime.wait()
        runtime.on_main(lambda: complete(folder, list(names.values()), full, tokens))

    def _passes(self, pairs: int) -> int:
        """The number of forward passes for this number of pairs."""
        return -(-pairs // self.config.eval.batch)

    def _shard(self, path: Path, pairs: Sequence[EncodedPair], passes: int, bar: Any) -> None:
        """Compute the values of one shard and write them in the order of the pairs, chosen before rejected."""
        from safetensors.torch import save_file

        keys: list[bytes] = []
        values: list[torch.Tensor] = []
        for pair, sides in zip(pairs, self._values(pairs, passes, bar), strict=True):
            keys += [key for key, _ in sequences_of(pair, self.need_rejected)]
            values += sides
        tensors = {
            "key": torch.from_numpy(np.frombuffer(b"".join(keys), np.int64).reshape(-1, 2).copy()),
            "end": torch.tensor([len(value) for value in values]).cumsum(0),
            "check": torch.tensor([checksum(key, value) for key, value in zip(keys, values, strict=True)]),
            "values": torch.cat(values),
        }
        write_by(path, lambda scratch: save_file(tensors, scratch))

    def _is_usable(self, path: Path) -> bool:
        """Whether a shard of an earlier pass can be used; for a damaged one, which is recomputed, a line is printed."""
        if not storage.is_there(path):
            return False
        try:
            with storage.reading(path):
                tensors = read_shard(path)
                keys = [key.tobytes() for key in tensors["key"].numpy()]
                begins = [0, *tensors["end"].tolist()]
                checks = tensors["check"].tolist()
                for key, begin, end, check in zip(keys, begins[:-1], begins[1:], checks, strict=True):
                    if checksum(key, tensors["values"][begin:end]) != check:
                        raise ValueError("its values do not match their checksum")
        except Unreadable:
            raise
        except Exception as error:  # a damaged file may raise anything
            print_rank_0(f"{path}: damaged, it is recomputed: {str(error).splitlines()[0]}")
            return False
        return True

    def _values(self, pairs: Sequence[EncodedPair], passes: int = 0, bar: Any = None) -> list[list[torch.Tensor]]:
        """For each pair the values of its completions, `(loss tokens,)` or `(loss tokens, H)`, in the cache's dtype.

        Args: passes: number of forward passes of other ranks, which this rank must match if weights are sharded.
        """
        out: list[list[torch.Tensor]] = [[] for _ in pairs]
        order = sorted(range(len(pairs)), key=lambda i: padded_length(pairs[i]), reverse=True)
        size, device = self.config.eval.batch, self.runtime.device
        with self.reference.active(), models.evaluation_mode(self.policy), self.runtime.accelerator.autocast():
            for begin in range(0, len(order), size):
                numbers = order[begin : begin + size]
                chunk = [pairs[i] for i in numbers]
                layout = self.layouts.of(chunk, self.need_rejected)
                settings = self.layouts.settings(layout)
                batch = collate(chunk, pad_id=self.pad_id, need_rejected=self.need_rejected, **settings)
                found = self._token_values(to_device(batch, device))
                rejected = () if batch.rejected_lengths is None else batch.rejected_lengths.tolist()
                sides = found.split([*batch.chosen_lengths.tolist(), *rejected])
                # sequences 0..B-1 are chosen, B..2B-1 rejected; `numbers` maps batch order to the order of `pairs`
                for place, side in enumerate(sides):
                    out[numbers[place % len(numbers)]].append(side)
                if bar is not None:
                    bar.update(len(numbers))
            for _ in range(passes - self._passes(len(pairs)) if self.lockstep else 0):
                self._token_values(to_device(batch, device))
        return out

    def _token_values(self, batch: PairBatch) -> torch.Tensor:
        """Log-probabilities (N,) or hidden states (N, H) of the N loss tokens of a batch."""
        if self.kind == "hidden":
            found = loss_token_states(self.reference.lm, self.policy.attention, batch)
        else:
            found = token_stats_of(self.policy, batch, ()).logp
        return found.to(self.dtype).cpu()

    def _verify(self, cache: CachedReference, source: Source) -> None:
        """Raises: TrainError when a recomputed random sample differs from the cached values."""
        count = min(SAMPLE, len(source.pairs))
        numbers = self.runtime.from_main(sorted(SystemRandom().sample(range(len(source.pairs)), count)))
        pairs = [source.pairs[i] for i in numbers]
        values = self._values(pairs) if self.lockstep or self.runtime.is_main else []
        self.runtime.on_main(lambda: self._compare(cache, pairs, values))

    def _compare(
        self, cache: CachedReference, pairs: Sequence[EncodedPair], values: Sequence[Sequence[torch.Tensor]]
    ) -> None:
        """Raises: TrainError when a cached value is missing or differs from the recomputed one."""
        tol = tolerance(self.reference.lm, self.config.train.mixed_precision)
        for pair, sides in zip(pairs, values, strict=True):
            for (key, _), expected in zip(sequences_of(pair, self.need_rejected), sides, strict=True):
                found = cache.of(key)
                if found is None:
                    raise cache.error(f"has no values for {pair.where or 'a pair'}")
                if self.kind == "hidden":
                    loose = 5e-2 if torch.bfloat16 in (self.dtype, self.reference.lm.dtype) else tol
                    gap, limit = relative_gap(expected.double(), found.double()), loose
                else:
                    gap = float((found - expected).abs().div(expected.abs().clamp(min=1.0)).max())
                    limit = tol
                if not gap <= limit:
                    raise cache.error(
                        f"differs from the reference in the values of {pair.where or 'a pair'} (by {gap:.2g})"
                    )


def _human_size(count: float) -> str:
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, max(0, (len(str(int(count))) - 1) // 3))
    return f"{count / 1000**power:.3g} {units[power]}"
