"""Triton kernels for a tile on a GPU: each logit is read once, and no (n, v) tensor but the products is materialised.

`statistics` and `gradient` have the signatures, meanings and values of those in `tile`. One program of the forward
kernel handles one token: it reduces the tile's columns, block by block, into an online softmax of both models (running
maximum and sum) and into expectations under it. One program of the backward kernel handles one block of one token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from prefopt.kernels.tile import WITH_GRADIENT, Scratch, Side, per_token_factor

Tensor = torch.Tensor

_BLOCK = 2048  # columns per block of a program
# rows of the forward kernel's output
_ROWS = ("mass", "logp", "ref_mass", "ref_logp", "kl", "reverse_kl", "entropy", "log_sum_p2")


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on any device (TRITON_INTERPRET=1)."""
    return not isinstance(_forward, triton.runtime.JITFunction)


@triton.jit
def _logits(
    product, bias_ptr, columns, mask, HAS_BIAS: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, STAT: tl.constexpr
):
    """Entries of hidden @ weight.T -> logits z = CAP tanh(SCALE (product + bias) / CAP), in dtype STAT."""
    z = product.to(STAT)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(STAT)
    if SCALE != 1.0:
        z *= SCALE
    if CAP > 0.0:
        z = CAP * _tanh(z / CAP)
    return z


@triton.jit
def _tanh(x):
    # tanh |x| = (1 - exp(-2 |x|)) / (1 + exp(-2 |x|)) does not overflow; tl has no tanh for float64
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def _finite(top):
    """The running maximum, or 0 while all entries were -inf: -inf - -inf would be NaN."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _online_softmax(top, total, z):
    """One step of the online softmax: (new maximum, new sum, factor for the old sums, exp(z - new maximum))."""
    new_top = tl.maximum(top, tl.max(z, axis=0))
    shrink = tl.exp(top - _finite(new_top))
    e = tl.exp(z - _finite(new_top))
    return new_top, total * shrink + tl.sum(e, axis=0), shrink, e


@triton.jit
def _forward(
    z_ptr, bias_ptr, ref_ptr, ref_bias_ptr, index_ptr, out_ptr, tokens, columns,
    HAS_BIAS: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    HAS_REF: tl.constexpr, REF_HAS_BIAS: tl.constexpr, REF_SCALE: tl.constexpr, REF_CAP: tl.constexpr,
    KL: tl.constexpr, REVERSE: tl.constexpr, ENTROPY: tl.constexpr, P2: tl.constexpr,
    STAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)  # 64 bits, because token * columns may exceed 2^31 in large tiles
    label = tl.load(index_ptr + token)
    zero = tl.zeros((), dtype=STAT)
    top, total, z_sum, gap_sum, picked = zero - float("inf"), zero, zero, zero, zero
    squares = zero
    ref_top, ref_total, ref_gap_sum, ref_picked = zero - float("inf"), zero, zero, zero
    # Running sums under exp(z - top): total = sum e, z_sum = sum e z, gap_sum = sum e (z - r), squares = sum e^2; of
    # the reference, under exp(r - ref_top): ref_total, ref_gap_sum = sum e (r - z). They are rescaled when the maximum
    # grows.
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < columns
        product = tl.load(z_ptr + token * columns + at, mask=mask, other=0.0)
        z = tl.where(mask, _logits(product, bias_ptr, at, mask, HAS_BIAS, SCALE, CAP, STAT), -float("inf"))
        picked += tl.sum(tl.where(at == label, z, 0.0), axis=0)  # z_y; exactly one column matches
        top, total, shrink, e = _online_softmax(top, total, z)
        if ENTROPY:
            z_sum = z_sum * shrink + tl.sum(tl.where(e > 0.0, e * z, 0.0), axis=0)
        if P2:
            squares = squares * shrink * shrink + tl.sum(e * e, axis=0)
        if HAS_REF:
            ref_product = tl.load(ref_ptr + token * columns + at, mask=mask, other=0.0)
            r = _logits(ref_product, ref_bias_ptr, at, mask, REF_HAS_BIAS, REF_SCALE, REF_CAP, STAT)
            r = tl.where(mask, r, -float("inf"))
            ref_picked += tl.sum(tl.where(at == label, r, 0.0), axis=0)
            ref_top, ref_total, ref_shrink, ref_e = _online_softmax(ref_top, ref_total, r)
            # entries of probability 0 contribute 0, also where the logit is -inf and the product would be NaN
            if KL:
                ref_gap_sum = ref_gap_sum * ref_shrink + tl.sum(tl.where(ref_e > 0.0, ref_e * (r - z), 0.0), axis=0)
            if REVERSE:
                gap_sum = gap_sum * shrink + tl.sum(tl.where(e > 0.0, e * (z - r), 0.0), axis=0)
    # lse = top + log total;  E_p[x] = sum e x / total;  log p - log q = (z - r) - (lse - ref_lse), and E_p of it is
    # gap_sum / total - (lse - ref_lse). The rows of `out` are those of _ROWS.
    lse = top + tl.log(total)
    tl.store(out_ptr + token, lse)
    tl.store(out_ptr + tokens + token, picked - lse)
    if HAS_REF:
        ref_lse = ref_top + tl.log(ref_total)
        tl.store(out_ptr + 2 * tokens + token, ref_lse)
        tl.store(out_ptr + 3 * tokens + token, ref_picked - ref_lse)
        if KL:
            tl.store(out_ptr + 4 * tokens + token, ref_gap_sum / ref_total - (ref_lse - lse))
        if REVERSE:
            tl.store(out_ptr + 5 * tokens + token, gap_sum / total - (lse - ref_lse))
    if ENTROPY:
        tl.store(out_ptr + 6 * tokens + token, lse - z_sum / total)
    if P2:
        tl.store(out_ptr + 7 * tokens + token, tl.log(squares) - 2.0 * tl.log(total))


@triton.jit
def _backward(
    z_ptr, bias_ptr, ref_ptr, ref_bias_ptr, grad_ptr, lse_ptr, ref_lse_ptr, index_ptr,
    per_token_ptr, g_logp_ptr, g_kl_ptr, g_reverse_ptr, g_entropy_ptr, g_p2_ptr, columns,
    HAS_BIAS: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    REF_HAS_BIAS: tl.constexpr, REF_SCALE: tl.constexpr, REF_CAP: tl.constexpr,
    LOGP: tl.constexpr, KL: tl.constexpr, REVERSE: tl.constexpr, ENTROPY: tl.constexpr, P2: tl.constexpr,
    STAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # dL/dz = p (per_token - g_entropy log p + g_reverse (log p - log q) + g_p2 p) - g_kl q + g_logp onehot, see
    # `tile.gradient`; the caller has divided g_p2 by sum p^2 / 2
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < columns
    product = tl.load(z_ptr + token * columns + at, mask=mask, other=0.0)
    z = _logits(product, bias_ptr, at, mask, HAS_BIAS, SCALE, CAP, STAT)
    logp = z - tl.load(lse_ptr + token)  # lse of the whole vocabulary, not of the tile
    p = tl.exp(logp)
    factor = tl.zeros((BLOCK,), dtype=STAT) + tl.load(per_token_ptr + token)
    ref_logp = logp
    if KL or REVERSE:
        ref_product = tl.load(ref_ptr + token * columns + at, mask=mask, other=0.0)
        r = _logits(ref_product, ref_bias_ptr, at, mask, REF_HAS_BIAS, REF_SCALE, REF_CAP, STAT)
        ref_logp = r - tl.load(ref_lse_ptr + token)
    if ENTROPY:
        factor -= tl.load(g_entropy_ptr + token) * logp
    if P2:
        factor += tl.load(g_p2_ptr + token) * p
    if REVERSE:
        factor += tl.load(g_reverse_ptr + token) * (logp - ref_logp)
    grad = tl.where(p > 0.0, p * factor, p)  # the factor may be infinite where p is 0
    if KL:
        grad -= tl.load(g_kl_ptr + token) * tl.exp(ref_logp)
    if LOGP:  # the index is -1 if another tile holds the label, so no column matches
        grad += tl.where(at == tl.load(index_ptr + token), tl.load(g_logp_ptr + token), 0.0)
    if CAP > 0.0:  # dz/du = SCALE (1 - (z / CAP)^2)
        grad *= 1.0 - (z / CAP) * (z / CAP)
    if SCALE != 1.0:
        grad *= SCALE
    tl.store(grad_ptr + token * columns + at, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def statistics(
    policy: Side, reference: Side | None, index: Tensor, want: frozenset[str], scratch: Scratch
) -> dict[str, Tensor]:
    """As `tile.statistics`."""
    tokens, columns = policy.product.shape
    names = {"mass", "logp", *want} | ({"ref_mass", "ref_logp"} if reference is not None else set())
    out = policy.product.new_empty((len(_ROWS), tokens), dtype=scratch.dtype)
    if tokens:
        other = reference or policy  # pointers must be valid even where a kernel does not read them
        # Triton launches on the current device, which may not be that of the tensors
        with torch.cuda.device_of(policy.product):
            _forward[(tokens,)](
                policy.product, _or(policy.bias, index), other.product, _or(other.bias, index), index, out,
                tokens, columns,
                **_head(policy, ""), HAS_REF=reference is not None, **_head(other, "REF_"),
                KL="kl" in want, REVERSE="reverse_kl" in want, ENTROPY="entropy" in want,
                P2="log_sum_p2" in want,
                STAT=_TYPES[scratch.dtype], BLOCK=_block(columns), num_warps=8,
            )  # fmt: skip
    return {name: out[_ROWS.index(name)] for name in names}


def gradient(
    policy: Side,
    reference: Side | None,
    lse: Tensor,
    ref_lse: Tensor | None,
    index: Tensor,
    inside: Tensor,
    grads: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
    scratch: Scratch,
) -> Tensor:
    """As `tile.gradient`, in the dtype of the matmuls that follow."""
    tokens, columns = policy.product.shape
    grad = scratch("grad", tokens, columns, dtype=policy.head.gemm)
    if not tokens:
        return grad
    other = reference or policy
    incoming = {name: g.contiguous() for name, g in grads.items()}
    if "log_sum_p2" in grads:
        incoming["log_sum_p2"] = 2 * grads["log_sum_p2"] * torch.exp(-means["log_sum_p2"])
    block = _block(columns)
    with torch.cuda.device_of(policy.product):
        _backward[(tokens, triton.cdiv(columns, block))](
            policy.product, _or(policy.bias, index), other.product, _or(other.bias, index), grad,
            lse, _or(ref_lse, lse), torch.where(inside, index, -1), per_token_factor(grads, means, lse),
            *(incoming.get(name, lse) for name in WITH_GRADIENT), columns,
            **_head(policy, ""), **_head(other, "REF_"),
            LOGP="logp" in grads, KL="kl" in grads, REVERSE="reverse_kl" in grads, ENTROPY="entropy" in grads,
            P2="log_sum_p2" in grads,
            STAT=_TYPES[scratch.dtype], BLOCK=block, num_warps=8,
        )  # fmt: skip
    return grad


_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def _head(side: Side, prefix: str) -> dict[str, object]:
    """The compile-time arguments of a model's head."""
    head = {"HAS_BIAS": side.bias is not None, "SCALE": side.head.scale, "CAP": side.head.softcap or 0.0}
    return {prefix + name: value for name, value in head.items()}


def _or(given: Tensor | None, other: Tensor) -> Tensor:
    """The tensor, or another one as a valid pointer that the kernel does not read."""
    return other if given is None else given


def _block(columns: int) -> int:
    """Columns per block: a power of two, as tl.arange requires, and no more than the tile needs."""
    return min(_BLOCK, triton.next_power_of_2(columns))
