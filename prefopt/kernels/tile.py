"""One tile of logits (some tokens by some of the vocabulary) in torch operations: its statistics and its gradient.

`measure` treats the tile as if it were the whole vocabulary; how tiles combine is the business of `token_stats`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Head:
    """How a model turns its hidden states into logits, and in which precision that is computed."""

    dtype: torch.dtype  # to which hidden states and weights are rounded
    gemm: torch.dtype  # of the operands of the matrix products, which are summed and returned in float32 or better
    scale: float
    softcap: float | None

    def operand(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).to(self.gemm)

    def logits(self, product: Tensor, bias: Tensor | None, scratch: Tensor) -> Tensor:
        """(n, v) logits of the product hidden @ weight.T, which is left as it is; the result may be the product."""
        if bias is None and self.scale == 1.0 and self.softcap is None:
            return product
        z = scratch.copy_(product)
        if bias is not None:
            z += bias
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def chain_(self, grad: Tensor, z: Tensor, scratch: Tensor) -> Tensor:
        """Gradient of the logits -> gradient of `hidden @ weight.T + bias`, in place."""
        if self.softcap is not None:
            grad -= torch.div(z, self.softcap, out=scratch).square_().mul_(grad)
        if self.scale != 1.0:
            grad *= self.scale
        return grad


class Scratch:
    """Buffers that are used again for each tile: fresh memory costs more than the arithmetic that fills it."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        """The (rows, columns) buffer `name`, with what was last left in it."""
        size = rows * columns
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=dtype or self.dtype, device=self.device)
        return self._buffers[name][:size].view(rows, columns)


@dataclass(frozen=True)
class Side:
    """One model's part of a tile."""

    head: Head
    product: Tensor  # (n, v) hidden @ weight.T; never written to
    bias: Tensor | None  # (v,)


def measure(
    policy: Side, reference: Side | None, index: Tensor, want: frozenset[str], scratch: Scratch
) -> dict[str, Tensor]:
    """Statistics of n tokens as if the tile's v columns were the whole vocabulary.

    Args:
        index: column of each label, or any column where the label lies in another tile. Shape `(n,)`.
        want: statistics beside `logp`; those of the reference need it.
    Returns: `mass` (log-sum-exp of the logits), `logp` and, as asked for, `ref_mass`, `ref_logp`, `kl`, `reverse_kl`,
        `entropy`; each `(n,)`. In a tile where every logit is -inf, mass is -inf and the others are NaN.
    """
    shape = policy.product.shape
    z = policy.head.logits(policy.product, policy.bias, scratch("logits", *shape))
    logp = torch.log_softmax(z, -1, out=scratch("logp", *shape))
    out = {"mass": _mass(z, logp, index), "logp": _at(logp, index)}
    ref_logp = None
    if reference is not None:
        r = reference.head.logits(reference.product, reference.bias, scratch("logits", *shape))
        ref_logp = torch.log_softmax(r, -1, out=scratch("ref_logp", *shape))
        out |= {"ref_mass": _mass(r, ref_logp, index), "ref_logp": _at(ref_logp, index)}
    if "entropy" in want:
        p = torch.exp(logp, out=scratch("work", *shape))
        out["entropy"] = -_expectation(p, logp, scratch("term", *shape))
    if ref_logp is not None and want & {"kl", "reverse_kl"}:
        if "reverse_kl" in want:
            p = torch.exp(logp, out=scratch("work", *shape))
            gap = torch.sub(logp, ref_logp, out=logp)
            out["reverse_kl"] = _expectation(p, gap, scratch("term", *shape))
            gap.neg_()
        else:
            gap = torch.sub(ref_logp, logp, out=logp)
        if "kl" in want:
            out["kl"] = _expectation(ref_logp.exp_(), gap, scratch("term", *shape))
    return out


def slope(
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
    """Gradient of sum_n sum_s grads[s][n] * s[n] with respect to `policy.product + policy.bias`, (n, v).

    d logp / dz = onehot - p        d reverse_kl / dz = p (log p - log q - reverse_kl)
    d kl / dz = p - q               d entropy / dz = -p (log p + entropy)

    Args:
        lse, ref_lse: log-sum-exp over the whole vocabulary, `(n,)`.
        index, inside: column of each label and whether the tile holds it, `(n,)`.
        grads: of the statistics that have a gradient, `(n,)` each.
        means: values of `reverse_kl` and `entropy` where they are in `grads`.
    """
    shape = policy.product.shape
    z = policy.head.logits(policy.product, policy.bias, scratch("logits", *shape))
    logp = torch.sub(z, lse[:, None], out=scratch("logp", *shape))
    g_logp, g_kl, g_reverse, g_entropy = (grads.get(name) for name in ("logp", "kl", "reverse_kl", "entropy"))
    grad = torch.exp(logp, out=scratch("grad", *shape))
    per_token = of_p(grads, means, lse)
    ref_logp = None
    if reference is not None and ref_lse is not None:
        r = reference.head.logits(reference.product, reference.bias, scratch("ref_logits", *shape))
        ref_logp = torch.sub(r, ref_lse[:, None], out=scratch("ref_logp", *shape))
    if g_reverse is None and g_entropy is None:
        grad *= per_token[:, None]
    else:
        factor = scratch("work", *shape).copy_(per_token[:, None].expand(shape))
        if g_entropy is not None:
            factor.addcmul_(logp, g_entropy[:, None], value=-1)
        if g_reverse is not None and ref_logp is not None:
            factor.addcmul_(logp.sub_(ref_logp), g_reverse[:, None])
        grad = torch.mul(grad, factor, out=factor).masked_fill_(grad == 0, 0)
    if g_kl is not None and ref_logp is not None:
        grad.addcmul_(ref_logp.exp_(), g_kl[:, None], value=-1)
    if g_logp is not None:
        grad.scatter_add_(1, index[:, None], torch.where(inside, g_logp, 0)[:, None])
    return policy.head.chain_(grad, z, scratch("logp", *shape))


def of_p(grads: Mapping[str, Tensor], means: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """What multiplies p in the gradient and is one number per token, (n,)."""
    total = torch.zeros_like(like)
    if "logp" in grads:
        total -= grads["logp"]
    if "kl" in grads:
        total += grads["kl"]
    for name in ("reverse_kl", "entropy"):
        if name in grads:
            total -= grads[name] * means[name]
    return total


def _mass(z: Tensor, logp: Tensor, index: Tensor) -> Tensor:
    """log-sum-exp of each row, from its log-softmax: any entry gives it that has a probability worth the name."""
    mass = _at(z, index) - _at(logp, index)
    if not bool((_at(logp, index) > -100).all()):  # a smaller one is large beside the mass, and would swallow it
        top = z.amax(-1)
        mass = torch.where(top == float("-inf"), top, top - logp.amax(-1))
    return mass


def _at(logp: Tensor, index: Tensor) -> Tensor:
    return logp.gather(1, index[:, None]).squeeze(1)


def _expectation(weights: Tensor, values: Tensor, scratch: Tensor) -> Tensor:
    """sum_v weights * values, (n,); entries of weight 0 count 0 even where `values` is infinite."""
    total = torch.mul(weights, values, out=scratch).sum(-1)
    if bool(total.isnan().any()):
        total = scratch.masked_fill_(weights == 0, 0).sum(-1)
    return total
