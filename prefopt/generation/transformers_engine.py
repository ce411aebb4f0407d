"""Completions from a model of transformers in this process: batched by length, each row with a generator of its own.

A loop of our own rather than `generate`: a prompt is read once for all its completions, rows that have ended leave the
batch, and the token of a row depends on its own seed alone.
"""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from prefopt.errors import RoundError
from prefopt.generation.base import Done, Engine, EngineKind, PolicySource, Sampling, limits
from prefopt.generation.ends import Ends, end_tokens
from prefopt.generation.sampling import choose, uniforms
from prefopt.settings import GenerateConfig
from prefopt.training import adapters
from prefopt.training.models import evaluation_mode
from prefopt.training.versions import versions
from prefopt.types import Completion


@dataclass
class _Row:
    """A completion under way."""

    prompt: int
    number: int  # which of its prompt's completions
    limit: int
    points: np.ndarray  # (limit,) one for each token
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    ended: bool = False


@dataclass
class _Batch:
    """Rows and what the model remembers of them. Columns are positions, the last one the newest token."""

    rows: list[_Row]
    cache: Any
    mask: torch.Tensor  # (B, T) int64, 0 on the padding at the left
    padded: bool
    logits: torch.Tensor  # (B, V) of the next token

    def take(self, index: list[int], rows: list[_Row]) -> None:
        """What is remembered of the rows at `index`, once for each time that it stands there, now belongs to `rows`."""
        if index != [*range(len(self.mask))]:
            chosen = torch.tensor(index, device=self.mask.device)
            self.cache.reorder_cache(chosen)
            self.mask, self.logits = self.mask[chosen], self.logits[chosen]
        self.rows = rows


class TransformersEngine(EngineKind):
    """A policy in this process.

    The same prompt and seed give the same completion whatever else is generated, up to ties within rounding: matrix
    products of another shape differ in their last digits.

    Args:
        lm: a causal language model, with an adapter or without; its mode is left as it was found.
        tokenizer: the one of its vocabulary.
        batch: completions per forward pass.
        continuous: new completions take the places of those that have ended, instead of waiting for all of a batch.
        agree: given the next tokens of a batch, what they are to be: ranks that each hold a shard of a model's weights
            must call it alike, and a rounding on one may draw another token.

    Raises: RoundError for a model without a key-value cache, or one whose cache cannot take in new rows when
        `continuous` is asked for.
    """

    reads: ClassVar[tuple[str, ...]] = ("batch", "continuous")
    in_ranks: ClassVar[bool] = True

    @classmethod
    def inputs(cls, settings: GenerateConfig) -> list[Any] | None:
        """See `EngineKind`."""
        return [settings.batch, settings.continuous]

    @classmethod
    def open(cls, settings: GenerateConfig, policy: PolicySource) -> Engine:
        """See `EngineKind`."""
        return cls(policy.load(), policy.tokenizer, batch=settings.batch, continuous=settings.continuous)

    def __init__(
        self,
        lm: nn.Module,
        tokenizer: Any,
        *,
        batch: int = 64,
        continuous: bool = False,
        agree: Callable[[list[int]], list[int]] | None = None,
    ) -> None:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        self.lm, self.tokenizer, self.batch, self.continuous = lm, tokenizer, batch, continuous
        self._agree = agree
        self._base = adapters.base_of(lm)
        self._takes = inspect.signature(self._base.forward).parameters
        self._ends = end_tokens(self._base.generation_config, tokenizer)
        self.context = getattr(self._base.config.get_text_config(), "max_position_embeddings", None)
        name = type(self._base).__name__
        if "past_key_values" not in self._takes:
            raise RoundError(
                f"generate.engine: {name} has no key-value cache, which this engine needs, expected a model with one "
                "(or --generate.engine vllm)"
            )
        kinds = {type(layer) for layer in DynamicCache(config=self._base.config).layers}
        if continuous and not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            raise RoundError(
                f"generate.continuous: {name} has a cache that new completions cannot join, expected a model whose "
                "layers all attend (leave it out)"
            )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        done: Done | None = None,
    ) -> list[list[Completion]]:
        """`sampling.n` completions of each prompt, in order; completion i of a prompt draws with its seed + i.

        A completion ends where the model's positions do, if that is before `max_tokens`. `done` is called when the last
        of a prompt's completions has left its batch.

        Raises: RoundError for a prompt that leaves no position, or logits that are not finite.
        """
        room = limits(prompts, self.context, sampling.max_tokens)
        ends = Ends(self.tokenizer, self._ends, sampling.stop)
        # the longest first: neighbours have like lengths, and a batch too large for memory is the first one
        order = sorted(range(len(prompts)), key=lambda p: -len(prompts[p]))
        waiting = deque((p, i) for p in order for i in range(sampling.n))
        answers: list[dict[int, Completion]] = [{} for _ in prompts]
        with evaluation_mode(self.lm):
            batch: _Batch | None = None
            while waiting or batch is not None:
                free = self.batch - len(batch.rows) if batch is not None else self.batch
                if waiting and free and (self.continuous or batch is None):
                    taken = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                    points = [uniforms(seeds[p] + i, room[p] if sampling.temperature else 0) for p, i in taken]
                    rows = [_Row(p, i, room[p], drawn) for (p, i), drawn in zip(taken, points, strict=True)]
                    batch = self._admit(batch, rows, prompts)
                assert batch is not None
                self._draw(batch, sampling, ends)
                ended = [row for row in batch.rows if row.ended]
                # rows leave many at a time, since the cache is copied whenever some do
                share = 4 if self.continuous and waiting else 2
                if share * len(ended) >= len(batch.rows):
                    for row in ended:
                        logps = row.logps if sampling.logprobs else None
                        group = answers[row.prompt]
                        group[row.number] = ends.completion(row.ids, logps)
                        if done is not None and len(group) == sampling.n:
                            done(row.prompt, [group[i] for i in range(sampling.n)])
                    going_on = [n for n, row in enumerate(batch.rows) if not row.ended]
                    if not going_on:
                        batch = None
                        continue
                    batch.take(going_on, [batch.rows[n] for n in going_on])
                newest = torch.tensor([[row.ids[-1]] for row in batch.rows], device=batch.mask.device)
                batch.mask = torch.cat([batch.mask, torch.ones_like(newest)], -1)
                batch.logits = self._forward(batch, newest)
        return [[group[i] for i in range(sampling.n)] for group in answers]

    def describe(self) -> dict[str, Any]:
        """Name, versions, precision as it is where this is called, and what decides how products are rounded."""
        found, device = versions(), self._base.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return {
            "engine": "transformers",
            "dtype": str(self._base.dtype).removeprefix("torch."),
            "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
            "attention": self._base.config._attn_implementation,
            "device": device,
            "batch": self.batch,
            "continuous": self.continuous,
            "versions": {name: found[name] for name in ("torch", "transformers", "peft")},
        }

    def close(self) -> None:
        """Nothing is held but the model, which is the caller's."""

    def _admit(self, batch: _Batch | None, rows: list[_Row], prompts: Sequence[Sequence[int]]) -> _Batch:
        """The batch with new rows, whose prompts have been read."""
        from transformers import DynamicCache

        asked = list(dict.fromkeys(row.prompt for row in rows))
        width = max(len(prompts[p]) for p in asked)
        ids = torch.zeros(len(asked), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for n, p in enumerate(asked):
            ids[n, width - len(prompts[p]) :] = torch.tensor(prompts[p])
            mask[n, width - len(prompts[p]) :] = 1
        padded = bool((mask == 0).any())
        ids, mask = ids.to(self._base.device), mask.to(self._base.device)
        # a cache that is joined later keeps every layer whole, the mask alone applies sliding windows then
        cache = DynamicCache() if self.continuous else DynamicCache(config=self._base.config)
        new = _Batch([], cache, mask, padded, torch.empty(0))
        new.logits = self._forward(new, ids)
        new.take([asked.index(row.prompt) for row in rows], rows)
        return new if batch is None else _joined(batch, new)

    def _draw(self, batch: _Batch, sampling: Sampling, ends: Ends) -> None:
        """Give each row that has not ended its next token."""
        logits = batch.logits.float() if batch.logits.dtype.itemsize < 4 else batch.logits
        sampled = sampling.temperature > 0
        points = [row.points[len(row.ids)] if sampled and not row.ended else 0.0 for row in batch.rows]
        tokens = choose(logits, torch.tensor(points, dtype=torch.float64, device=logits.device), sampling)
        if self._agree is not None:
            tokens = tokens.new_tensor(self._agree(tokens.tolist()))
        logps = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        for row, token, logp in zip(batch.rows, tokens.tolist(), logps.tolist(), strict=True):
            if row.ended:
                continue
            if not math.isfinite(logp):
                raise RoundError(
                    f"generate: the policy's logits are not finite after {len(row.ids)} tokens of a completion, "
                    "expected numbers (a run that diverged, or a precision too small: --model.dtype float32)"
                )
            row.ids.append(token)
            row.logps.append(logp)
            row.ended = len(row.ids) == row.limit or ends.reached(row.ids)

    def _forward(self, batch: _Batch, ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) after the last of `ids` (B, t), which are the newest columns of the mask; the cache grows."""
        takes: dict[str, Any] = {}
        if "position_ids" in self._takes:
            # a row that has ended is read on until it leaves, maybe beyond the last position there is
            last = None if self.context is None else self.context - 1
            takes["position_ids"] = (batch.mask.cumsum(-1)[:, -ids.shape[1] :] - 1).clamp(0, last)
        if "logits_to_keep" in self._takes:
            takes["logits_to_keep"] = 1
        if batch.padded:
            takes["attention_mask"] = batch.mask
        out = self.lm(input_ids=ids, past_key_values=batch.cache, use_cache=True, **takes)
        return out.logits[:, -1]


def _joined(old: _Batch, new: _Batch) -> _Batch:
    """Two batches as one: padding at the left makes them equally wide, and columns of padding alone are cut off."""
    from transformers import DynamicCache

    width = max(old.mask.shape[1], new.mask.shape[1])
    masks = [nn.functional.pad(part.mask, (width - part.mask.shape[1], 0)) for part in (old, new)]
    mask = torch.cat(masks)
    begin = int(mask.any(0).int().argmax())
    layers = []
    for one, two in zip(old.cache.layers, new.cache.layers, strict=True):
        wide = [
            [nn.functional.pad(states, (0, 0, width - states.shape[-2], 0)) for states in pair]
            for pair in ((one.keys, two.keys), (one.values, two.values))
        ]
        layers.append(tuple(torch.cat(pair)[..., begin:, :] for pair in wide))
    mask = mask[:, begin:]
    logits = torch.cat([old.logits, new.logits])
    return _Batch([*old.rows, *new.rows], DynamicCache(layers), mask, bool((mask == 0).any()), logits)
