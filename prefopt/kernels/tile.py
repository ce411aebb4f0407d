"""One tile of logits, n tokens by v entries of the vocabulary, in torch operations: its statistics and its gradient.

`statistics` treats the tile as if it were the whole vocabulary; `token_stats` combines tiles. All (n, v) tensors are
scratch buffers that are reused for every tile, so most operations are in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

Tensor = torch.Tensor

WITH_GRADIENT = ("logp", "kl", "reverse_kl", "entropy", "log_sum_p2")


@dataclass(frozen=True)
class Head:
    """How a model computes logits from hidden states, and in which precision."""

    dtype: torch.dtype  # hidden states and weights are rounded to it
    gemm: torch.dtype  # dtype of the matmul's operands; products are accumulated and returned in float32 or better
    scale: float
    softcap: float | None

    def operand(self, x: Tensor) -> Tensor:
        """Hidden states or weights as an operand of the matmul."""
        return x.to(self.dtype).to(self.gemm)

    def logits(self, product: Tensor, bias: Tensor | None, scratch: Tensor) -> Tensor:
        """The logits (n, v) of the product hidden @ weight.T, which is not written to but may be returned."""
        if bias is None and self.scale == 1.0 and self.softcap is None:
            return product
        z = scratch.copy_(product)  # the product may be cached for the backward pass
        if bias is not None:
            z += bias
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def chain_(self, grad: Tensor, z: Tensor, scratch: Tensor) -> Tensor:
        """Gradient of the logits z -> gradient of u = `hidden @ weight.T + bias`, in place.

        z = c tanh(s u / c), so dz/du = s (1 - (z / c)^2).
        """
        # the tanh comes last in the forward pass, so its derivative is applied first
        if self.softcap is not None:
            grad -= torch.div(z, self.softcap, out=scratch).square_().mul_(grad)
        if self.scale != 1.0:
            grad *= self.scale
        return grad


class Scratch:
    """Named buffers that are reused for each tile: allocating memory costs more than the arithmetic that fills it."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        """The (rows, columns) buffer `name`, with the content of its last use."""
        size = rows * columns
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=dtype or self.dtype, device=self.device)
        return self._buffers[name][:size].view(rows, columns)


@dataclass(frozen=True)
class Side:
    """A tile of one model, policy or reference."""

    head: Head
    product: Tensor  # (n, v) hidden @ weight.T; never written to
    bias: Tensor | None  # (v,)


def statistics(
    policy: Side, reference: Side | None, index: Tensor, want: frozenset[str], scratch: Scratch
) -> dict[str, Tensor]:
    """Statistics of n tokens as if the tile's v columns were the whole vocabulary.

    mass = lse(z)    logp = log_softmax(z)_y    entropy = -sum_v p log p
    kl = sum_v q (log q - log p)                reverse_kl = sum_v p (log p - log q)
    log_sum_p2 = log sum_v p^2

    Args:
        index: column of each label, or any column where the label lies in another tile. Shape `(n,)`.
        want: statistics beside `logp`; `kl` and `reverse_kl` need the reference.
    Returns: `mass` (log-sum-exp of the logits), `logp` and, as asked for, `ref_mass`, `ref_logp`, `kl`, `reverse_kl`,
        `entropy`, `log_sum_p2`; each `(n,)`. In a tile where every logit is -inf, mass is -inf and the others are NaN.
    """
    shape = policy.product.shape
    z = policy.head.logits(policy.product, policy.bias, scratch("logits", *shape))
    logp = torch.log_softmax(z, -1, out=scratch("logp", *shape))  # (n, v)
    out = {"mass": _mass(z, logp, index), "logp": _at(logp, index)}
    ref_logp = None
    if reference is not None:
        # the policy's logits are not needed any more, so the reference's overwrite them
        r = reference.head.logits(reference.product, reference.bias, scratch("logits", *shape))
        ref_logp = torch.log_softmax(r, -1, out=scratch("ref_logp", *shape))
        out |= {"ref_mass": _mass(r, ref_logp, index), "ref_logp": _at(ref_logp, index)}
    if want & {"entropy", "log_sum_p2"}:  # before `logp` is overwritten below
        p = torch.exp(logp, out=scratch("work", *shape))
        if "entropy" in want:
            out["entropy"] = -_expectation(p, logp, scratch("term", *shape))
        if "log_sum_p2" in want:  # within the tile the largest p is at least 1 / v, so the sum does not underflow
            out["log_sum_p2"] = torch.linalg.vector_norm(p, dim=-1).log() * 2
    if ref_logp is not None and want & {"kl", "reverse_kl"}:
        if "reverse_kl" in want:
            p = torch.exp(logp, out=scratch("work", *shape))
            gap = torch.sub(logp, ref_logp, out=logp)  # log p - log q
            out["reverse_kl"] = _expectation(p, gap, scratch("term", *shape))
            gap.neg_()  # log q - log p, for the forward KL
        else:
            gap = torch.sub(ref_logp, logp, out=logp)
        if "kl" in want:
            out["kl"] = _expectation(ref_logp.exp_(), gap, scratch("term", *shape))  # under q = exp(log q)
    return out


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
    """Gradient of sum_n sum_s grads[s][n] * s[n] with respect to u = `policy.product + policy.bias`, (n, v).

    With g_s = grads[s] the gradient of each statistic s with respect to the logits z is

    d logp / dz = onehot - p        d reverse_kl / dz = p (log p - log q - reverse_kl)
    d kl / dz = p - q               d entropy / dz = -p (log p + entropy)
    d log_sum_p2 / dz = 2 p (p / sum_v p^2 - 1)
    Collected: p * (per_token - g_entropy log p + g_reverse (log p - log q) + 2 g_p2 p / sum_v p^2) - g_kl q
    + g_logp onehot, where per_token holds the terms that are one number per token.

    Args:
        lse, ref_lse: log-sum-exp over the whole vocabulary, `(n,)`.
        index, inside: column of each label and whether the tile holds it, `(n,)`.
        grads: incoming gradients of the statistics, `(n,)` each.
        means: the values of `reverse_kl`, `entropy` and `log_sum_p2` where they are in `grads`.
    """
    shape = policy.product.shape
    z = policy.head.logits(policy.product, policy.bias, scratch("logits", *shape))
    logp = torch.sub(z, lse[:, None], out=scratch("logp", *shape))
    g_logp, g_kl, g_reverse, g_entropy, g_p2 = (grads.get(name) for name in WITH_GRADIENT)
    grad = torch.exp(logp, out=scratch("grad", *shape))  # p
    per_token = per_token_factor(grads, means, lse)
    ref_logp = None
    if reference is not None and ref_lse is not None:
        # a buffer of its own, because `chain_` reads the policy's logits z at the end
        r = reference.head.logits(reference.product, reference.bias, scratch("ref_logits", *shape))
        ref_logp = torch.sub(r, ref_lse[:, None], out=scratch("ref_logp", *shape))
    if g_reverse is None and g_entropy is None and g_p2 is None:
        grad *= per_token[:, None]
    else:
        factor = scratch("work", *shape).copy_(per_token[:, None].expand(shape))
        if g_p2 is not None:
            factor.addcmul_(grad, (2 * g_p2 * torch.exp(-means["log_sum_p2"]))[:, None])
        if g_entropy is not None:
            factor.addcmul_(logp, g_entropy[:, None], value=-1)
        if g_reverse is not None and ref_logp is not None:
            factor.addcmul_(logp.sub_(ref_logp), g_reverse[:, None])
        # where p = 0 the factor may be infinite; the limit of p log p is 0
        grad = torch.mul(grad, factor, out=factor).masked_fill_(grad == 0, 0)
    if g_kl is not None and ref_logp is not None:
        grad.addcmul_(ref_logp.exp_(), g_kl[:, None], value=-1)
    if g_logp is not None:
        # the one-hot term; a label of another tile adds 0 at an arbitrary column
        grad.scatter_add_(1, index[:, None], torch.where(inside, g_logp, 0)[:, None])
    return policy.head.chain_(grad, z, scratch("logp", *shape))


def per_token_factor(grads: Mapping[str, Tensor], means: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """The part of the factor of p that is one number per token, (n,).

    g_kl - g_logp - g_reverse KL_r - g_entropy H - 2 g_p2, with the reverse KL and the entropy H from `means`.
    """
    total = torch.zeros_like(like)
    if "logp" in grads:
        total -= grads["logp"]
    if "kl" in grads:
        total += grads["kl"]
    for name in ("reverse_kl", "entropy"):
        if name in grads:
            total -= grads[name] * means[name]
    if "log_sum_p2" in grads:
        total -= 2 * grads["log_sum_p2"]
    return total


def _mass(z: Tensor, logp: Tensor, index: Tensor) -> Tensor:
    """log-sum-exp of each row, (n,), as z_y - logp_y: exact for any entry whose probability is not tiny."""
    # z - log_softmax(z) is the same number in each column, so one entry replaces another pass over the tile
    mass = _at(z, index) - _at(logp, index)
    if not bool((_at(logp, index) > -100).all()):  # z_y and logp_y would cancel; use the largest entry instead
        top = z.amax(-1)
        mass = torch.where(top == float("-inf"), top, top - logp.amax(-1))
    return mass


def _at(logp: Tensor, index: Tensor) -> Tensor:
    """The entry of each row at its index, (n,)."""
    return logp.gather(1, index[:, None]).squeeze(1)


def _expectation(weights: Tensor, values: Tensor, scratch: Tensor) -> Tensor:
    """sum_v weights * values, (n,); entries of weight 0 contribute 0 even where `values` is infinite."""
    total = torch.mul(weights, values, out=scratch).sum(-1)
    if bool(total.isnan().any()):  # 0 * inf; masking always would cost another pass over the tile
        total = scratch.masked_fill_(weights == 0, 0).sum(-1)
    return total
