"""Hidden states and a head -> log-probability, KL and entropy of each token, without ever holding all the logits.

The logits exist one tile at a time (some tokens by some of the vocabulary). The forward pass measures each tile as if
it were the whole vocabulary and puts the tiles together by the chain rule: a token's distribution is that over tiles
and, within each, that over its entries. The backward pass has the gradient of a tile in closed form, from the logits
that were kept where memory allowed and from a second product elsewhere. Knows nothing of models.
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

ORDER = ("logp", "ref_logp", "kl", "reverse_kl", "entropy")  # the order of statistics wherever they are a tuple
CACHE_MB = 1024
TILES = {"cpu": (1024, 2048), "cuda": (4096, 16384)}  # tokens by vocabulary, where none is asked for

Tensor = torch.Tensor


@dataclass(frozen=True)
class _Plan:
    """Everything about a call that is not a tensor."""

    tile: ModuleType  # the arithmetic of one tile: `tile`, or `triton_stats` where Triton runs
    want: frozenset[str]
    policy: Head
    reference: Head | None
    stat_dtype: torch.dtype
    shared_head: bool  # policy and reference read the same weight tensor
    token_tile: int
    vocab_tile: int
    cache_bytes: int

    @property
    def pairwise(self) -> bool:
        """Whether a statistic with a gradient reads both models' logits."""
        return bool(self.want & {"kl", "reverse_kl"})

    def token_slices(self, tokens: int, vocab: int) -> list[slice]:
        # a tile is a budget of logits: a vocabulary smaller than one tile leaves room for more tokens
        rows = self.token_tile * max(1, self.vocab_tile // max(1, vocab))
        return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]

    def vocab_slices(self, vocab: int) -> Iterator[tuple[int, slice]]:
        for i, start in enumerate(range(0, vocab, self.vocab_tile)):
            yield i, slice(start, min(start + self.vocab_tile, vocab))


class _Products:
    """hidden @ weight.T of one model, tile by tile; kept for the backward pass while the budget lasts."""

    def __init__(self, name: str, head: Head, hidden: Tensor, scratch: Scratch) -> None:
        self.name, self.head, self.hidden, self.scratch = name, head, head.operand(hidden), scratch
        self.kept: dict[tuple[int, int], Tensor] = {}

    def __call__(self, key: tuple[int, int], rows: slice, weight: Tensor, *, keep: bool = False) -> Tensor:
        """The tile `key`, (n, v); `weight` (v, H) is in the head's operand dtype already."""
        if key in self.kept:
            return self.kept[key]
        hidden = self.hidden[rows]
        shape = hidden.shape[0], weight.shape[0]
        if keep:
            self.kept[key] = out = torch.empty(shape, dtype=self.scratch.dtype, device=hidden.device)
        else:
            out = self.scratch(self.name, *shape)
        return _multiply(hidden, weight.T, out)


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out = left @ right in out's dtype, without rounding to the operands' dtype in between."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def _accumulate(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total += left @ right, summed in total's dtype; the first product overwrites what is there."""
    if first:
        _multiply(left, right, total)
    elif left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


class _TokenStats(torch.autograd.Function):
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
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        tokens, vocab = hidden.shape[0], weight.shape[0]
        rows = plan.token_slices(tokens, vocab)
        tiles = -(-vocab // plan.vocab_tile)
        names = {"mass", "logp", *plan.want} | ({"ref_mass", "ref_logp"} if plan.reference is not None else set())
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
        with torch.autocast(hidden.device.type, enabled=False):
            products = _Products("product", plan.policy, hidden, scratch)
            ref_products = None
            if plan.reference is not None and ref_hidden is not None:
                ref_products = _Products("ref_product", plan.reference, ref_hidden, scratch)
            for j, columns in plan.vocab_slices(vocab):
                w, b = plan.policy.operand(weight[columns]), _part(bias, columns)
                ref_w, ref_b = _reference_tile(plan, w, ref_weight, ref_bias, columns)
                for i, r in enumerate(rows):
                    size = (r.stop - r.start) * (columns.stop - columns.start) * plan.stat_dtype.itemsize
                    budget -= size * (1 + plan.pairwise)
                    keep = budget >= 0
                    policy = Side(plan.policy, products((i, j), r, w, keep=keep), b)
                    reference = None
                    if ref_products is not None and plan.reference is not None and ref_w is not None:
                        product = ref_products((i, j), r, ref_w, keep=keep and plan.pairwise)
                        reference = Side(plan.reference, product, ref_b)
                    index, inside = _columns_of(labels[r], columns)
                    for name, value in plan.tile.measure(policy, reference, index, plan.want, scratch).items():
                        if name in picked:
                            picked[name][r] = torch.where(inside, value, picked[name][r])
                        else:
                            parts[name][j, r] = value
            out, lse, ref_lse = _combine(parts, picked, labels // plan.vocab_tile)
        result = tuple(out.get(name) if name == "logp" or name in plan.want else None for name in ORDER)
        if any(ctx.needs_input_grad[:3]):
            pairwise = plan.pairwise
            kept, ref_kept = products.kept, {} if ref_products is None else ref_products.kept
            ctx.kept = tuple(kept), tuple(ref_kept)
            ctx.save_for_backward(
                hidden, weight, bias, labels, lse,
                ref_hidden if pairwise else None,
                ref_weight if pairwise else None,
                ref_bias if pairwise else None,
                ref_lse if pairwise else None,
                result[3], result[4], *kept.values(), *ref_kept.values(),
            )  # fmt: skip
        if result[1] is not None:
            ctx.mark_non_differentiable(result[1])
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        saved = ctx.saved_tensors
        hidden, weight, bias, labels, lse, ref_hidden, ref_weight, ref_bias, ref_lse, reverse_kl, entropy = saved[:11]
        kept, ref_kept = ctx.kept
        grads = {name: g for name, g in zip(ORDER, incoming, strict=True) if g is not None and name != "ref_logp"}
        means = {"reverse_kl": reverse_kl, "entropy": entropy}
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        tokens, vocab = hidden.shape[0], weight.shape[0]
        rows, wide = plan.token_slices(tokens, vocab), plan.stat_dtype
        d_hidden = torch.zeros_like(hidden, dtype=wide) if need_hidden else None
        d_weight = (torch.empty_like if tokens else torch.zeros_like)(weight) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if need_bias else None
        scratch = Scratch(wide, hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            products = _Products("product", plan.policy, hidden, scratch)
            products.kept = dict(zip(kept, saved[11:], strict=False))
            ref_products = None
            if plan.reference is not None and grads.keys() & {"kl", "reverse_kl"}:
                ref_products = _Products("ref_product", plan.reference, ref_hidden, scratch)
                ref_products.kept = dict(zip(ref_kept, saved[11 + len(kept) :], strict=True))
            for j, columns in plan.vocab_slices(vocab):
                w, b = plan.policy.operand(weight[columns]), _part(bias, columns)
                ref_w, ref_b = None, None
                if ref_products is not None:
                    ref_w, ref_b = _reference_tile(plan, w, ref_weight, ref_bias, columns)
                d_w = None
                if d_weight is not None:
                    d_w = d_weight[columns] if d_weight.dtype == wide else torch.empty_like(w, dtype=wide)
                for i, r in enumerate(rows):
                    policy = Side(plan.policy, products((i, j), r, w), b)
                    reference = None
                    if ref_products is not None and plan.reference is not None and ref_w is not None:
                        reference = Side(plan.reference, ref_products((i, j), r, ref_w), ref_b)
                    index, inside = _columns_of(labels[r], columns)
                    grad = plan.tile.slope(
                        policy, reference, lse[r], None if ref_lse is None else ref_lse[r], index, inside,
                        {name: g[r] for name, g in grads.items()},
                        {name: value[r] for name, value in means.items() if name in grads},
                        scratch,
                    )  # fmt: skip
                    if d_bias is not None:
                        d_bias[columns] += grad.sum(0, dtype=wide)
                    grad = grad.to(plan.policy.gemm)
                    if d_hidden is not None:
                        _accumulate(d_hidden[r], grad, w, first=j == 0)
                    if d_w is not None:
                        _accumulate(d_w, grad.T, products.hidden[r], first=i == 0)
                if d_weight is not None and d_w is not None and d_weight.dtype != wide:
                    d_weight[columns] = d_w
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            d_weight,
            None if d_bias is None else d_bias.to(bias.dtype),
            None, None, None, None, None,
        )  # fmt: skip


def _combine(
    parts: dict[str, Tensor], picked: dict[str, Tensor], home: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """Statistics of each token from those of the tiles, by the chain rule.

    With P_t and Q_t the mass that policy and reference give to tile t:
    KL = sum_t Q_t (KL_t + log Q_t - log P_t) and entropy = sum_t P_t (entropy_t - log P_t).

    Args:
        parts: per tile, `(tiles, N)`; picked: log-probability of the label within its tile, `(N,)`.
        home: the tile of each label, `(N,)`; a label outside the vocabulary has NaN in `picked`.
    Returns: statistics `(N,)`, and the log-sum-exps of policy and reference `(N,)`.
    """
    tiles = parts["mass"].shape[0]
    home = home.clamp(0, tiles - 1)[None]
    out: dict[str, Tensor] = {}
    log_mass: dict[str, Tensor] = {}
    lse: dict[str, Tensor] = {}
    for prefix in ("", "ref_"):
        if f"{prefix}mass" not in parts:
            continue
        mass = parts[f"{prefix}mass"]
        lse[prefix] = mass.logsumexp(0)
        log_mass[prefix] = mass - lse[prefix]
        at_home = log_mass[prefix].gather(0, home)[0]
        name = f"{prefix}logp"
        out[name] = torch.where(at_home == float("-inf"), at_home, picked[name] + at_home)

    def average(prefix: str, values: Tensor) -> Tensor:
        share = log_mass[prefix].exp()
        return (share * values).masked_fill_(share == 0, 0).sum(0)

    if "entropy" in parts:
        out["entropy"] = average("", parts["entropy"] - log_mass[""])
    if "kl" in parts:
        out["kl"] = average("ref_", parts["kl"] + (log_mass["ref_"] - log_mass[""]))
    if "reverse_kl" in parts:
        out["reverse_kl"] = average("", parts["reverse_kl"] + (log_mass[""] - log_mass["ref_"]))
    return out, lse[""], lse.get("ref_")


def _columns_of(labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """A column of the tile that may be read in any case, and whether the label lies in the tile; both (n,)."""
    inside = (labels >= columns.start) & (labels < columns.stop)
    return (labels - columns.start).clamp_(0, columns.stop - columns.start - 1), inside


def _part(bias: Tensor | None, columns: slice) -> Tensor | None:
    return None if bias is None else bias[columns]


def _reference_tile(
    plan: _Plan, policy_tile: Tensor, ref_weight: Tensor | None, ref_bias: Tensor | None, columns: slice
) -> tuple[Tensor | None, Tensor | None]:
    """The reference head's part for these columns; a head that both models share is read and cast once."""
    if plan.reference is None or ref_weight is None:
        return None, None
    if plan.shared_head and plan.reference.dtype == plan.policy.dtype:
        return policy_tile, _part(ref_bias, columns)
    return plan.reference.operand(ref_weight[columns]), _part(ref_bias, columns)


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
    """The log-probability of each label, and what else is wanted of the distribution that it was drawn from.

    z = c tanh(s (h W^T + b) / c) without a soft-cap c: s (h W^T + b);  p = softmax(z), q = softmax of the reference's
    logp = z_y - lse(z)                          entropy = -sum_v p log p
    kl = sum_v q (log q - log p)                 reverse_kl = sum_v p (log p - log q)

    Statistics are float32 or better whatever the inputs are. The matmul runs in the autocast dtype where autocast is
    on, else in the dtype of the weight, and the backward pass uses the same dtype. An entry that has no probability
    contributes 0, also where a logit is -inf. A label outside the vocabulary gives NaN.

    Args:
        hidden: states that predict the labels. Shape `(N, H)`; N = 0 is legal and keeps the graph.
        weight: of the head. Shape `(V, H)`. Its gradient is computed only if it requires one.
        labels: token ids. Shape `(N,)`, int64.
        bias: of the head. Shape `(V,)`.
        scale, softcap: the head's logit scale (1 for none) and soft-cap (None for none).
        ref_hidden, ref_weight, ref_bias, ref_scale, ref_softcap: the same of the reference, whose width may differ.
            They are constants: no gradient flows to them. `ref_weight` may be `weight` itself.
        want: any of `ref_logp`, `kl`, `reverse_kl`, `entropy`; `logp` always comes.
        token_tile, vocab_tile: one tile is `token_tile` tokens by `vocab_tile` entries; None: what suits the device.
        cache_mb: MiB of logits that may be kept for the backward pass, which needs no second product for them.
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
    stat_dtype = torch.promote_types(_compute_dtype(weight), torch.float32)
    reference = None
    if wanted - {"entropy"}:
        if ref_hidden is None or ref_weight is None:
            raise ValueError(f"{sorted(wanted - {'entropy'})} need ref_hidden and ref_weight")
        if ref_weight.shape[0] != weight.shape[0]:
            raise ValueError(f"the heads have {weight.shape[0]} and {ref_weight.shape[0]} rows, expected the same")
        stat_dtype = torch.promote_types(stat_dtype, _compute_dtype(ref_weight))
        reference = _head(ref_weight, ref_scale, ref_softcap, stat_dtype)
    else:
        ref_hidden = ref_weight = ref_bias = None
    policy = _head(weight, scale, softcap, stat_dtype)
    cache_bytes = cache_mb * 2**20 if torch.is_grad_enabled() else 0
    plan = _Plan(
        _arithmetic(hidden.device),
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
    dtype = _compute_dtype(weight)
    # a GPU multiplies 16-bit operands into float32; elsewhere the operands are widened after they were rounded
    narrow = weight.is_cuda and dtype.itemsize == 2 and stat_dtype == torch.float32
    return Head(dtype, dtype if narrow else stat_dtype, float(scale), softcap)


@functools.cache
def _arithmetic(device: torch.device) -> ModuleType:
    """Triton's kernels on a GPU (or under its interpreter), torch operations elsewhere."""
    if importlib.util.find_spec("triton") is not None and (device.type == "cuda" or "TRITON_INTERPRET" in os.environ):
        from prefopt.kernels import triton_stats

        if device.type == "cuda" or triton_stats.interpreted():
            return triton_stats
    return tile


def _compute_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):  # autocast leaves float64 alone
        return torch.get_autocast_dtype(device)
    return weight.dtype
