"""Hidden states and a head -> log-probability, KL and entropy of each token, without ever holding all the logits.

The logits exist one tile at a time (some tokens by some vocabulary). The forward pass folds the tiles into running
log-sum-exps; the backward pass recomputes each tile and has its gradient in closed form. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from prefopt.types import TokenStats

ORDER = ("logp", "ref_logp", "kl", "reverse_kl", "entropy")  # the order of statistics wherever they are a tuple
TOKEN_TILE = 1024
VOCAB_TILE = 8192

Tensor = torch.Tensor


@dataclass(frozen=True)
class _Side:
    """How one model turns its hidden states into logits."""

    dtype: torch.dtype  # of the matmul, forward and backward alike
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, stat_dtype: torch.dtype) -> Tensor:
        """A fresh tile of logits, (n, v) in `stat_dtype`; `hidden` and `weight` are in `self.dtype` already."""
        z = (hidden @ weight.T).to(stat_dtype)
        if bias is not None:
            z += bias
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def chain_(self, grad: Tensor, z: Tensor) -> Tensor:
        """Gradient of the logits -> gradient of `hidden @ weight.T + bias`, in place."""
        if self.softcap is not None:
            grad *= 1 - (z / self.softcap).square_()
        if self.scale != 1.0:
            grad *= self.scale
        return grad


@dataclass(frozen=True)
class _Plan:
    """Everything about a call that is not a tensor."""

    want: frozenset[str]
    policy: _Side
    reference: _Side | None
    stat_dtype: torch.dtype
    shared_head: bool  # policy and reference read the same weight tensor
    token_tile: int
    vocab_tile: int

    @property
    def pairwise(self) -> bool:
        """Whether a statistic with a gradient reads both models' logits."""
        return bool(self.want & {"kl", "reverse_kl"})

    def token_slices(self, tokens: int, vocab: int) -> list[slice]:
        # a tile is a budget of logits: a vocabulary smaller than one tile leaves room for more tokens
        rows = self.token_tile * max(1, self.vocab_tile // max(1, vocab))
        return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]

    def vocab_slices(self, vocab: int) -> Iterator[slice]:
        for start in range(0, vocab, self.vocab_tile):
            yield slice(start, min(start + self.vocab_tile, vocab))


class _LogSumExp:
    """A log-sum-exp that grows by tiles, and sums weighted by its softmax that are rescaled along with it."""

    def __init__(self) -> None:
        self.top: Tensor | None = None  # running maximum, (n,)
        self.total: Tensor
        self.weighted: dict[str, Tensor] = {}

    def add(self, z: Tensor) -> Tensor:
        """Takes in the logits `z` (n, v) and returns their unnormalised softmax, relative to the running maximum."""
        # clamped, so that a row of nothing but -inf (a masked tile) gives exp(-inf) = 0 and not exp(inf - inf)
        top = z.amax(-1).clamp_(min=torch.finfo(z.dtype).min)
        if self.top is None:
            self.top = top
            e = torch.sub(z, top[:, None]).exp_()
            self.total = e.sum(-1)
            return e
        top = torch.maximum(self.top, top)
        shrink = (self.top - top).exp_()
        self.top = top
        e = torch.sub(z, top[:, None]).exp_()
        self.total = self.total * shrink + e.sum(-1)
        for name in self.weighted:
            self.weighted[name] *= shrink
        return e

    def add_weighted(self, name: str, e: Tensor, values: Tensor) -> None:
        """Adds sum_v e * values to the sum `name`."""
        tile = _weighted_sum(e, values)
        self.weighted[name] = self.weighted[name] + tile if name in self.weighted else tile

    def value(self) -> Tensor:
        assert self.top is not None
        return self.total.log().add_(self.top)

    def mean(self, name: str) -> Tensor:
        """sum_v softmax * values of the sum `name`."""
        return self.weighted[name] / self.total


class _Fold:
    """The statistics of a few tokens, over as much of the vocabulary as has been added."""

    def __init__(self, plan: _Plan, labels: Tensor) -> None:
        self.plan, self.labels = plan, labels
        self.policy, self.reference = _LogSumExp(), _LogSumExp()
        self.picked: Tensor | None = None  # the labels' logits; NaN until the tile that holds them has come
        self.ref_picked: Tensor | None = None

    def add_(self, z: Tensor, ref_z: Tensor | None, columns: slice) -> None:
        """Takes in the tile of both models' logits, (n, v) each; it may overwrite them."""
        inside, index = _label_in_tile(self.labels, columns)
        self.picked = _pick(z, inside, index, self.picked)
        e = self.policy.add(z)
        if "entropy" in self.plan.want:
            self.policy.add_weighted("z", e, z)
        if ref_z is None:
            return
        self.ref_picked = _pick(ref_z, inside, index, self.ref_picked)
        ref_e = self.reference.add(ref_z)
        if self.plan.pairwise:
            gap = ref_z.sub_(z)
            if "kl" in self.plan.want:
                self.reference.add_weighted("gap", ref_e, gap)
            if "reverse_kl" in self.plan.want:
                self.policy.add_weighted("gap", e, gap)

    def finish(self, out: dict[str, Tensor], lse: Tensor, ref_lse: Tensor) -> None:
        """Writes the statistics into `out`, and the log-sum-exps, (n,) each."""
        assert self.picked is not None
        lse.copy_(self.policy.value())
        out["logp"].copy_(self.picked - lse)
        if "entropy" in out:
            out["entropy"].copy_(lse - self.policy.mean("z"))
        if self.ref_picked is None:
            return
        ref_lse.copy_(self.reference.value())
        if "ref_logp" in out:
            out["ref_logp"].copy_(self.ref_picked - ref_lse)
        if "kl" in out:
            out["kl"].copy_(self.reference.mean("gap") - (ref_lse - lse))
        if "reverse_kl" in out:
            out["reverse_kl"].copy_((ref_lse - lse) - self.policy.mean("gap"))


def _whole_(plan: _Plan, z: Tensor, ref_z: Tensor | None, labels: Tensor, out: dict[str, Tensor]) -> None:
    """Writes the statistics of tokens whose whole vocabulary lies in one tile: the formulas as they are written."""
    inside, index = _label_in_tile(labels, slice(0, z.shape[-1]))
    logp = z.log_softmax(-1)
    out["logp"].copy_(_pick(logp, inside, index, None))
    p = logp.exp() if plan.want & {"reverse_kl", "entropy"} else logp
    if "entropy" in out:
        torch.neg(_weighted_sum(p, logp), out=out["entropy"])
    if ref_z is None:
        return
    ref_logp = ref_z.log_softmax(-1)
    if "ref_logp" in out:
        out["ref_logp"].copy_(_pick(ref_logp, inside, index, None))
    if plan.pairwise:
        gap = ref_logp - logp
        if "reverse_kl" in out:
            torch.neg(_weighted_sum(p, gap), out=out["reverse_kl"])
        if "kl" in out:
            out["kl"].copy_(_weighted_sum(ref_logp.exp_(), gap))


def _weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """sum_v weights * values, (n,); entries of weight 0 count 0 even where `values` is infinite."""
    return (weights * values).masked_fill_(weights == 0, 0).sum(-1)


def _pick(z: Tensor, inside: Tensor, index: Tensor, before: Tensor | None) -> Tensor:
    """The entry of each token's label where the tile holds it, else what was picked before."""
    found = z.gather(1, index).squeeze(1)
    return torch.where(inside, found, float("nan") if before is None else before)


def _label_in_tile(labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Whether each label lies in the tile (n,), and a column that may be read in any case (n, 1)."""
    inside = (labels >= columns.start) & (labels < columns.stop)
    return inside, (labels - columns.start).clamp_(0, columns.stop - columns.start - 1)[:, None]


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
        out = {name: hidden.new_empty(tokens, dtype=plan.stat_dtype) for name in ("logp", *plan.want)}
        whole = vocab <= plan.vocab_tile
        lse, ref_lse = torch.empty_like(out["logp"]), torch.empty_like(out["logp"])  # read where there are tiles only
        folds = [] if whole else [_Fold(plan, labels[r]) for r in rows]
        with torch.autocast(hidden.device.type, enabled=False):
            h = hidden.to(plan.policy.dtype)
            reference, ref_h = plan.reference, None
            if reference is not None and ref_hidden is not None:
                ref_h = ref_hidden.to(reference.dtype)
            for columns in plan.vocab_slices(vocab):
                w, b = weight[columns].to(plan.policy.dtype), _part(bias, columns)
                ref_w, ref_b = _reference_tile(plan, w, ref_weight, ref_bias, columns)
                for i, r in enumerate(rows):
                    z = plan.policy.logits(h[r], w, b, plan.stat_dtype)
                    ref_z = None
                    if reference is not None and ref_h is not None and ref_w is not None:
                        ref_z = reference.logits(ref_h[r], ref_w, ref_b, plan.stat_dtype)
                    if whole:
                        _whole_(plan, z, ref_z, labels[r], {name: vector[r] for name, vector in out.items()})
                    else:
                        folds[i].add_(z, ref_z, columns)
            for fold, r in zip(folds, rows, strict=not whole):
                fold.finish({name: vector[r] for name, vector in out.items()}, lse[r], ref_lse[r])

        result = tuple(out.get(name) for name in ORDER)
        if any(ctx.needs_input_grad[:3]):
            pairwise = plan.pairwise
            ctx.save_for_backward(
                hidden, weight, bias, labels, lse,
                ref_hidden if pairwise else None,
                ref_weight if pairwise else None,
                ref_bias if pairwise else None,
                ref_lse if pairwise else None,
                result[3], result[4],
            )  # fmt: skip
        if result[1] is not None:
            ctx.mark_non_differentiable(result[1])
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        saved = ctx.saved_tensors
        hidden, weight, bias, labels, lse, ref_hidden, ref_weight, ref_bias, ref_lse, reverse_kl, entropy = saved
        g_logp, _, g_kl, g_reverse, g_entropy = grads
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        both = g_kl is not None or g_reverse is not None
        tokens, vocab = hidden.shape[0], weight.shape[0]
        rows = plan.token_slices(tokens, vocab)
        side, wide = plan.policy, plan.stat_dtype
        whole = vocab <= plan.vocab_tile

        d_hidden = torch.empty_like(hidden, dtype=wide) if need_hidden else None
        d_weight = torch.empty_like(weight) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if need_bias else None
        # d logp / dz = onehot - p and d kl / dz = p - q: what they share is one multiple of p
        of_p = hidden.new_zeros(tokens, dtype=wide) if g_logp is None else -g_logp
        if g_kl is not None:
            of_p = of_p + g_kl

        with torch.autocast(hidden.device.type, enabled=False):
            h = hidden.to(side.dtype)
            reference = plan.reference if both else None
            ref_h = None if reference is None else ref_hidden.to(reference.dtype)
            for columns in plan.vocab_slices(vocab):
                w, b = weight[columns].to(side.dtype), _part(bias, columns)
                ref_w, ref_b = _reference_tile(plan, w, ref_weight, ref_bias, columns) if both else (None, None)
                d_w = torch.zeros_like(w, dtype=wide) if need_weight else None
                for r in rows:
                    z = side.logits(h[r], w, b, wide)
                    logp = z.log_softmax(-1) if whole else z - lse[r, None]
                    p = logp.exp()
                    grad = p * of_p[r, None]
                    if reference is not None and ref_h is not None and ref_w is not None:
                        ref_z = reference.logits(ref_h[r], ref_w, ref_b, wide)
                        ref_logp = ref_z.log_softmax(-1) if whole else ref_z.sub_(ref_lse[r, None])
                        if g_reverse is not None:
                            slope = (logp - ref_logp).sub_(reverse_kl[r, None]).mul_(g_reverse[r, None])
                            grad += slope.mul_(p).masked_fill_(p == 0, 0)
                        if g_kl is not None:
                            grad -= ref_logp.exp_().mul_(g_kl[r, None])
                    if g_entropy is not None:
                        slope = logp.add_(entropy[r, None]).mul_(g_entropy[r, None])
                        grad -= slope.mul_(p).masked_fill_(p == 0, 0)
                    if g_logp is not None:
                        inside, index = _label_in_tile(labels[r], columns)
                        grad.scatter_add_(1, index, torch.where(inside, g_logp[r], 0)[:, None])
                    grad = side.chain_(grad, z)
                    if d_bias is not None:
                        d_bias[columns] += grad.sum(0)
                    grad = grad.to(side.dtype)
                    if d_hidden is not None:
                        _accumulate(d_hidden[r], grad, w, first=columns.start == 0)
                    if d_w is not None:
                        _accumulate(d_w, grad.T, h[r], first=r.start == 0)
                if d_weight is not None and d_w is not None:
                    d_weight[columns] = d_w

        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            d_weight,
            None if d_bias is None else d_bias.to(bias.dtype),
            None, None, None, None, None,
        )  # fmt: skip


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
    return ref_weight[columns].to(plan.reference.dtype), _part(ref_bias, columns)


def _accumulate(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total += left @ right, summed in total's dtype; the first product overwrites what is there."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=0 if first else 1)
    elif first:
        total.copy_(left @ right)
    else:
        total += left @ right


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
    token_tile: int = TOKEN_TILE,
    vocab_tile: int = VOCAB_TILE,
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
        token_tile, vocab_tile: at most `token_tile * vocab_tile` logits are held at a time.
    Returns: TokenStats; each statistic of shape `(N,)`, None where not wanted.
    Raises: ValueError for an unknown statistic, a missing reference, or heads over different vocabularies.
    """
    wanted = frozenset(want) - {"logp"}
    if not wanted <= set(ORDER):
        raise ValueError(f"want: found {sorted(wanted - set(ORDER))}, expected names among {ORDER}")
    if token_tile < 1 or vocab_tile < 1:
        raise ValueError(f"tiles must be at least 1, found token_tile={token_tile}, vocab_tile={vocab_tile}")
    if any(cap is not None and cap <= 0 for cap in (softcap, ref_softcap)):
        raise ValueError(f"a soft-cap must be > 0 or None, found {softcap} and {ref_softcap}")
    policy = _Side(_compute_dtype(weight), float(scale), softcap)
    stat_dtype = torch.promote_types(policy.dtype, torch.float32)
    reference = None
    if wanted - {"entropy"}:
        if ref_hidden is None or ref_weight is None:
            raise ValueError(f"{sorted(wanted - {'entropy'})} need ref_hidden and ref_weight")
        if ref_weight.shape[0] != weight.shape[0]:
            raise ValueError(f"the heads have {weight.shape[0]} and {ref_weight.shape[0]} rows, expected the same")
        reference = _Side(_compute_dtype(ref_weight), float(ref_scale), ref_softcap)
        stat_dtype = torch.promote_types(stat_dtype, reference.dtype)
    else:
        ref_hidden = ref_weight = ref_bias = None
    plan = _Plan(wanted, policy, reference, stat_dtype, ref_weight is weight, token_tile, vocab_tile)
    result = _TokenStats.apply(hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, plan)
    return TokenStats(**dict(zip(ORDER, result, strict=True)))


def _compute_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):  # autocast leaves float64 alone
        return torch.get_autocast_dtype(device)
    return weight.dtype
