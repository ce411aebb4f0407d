"""Hidden states and an output head -> log-probability, KL and entropy per token, without materialising all logits.

The logits (N, V) exist one tile at a time: n tokens by v entries of the vocabulary. The forward pass computes the
statistics of each tile as if it were the whole vocabulary and combines tiles by the chain rule: a token's distribution
is a distribution over tiles and, within each tile, one over its entries. The backward pass computes the gradient of a
tile in closed form, from logits that were cached where memory allowed and from a recomputed product elsewhere.
Independent of models.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from prefopt.kernels import tile
from prefopt.kernels.tile import Head, Scratch, Side
from prefopt.types import TokenStats

ORDER = ("logp", "ref_logp", "kl", "reverse_kl", "entropy", "log_sum_p2")  # of statistics where they are a tuple
_OF_POLICY = frozenset({"entropy", "log_sum_p2"})  # statistics beside `logp` that read no reference
CACHE_MB = 1024  # MiB of products that are cached for the backward pass by default
TILES = {"cpu": (1024, 2048), "cuda": (4096, 16384)}  # default tile by device: (tokens n, vocabulary entries v)

Tensor = torch.Tensor


@dataclass(frozen=True)
class _Plan:
    """The arguments of a call that are not tensors."""

    tile: ModuleType  # implementation of one tile: `tile`, or `triton_stats` where Triton runs
    want: frozenset[str]  # statistics beside `logp`
    policy: Head
    reference: Head | None
    stat_dtype: torch.dtype  # of logits and statistics: float32, or float64 if a head computes in it
    shared_head: bool  # policy and reference read the same weight tensor
    token_tile: int
    vocab_tile: int
    cache_bytes: int

    @property
    def pairwise(self) -> bool:
        """Whether a statistic with a gradient reads both models' logits."""
        return bool(self.want & {"kl", "reverse_kl"})

    def token_slices(self, tokens: int, vocab: int) -> list[slice]:
        """The tokens of each row of tiles."""
        # a tile is a memory budget of n * v logits: with a vocabulary smaller than v it may have more tokens
        rows = self.token_tile * max(1, self.vocab_tile // max(1, vocab))
        return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]

    def vocab_slices(self, vocab: int) -> Iterator[tuple[int, slice]]:
        """(index, vocabulary entries) of each column of tiles."""
        for i, start in enumerate(range(0, vocab, self.vocab_tile)):
            yield i, slice(start, min(start + self.vocab_tile, vocab))


class _Products:
    """hidden @ weight.T of one model, tile by tile; tiles are cached for the backward pass within a memory budget."""

    def __init__(self, name: str, head: Head, hidden: Tensor, scratch: Scratch) -> None:
        self.name, self.head, self.hidden, self.scratch = name, head, head.operand(hidden), scratch
        self.cached: dict[tuple[int, int], Tensor] = {}

    def __call__(self, key: tuple[int, int], rows: slice, weight: Tensor, *, cache: bool = False) -> Tensor:
        """The product of tile `key`, (n, v). Args: weight: (v, H), in the head's operand dtype already."""
        if key in self.cached:
            return self.cached[key]
        hidden = self.hidden[rows]  # (n, H)
        shape = hidden.shape[0], weight.shape[0]
        # a cached product needs memory of its own; the scratch buffer is overwritten by the next tile
        if cache:
            self.cached[key] = out = torch.empty(shape, dtype=self.scratch.dtype, device=hidden.device)
        else:
            out = self.scratch(self.name, *shape)
        return _multiply(hidden, weight.T, out)


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out = left @ right, accumulated and returned in out's dtype, also for 16-bit operands (CUDA)."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def _accumulate(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total += left @ right, accumulated in total's dtype; the first product overwrites uninitialised memory."""
    if first:
        _multiply(left, right, total)
    elif left.dtype == total.dtype:
        total.addmm_(left, right)
    else:  # 16-bit operands with a float32 sum
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


class _TokenStats(torch.autograd.Function):
    """The loop over tiles. The outer loop is over the vocabulary, so that each slice of the weight is cast once.

    Shapes: hidden (N, H), weight (V, H), bias (V,), labels (N,); tile (i, j) has tokens `r` and entries `columns`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        plan: _Plan,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)  # statistics that a loss does not read have no gradient, instead of zeros
        ctx.plan = plan
        tokens, vocab = hidden.shape[0], weight.shape[0]
        rows = plan.token_slices(tokens, vocab)
        tiles = -(-vocab // plan.vocab_tile)  # columns of tiles, rounded up
        names = {"mass", "logp", *plan.want} | ({"ref_mass", "ref_logp"} if plan.reference is not None else set())
        # per tile, (tiles, N): mass and expectations; per token, (N,): log-probability of the label within its own tile
        parts = {
            name: hidden.new_full((tiles, tokens), float("nan"), dtype=plan.stat_dtype)
            for name in names - {"logp", "ref_logp"}
        }
        picked = {
            name: hidden.new_full((tokens,), float("nan"), dtype=plan.stat_dtype)
            for name in names & {"logp", "ref_logp"}
        }
        scratch = Scratch(plan.stat_dtype, hidden.device)
        budget = plan.cache_bytes
        # operands are cast explicitly; autocast would round the float32 products again
        with torch.autocast(hidden.device.type, enabled=False):
            products = _Products("product", plan.policy, hidden, scratch)
            ref_products = None
            if plan.reference is not None and ref_hidden is not None:
                ref_products = _Products("ref_product", plan.reference, ref_hidden, scratch)
            for j, columns in plan.vocab_slices(vocab):
                w, b = plan.policy.operand(weight[columns]), _slice_of(bias, columns)  # (v, H), (v,)
                ref_w, ref_b = _reference_tile(plan, w, ref_weight, ref_bias, columns)
                for i, r in enumerate(rows):
                    # tiles are cached in this order until the budget is used up, so the rest is recomputed
                    size = (r.stop - r.start) * (columns.stop - columns.start) * plan.stat_dtype.itemsize
                    budget -= size * (1 + plan.pairwise)  # the backward pass of KL needs both models' logits
                    cache = budget >= 0
                    policy = Side(plan.policy, products((i, j), r, w, cache=cache), b)
                    reference = None
                    if ref_products is not None and plan.reference is not None and ref_w is not None:
                        product = ref_products((i, j), r, ref_w, cache=cache and plan.pairwise)
                        reference = Side(plan.reference, product, ref_b)
                    index, inside = _columns_of(labels[r], columns)
                    for name, value in plan.tile.statistics(policy, reference, index, plan.want, scratch).items():
                        if name in picked:  # only the tile that holds the label knows its log-probability
                            picked[name][r] = torch.where(inside, value, picked[name][r])
                        else:
                            parts[name][j, r] = value
            out, lse, ref_lse = _combine(parts, picked, labels // plan.vocab_tile)
        # a plain tuple in the order of ORDER, because autograd functions return tensors or None
        result = tuple(out.get(name) if name == "logp" or name in plan.want else None for name in ORDER)
        # without KL no gradient depends on the reference, so its tensors are not kept for the backward pass
        if any(ctx.needs_input_grad[:3]):
            pairwise = plan.pairwise
            cached, ref_cached = products.cached, {} if ref_products is None else ref_products.cached
            ctx.cached = tuple(cached), tuple(ref_cached)
            ctx.save_for_backward(
                hidden, weight, bias, labels, lse,
                ref_hidden if pairwise else None,
                ref_weight if pairwise else None,
                ref_bias if pairwise else None,
                ref_lse if pairwise else None,
                result[3], result[4], result[5], *cached.values(), *ref_cached.values(),
            )  # fmt: skip
        if result[1] is not None:  # the reference's log-probability is a constant
            ctx.mark_non_differentiable(result[1])
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        saved = ctx.saved_tensors
        hidden, weight, bias, labels, lse, ref_hidden, ref_weight, ref_bias, ref_lse, *own = saved[:12]
        cached, ref_cached = ctx.cached
        grads = {name: g for name, g in zip(ORDER, incoming, strict=True) if g is not None and name != "ref_logp"}
        means = dict(zip(ORDER[3:], own, strict=True))  # statistics that occur in their own gradients
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        tokens, vocab = hidden.shape[0], weight.shape[0]
        rows, dtype = plan.token_slices(tokens, vocab), plan.stat_dtype
        # accumulated over tiles in float32 or better, and rounded to the dtype of the inputs at the end
        d_hidden = torch.zeros_like(hidden, dtype=dtype) if need_hidden else None
        # each slice of d_weight is overwritten by its first row of tiles; without tokens there is none
        d_weight = (torch.empty_like if tokens else torch.zeros_like)(weight) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=dtype) if need_bias else None
        scratch = Scratch(dtype, hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            products = _Products("product", plan.policy, hidden, scratch)
            products.cached = dict(zip(cached, saved[12:], strict=False))
            ref_products = None
            if plan.reference is not None and grads.keys() & {"kl", "reverse_kl"}:
                ref_products = _Products("ref_product", plan.reference, ref_hidden, scratch)
                ref_products.cached = dict(zip(ref_cached, saved[12 + len(cached) :], strict=True))
            for j, columns in plan.vocab_slices(vocab):
                w, b = plan.policy.operand(weight[columns]), _slice_of(bias, columns)
                ref_w, ref_b = None, None
                if ref_products is not None:  # only the KLs' gradients read the reference
                    ref_w, ref_b = _reference_tile(plan, w, ref_weight, ref_bias, columns)
                # a slice of the weight's gradient in float32: in place where d_weight has this dtype, else a buffer
                d_w = None
                if d_weight is not None:
                    d_w = d_weight[columns] if d_weight.dtype == dtype else torch.empty_like(w, dtype=dtype)
                for i, r in enumerate(rows):
                    policy = Side(plan.policy, products((i, j), r, w), b)
                    reference = None
                    if ref_products is not None and plan.reference is not None and ref_w is not None:
                        reference = Side(plan.reference, ref_products((i, j), r, ref_w), ref_b)
                    index, inside = _columns_of(labels[r], columns)
                    # dL/dz of the tile, (n, v), with respect to the logits before scale, soft-cap and bias
                    grad = plan.tile.gradient(
                        policy, reference, lse[r], None if ref_lse is None else ref_lse[r], index, inside,
                        {name: g[r] for name, g in grads.items()},
                        {name: value[r] for name, value in means.items() if name in grads},
                        scratch,
                    )  # fmt: skip
                    if d_bias is not None:
                        d_bias[columns] += grad.sum(0, dtype=dtype)
                    # z = h W^T + b:  dL/dh = dL/dz W, (n, H);  dL/dW = dL/dz^T h, (v, H)
                    grad = grad.to(plan.policy.gemm)
                    if d_hidden is not None:
                        _accumulate(d_hidden[r], grad, w, first=j == 0)
                    if d_w is not None:
                        _accumulate(d_w, grad.T, products.hidden[r], first=i == 0)
                if d_weight is not None and d_w is not None and d_weight.dtype != dtype:
                    d_weight[columns] = d_w  # rounded once per slice, after the sum over all tokens
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            d_weight,
            None if d_bias is None else d_bias.to(bias.dtype),
            None, None, None, None, None,
        )  # fmt: skip


def _combine(
    parts: dict[str, Tensor], picked: dict[str, Tensor], label_tile: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """Statistics of each token from those of its tiles, by the chain rule.

    Let P_t and Q_t be the probabilities that policy and reference give to tile t, and KL_t, H_t the statistics of the
    distributions within the tile. Then
    logp = log P_t + logp_t of the label's tile          entropy = sum_t P_t (H_t - log P_t)
    kl = sum_t Q_t (KL_t + log Q_t - log P_t)            reverse_kl = sum_t P_t (KL_t + log P_t - log Q_t)
    log_sum_p2 = log sum_t P_t^2 exp(log_sum_p2_t)

    Args:
        parts: statistics per tile, `(tiles, N)`; picked: log-probability of the label within its tile, `(N,)`.
        label_tile: the tile of each label, `(N,)`; a label outside the vocabulary has NaN in `picked`.
    Returns: statistics `(N,)`, and the log-sum-exps of policy and reference `(N,)`.
    """
    tiles = parts["mass"].shape[0]
    label_tile = label_tile.clamp(0, tiles - 1)[None]
    out: dict[str, Tensor] = {}
    log_mass: dict[str, Tensor] = {}
    lse: dict[str, Tensor] = {}
    for prefix in ("", "ref_"):
        if f"{prefix}mass" not in parts:
            continue
        mass = parts[f"{prefix}mass"]  # log-sum-exp of the logits of each tile, (tiles, N)
        lse[prefix] = mass.logsumexp(0)
        log_mass[prefix] = mass - lse[prefix]  # log P_t
        of_tile = log_mass[prefix].gather(0, label_tile)[0]  # log P_t of the label's tile, (N,)
        name = f"{prefix}logp"
        out[name] = torch.where(of_tile == float("-inf"), of_tile, picked[name] + of_tile)  # -inf, not NaN

    def average(prefix: str, values: Tensor) -> Tensor:
        # sum_t P_t values_t, (tiles, N) -> (N,), with Q_t for the prefix "ref_"
        # tiles of probability 0 have NaN or infinite values and contribute 0
        weight = log_mass[prefix].exp()
        return (weight * values).masked_fill_(weight == 0, 0).sum(0)

    if "entropy" in parts:
        out["entropy"] = average("", parts["entropy"] - log_mass[""])
    if "kl" in parts:
        out["kl"] = average("ref_", parts["kl"] + (log_mass["ref_"] - log_mass[""]))
    if "reverse_kl" in parts:
        out["reverse_kl"] = average("", parts["reverse_kl"] + (log_mass[""] - log_mass["ref_"]))
    if "log_sum_p2" in parts:
        out["log_sum_p2"] = (2 * log_mass[""] + parts["log_sum_p2"]).nan_to_num(nan=-torch.inf).logsumexp(0)
    return out, lse[""], lse.get("ref_")


def _columns_of(labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """(column of each label, clamped to the tile so that it can be read; whether it is in the tile), each (n,)."""
    inside = (labels >= columns.start) & (labels < columns.stop)
    return (labels - columns.start).clamp_(0, columns.stop - columns.start - 1), inside


def _slice_of(bias: Tensor | None, columns: slice) -> Tensor | None:
    return None if bias is None else bias[columns]


def _reference_tile(
    plan: _Plan, policy_tile: Tensor, ref_weight: Tensor | None, ref_bias: Tensor | None, columns: slice
) -> tuple[Tensor | None, Tensor | None]:
    """The reference head's weight and bias for these columns; a head that both models share is read and cast once."""
    if plan.reference is None or ref_weight is None:
        return None, None
    if plan.shared_head and plan.reference.dtype == plan.policy.dtype:
        return policy_tile, _slice_of(ref_bias, columns)
    return plan.reference.operand(ref_weight[columns]), _slice_of(ref_bias, columns)


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_scale: float = 1.0,
    ref_softcap: float | None = None,
    want: tuple[str, ...] = (),
    token_tile: int | None = None,
    vocab_tile: int | None = None,
    cache_mb: int = CACHE_MB,
) -> TokenStats:
    """The log-probability of each label, and statistics of the next-token distribution that it was drawn from.

    z = s (h W^T + b), with a soft-cap c: z = c tanh(s (h W^T + b) / c);  p = softmax(z), q the same of the reference
    logp = z_y - lse(z)                          entropy = -sum_v p log p
    kl = sum_v q (log q - log p)                 reverse_kl = sum_v p (log p - log q)
    log_sum_p2 = log sum_v p^2

    Statistics are float32 or better for inputs of any dtype. Operands of the matmul have the autocast dtype where
    autocast is on, else the dtype of the weight, also in the backward pass. An entry of probability 0 contributes 0,
    also where a logit is -inf. A label outside the vocabulary gives NaN.

    Args:
        hidden: final hidden states that predict the labels. Shape `(N, H)`; N = 0 is legal and keeps the graph.
        weight: weight of the head. Shape `(V, H)`. Its gradient is computed only if it requires one.
        labels: token ids. Shape `(N,)`, int64.
        bias: bias of the head. Shape `(V,)`.
        scale, softcap: the head's logit scale (1 for none) and soft-cap (None for none).
        ref_hidden, ref_weight, ref_bias, ref_scale, ref_softcap: the same of the reference, whose hidden size may
            differ. They are constants without gradient. `ref_weight` may be `weight` itself.
        want: any of `ref_logp`, `kl`, `reverse_kl`, `entropy`, `log_sum_p2`; `logp` is always computed.
        token_tile, vocab_tile: a tile is `token_tile` tokens by `vocab_tile` entries; None: the default of the device.
        cache_mb: MiB of logits that may be cached for the backward pass, which recomputes the others.
    Returns: TokenStats; each statistic of shape `(N,)`, None where not wanted.
    Raises: ValueError for an unknown statistic, a missing reference, or heads over different vocabularies.
    """
    wanted = frozenset(want) - {"logp"}
    if not wanted <= set(ORDER):
        raise ValueError(f"want: found {sorted(wanted - set(ORDER))}, expected names among {ORDER}")
    defaults = TILES["cuda" if hidden.is_cuda else "cpu"]
    token_tile = defaults[0] if token_tile is None else token_tile
    vocab_tile = defaults[1] if vocab_tile is None else vocab_tile
    if token_tile < 1 or vocab_tile < 1:
        raise ValueError(f"tiles must be at least 1, found token_tile={token_tile}, vocab_tile={vocab_tile}")
    if cache_mb < 0:
        raise ValueError(f"cache_mb must be at least 0, found {cache_mb}")
    if any(cap is not None and cap <= 0 for cap in (softcap, ref_softcap)):
        raise ValueError(f"a soft-cap must be > 0 or None, found {softcap} and {ref_softcap}")
    # logits are float32 also for 16-bit weights: bfloat16 would round log-probabilities to 8 significant bits
    stat_dtype = torch.promote_types(_compute_dtype(weight), torch.float32)
    reference = None
    if wanted - _OF_POLICY:
        if ref_hidden is None or ref_weight is None:
            raise ValueError(f"{sorted(wanted - _OF_POLICY)} need ref_hidden and ref_weight")
        if ref_weight.shape[0] != weight.shape[0]:
            raise ValueError(f"the heads have {weight.shape[0]} and {ref_weight.shape[0]} rows, expected the same")
        stat_dtype = torch.promote_types(stat_dtype, _compute_dtype(ref_weight))
        reference = _head(ref_weight, ref_scale, ref_softcap, stat_dtype)
    else:
        ref_hidden = ref_weight = ref_bias = None
    policy = _head(weight, scale, softcap, stat_dtype)
    # without gradients nothing is read again
    cache_bytes = cache_mb * 2**20 if torch.is_grad_enabled() else 0
    plan = _Plan(
        _implementation(hidden.device),
        wanted,
        policy,
        reference,
        stat_dtype,
        ref_weight is weight,
        token_tile,
        vocab_tile,
        cache_bytes,
    )
    result = _TokenStats.apply(hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, plan)
    return TokenStats(**dict(zip(ORDER, result, strict=True)))


def _head(weight: Tensor, scale: float, softcap: float | None, stat_dtype: torch.dtype) -> Head:
    """The head's settings and dtypes. Args: stat_dtype: dtype of logits and statistics."""
    dtype = _compute_dtype(weight)
    # a GPU multiplies 16-bit operands with float32 accumulation and output; elsewhere operands are rounded to 16 bits
    # and then cast to float32, and have the same products
    in_16_bits = weight.is_cuda and dtype.itemsize == 2 and stat_dtype == torch.float32
    return Head(dtype, dtype if in_16_bits else stat_dtype, float(scale), softcap)


@functools.cache
def _implementation(device: torch.device) -> ModuleType:
    """The module that computes a tile: Triton's kernels on a GPU (or under its interpreter), else torch operations."""
    if importlib.util.find_spec("triton") is not None and (device.type == "cuda" or "TRITON_INTERPRET" in os.environ):
        from prefopt.kernels import triton_stats

        if device.type == "cuda" or triton_stats.interpreted():
            return triton_stats
    return tile


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype to which operands of the matmul are rounded."""
    device = weight.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):  # autocast ignores float64
        return torch.get_autocast_dtype(device)
    return weight.dtype
