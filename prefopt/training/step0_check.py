"""The step-0 check: the first pairs are scored a second time by a path that shares no code with the first one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from prefopt.errors import TrainError
from prefopt.method import Method
from prefopt.training import adapters, compiling, quantized, sharding
from prefopt.training.forward import Policy, pair_stats, scores_of, statistics_for, token_stats_of
from prefopt.types import EncodedPair, PairBatch, PairStats, TokenStats

Inside = Callable[
    [Callable[[], Any]], Any
]  # how the unwrapped policy is to be called, see `Backend.run_inside_forward`
ROWS = 4  # pairs that are checked
# Largest difference of a token's log-probability, absolute and relative to it.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
# The same where a 16-bit model is checked in float32; large models accumulate rounding errors.
IN_FLOAT32 = 1e-3
# Largest error of the first loss, where policy and reference are the same weights.
_LOSS_TOLERANCE = 1e-3


def tolerance(lm: nn.Module, mixed_precision: str) -> float:
    """The largest difference of the two paths in this precision, see `_TOLERANCE`."""
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    return _TOLERANCE[autocast or quantized.precision(lm)]


# In float32 -----------------------------------------------------------------------------------------------------------


def is_rounded(lm: nn.Module, mixed_precision: str) -> bool:
    """Whether a model computes in 16 bits, whose rounding hides an unknown scale or soft-cap of its logits."""
    return tolerance(lm, mixed_precision) > _TOLERANCE[torch.float32]


def float32_bytes(policy: Policy, full: bool) -> int:
    """Bytes that float32 copies of the policy's 16-bit weights take. Args: full: every weight is copied."""
    copied = (p for p in policy.parameters() if p.is_floating_point() and (full or p.dtype.itemsize < 4))
    return sum(4 * sharding.numel(p) for p in copied)


def free_bytes(device: torch.device, ranks: int) -> int:
    """Free memory for one of so many ranks on this machine; a GPU belongs to one rank."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = dict(line.split(":") for line in file)
        free = 1024 * int(found["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free // ranks


@contextlib.contextmanager
def in_float32(policy: Policy) -> Iterator[None]:
    """While it lasts, the models of a policy hold their weights and compute in float32 or better; not for training.

    Args: policy: unwrapped, with full weights.
    """
    tensors = [t for t in (*policy.parameters(), *policy.buffers()) if t.is_floating_point() and t.dtype.itemsize < 4]
    held = [(tensor, tensor.data) for tensor in tensors]
    device = next(policy.parameters()).device.type
    try:
        for tensor, data in held:
            tensor.data = data.float()
        with quantized.computing_in(policy, torch.float32), torch.autocast(device, enabled=False):
            yield
    finally:
        for tensor, data in held:
            tensor.data = data


# The check ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def first_difference(
    model: nn.Module,
    policy: Policy,
    method: Method,
    pairs: Sequence[EncodedPair],
    batch: PairBatch,
    tol: float,
    inside: Inside = lambda run: run(),
) -> str | None:
    """What is wrong with the scores of a batch, with the pair's name, or None; called on all ranks.

    Each completion is scored again alone, unpadded, by the model's own logits: a plain log-softmax at the tokens that
    the encoder marked, or the score of a classifier for the sequence.

    Args:
        model: the wrapped policy; policy: the same, unwrapped.
        pairs: the encoded pairs of `batch`, in its order.
        batch: on the model's device.
        inside: calls a function where the unwrapped policy can be called; all ranks must then have the same pairs.
    """
    if method.needs.output == "scores":
        scores = scores_of(model, batch).tolist()
        return inside(lambda: _first_different_score(scores, policy, pairs, batch, tol))
    tokens = token_stats_of(model, batch, statistics_for(method.needs))
    return inside(lambda: _first_different_token(tokens, policy, pairs, batch, tol))


def _first_different_token(
    tokens: TokenStats, policy: Policy, pairs: Sequence[EncodedPair], batch: PairBatch, tol: float
) -> str | None:
    for sequence, (pair, side) in enumerate(_sequences(pairs, batch)):
        completion, mask = getattr(pair, f"{side}_ids"), getattr(pair, f"{side}_mask")
        where = f"{pair.where or f'pair {sequence % len(pairs)}'} ({side})"
        mine = batch.sequence_index == sequence
        for name, scorer in (("logp", contextlib.nullcontext(policy.lm)), ("ref_logp", policy.as_reference())):
            scored = getattr(tokens, name)
            with scorer as lm, compiling.eagerly(policy):
                if scored is None or lm is None:
                    continue
                expected = _plain_scores(lm, pair.prompt_ids, completion, mask)
            found = scored[mine].to(expected)
            if found.shape != expected.shape:
                return f"{where}: found {len(found)} completion tokens, expected {len(expected)}"
            gap = (found - expected).abs() - tol * expected.abs().clamp(min=1.0)
            if len(gap) and not bool((gap <= 0).all()):
                worst = int(gap.nan_to_num(nan=float("inf")).argmax())
                return (
                    f"{where}: completion token {worst} has {name} {float(found[worst]):.6f}, "
                    f"an independent path gives {float(expected[worst]):.6f}"
                )
    return None


def _first_different_score(
    scores: Sequence[float], policy: Policy, pairs: Sequence[EncodedPair], batch: PairBatch, tol: float
) -> str | None:
    for sequence, (pair, side) in enumerate(_sequences(pairs, batch)):
        with compiling.eagerly(policy):
            expected = _plain_score(policy.lm, [*pair.prompt_ids, *getattr(pair, f"{side}_ids")])
        if not abs(scores[sequence] - expected) <= tol * max(1.0, abs(expected)):
            where = f"{pair.where or f'pair {sequence % len(pairs)}'} ({side})"
            return f"{where}: the score is {scores[sequence]:.6f}, an independent path gives {expected:.6f}"
    return None


def _plain_score(lm: nn.Module, ids: list[int]) -> float:
    """A classifier's score of one sequence, read at its last token because the model has no pad token meanwhile."""
    config: Any = adapters.base_of(lm).config.get_text_config()
    known, config.pad_token_id = config.pad_token_id, None
    try:
        return float(lm(input_ids=torch.tensor([ids], device=next(lm.parameters()).device), use_cache=False).logits)
    finally:
        config.pad_token_id = known


def _sequences(pairs: Sequence[EncodedPair], batch: PairBatch) -> list[tuple[EncodedPair, str]]:
    chosen = [(pair, "chosen") for pair in pairs]
    return chosen if batch.rejected_lengths is None else chosen + [(pair, "rejected") for pair in pairs]


def _plain_scores(lm: nn.Module, prompt: list[int], completion: list[int], mask: list[bool]) -> torch.Tensor:
    """Log-probabilities of the marked completion tokens, float32 or better."""
    device = next(lm.parameters()).device
    ids = torch.tensor([prompt + completion], device=device)
    logits = lm(input_ids=ids, use_cache=False).logits[0]
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return torch.stack(
        [
            logps[len(prompt) + i - 1, token]
            for i, (token, scored) in enumerate(zip(completion, mask, strict=True))
            if scored
        ]
    )


@torch.no_grad()
def unexpected_loss(model: nn.Module, method: Method, batch: PairBatch, tol: float, cached: bool = False) -> str | None:
    """What is wrong with the first loss where policy and reference are the same weights, or None.

    Args:
        tol: of a token's log-probability. cached: whether the reference values come from the cache, computed in batches
            of another shape: their rounding differs, so the log-probabilities of each completion are compared too.
    """
    expected = method.loss_at_reference()
    if expected is None:
        return None
    stats = pair_stats(model, batch, statistics_for(method.needs))
    if cached:
        for pair in range(batch.pairs):
            for side, lengths in (("chosen", batch.chosen_lengths), ("rejected", batch.rejected_lengths)):
                if lengths is None:
                    continue
                logp, ref = (float(getattr(stats, f"{side}_{name}")[pair]) for name in ("logps", "ref_logps"))
                # rounding errors of tokens have either sign, so their sum grows with the square root
                if not abs(logp - ref) <= tol * max(10.0, float(lengths[pair])) ** 0.5:
                    return (
                        f"{batch.where[pair]} ({side}): the log-probability is {logp:.6f}, and {ref:.6f} in the "
                        "reference cache, while policy and reference are the same weights"
                    )
        stats = _at_reference(stats)
    terms = method.loss_of(stats, batch, method.first_state(stats, batch)).terms
    found = torch.stack([term.weight * term.value.double() for term in terms]).sum(0)
    scale = max(1.0, abs(expected))
    for pair in range(batch.pairs):
        # the loss is a function of sums over the completion, whose rounding errors add up
        reach = scale * min(_LOSS_TOLERANCE, tol * max(10.0, float(batch.chosen_lengths[pair])))
        if not abs(float(found[pair]) - expected) <= reach:
            return (
                f"{batch.where[pair]}: the loss is {float(found[pair]):.6f} while policy and reference are the same "
                f"weights, expected {expected:.6f}"
            )
    return None


def _at_reference(stats: PairStats) -> PairStats:
    """The statistics with the policy in place of the reference."""
    sides = ("chosen", "rejected")
    members: dict[str, Any] = {f"{side}_ref_logps": getattr(stats, f"{side}_logps") for side in sides}
    for name in (f"{side}_{kind}" for side in sides for kind in ("kl", "reverse_kl")):
        value = getattr(stats, name)
        members[name] = None if value is None else torch.zeros_like(value)
    tokens = stats.tokens.stats
    each: dict[str, Any] = {"ref_logp": tokens.logp}
    for name in ("kl", "reverse_kl"):
        value = getattr(tokens, name)
        each[name] = None if value is None else torch.zeros_like(value)
    view = replace(stats.tokens, stats=replace(tokens, **each))
    return replace(stats, **members, token_view=view)


def refuse(problem: str | None) -> None:
    """Raises: TrainError if there is a problem."""
    if problem is not None:
        raise TrainError(
            f"step 0: {problem}; the run would train on wrong numbers (an error in masks, positions or data)"
        )
