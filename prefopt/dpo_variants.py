"""Losses that read what DPO reads: the log-ratios of the two completions of a pair, and some of them the lengths.

Every function is pure and unreduced: tensors of shape `(pairs,)` in, a loss of shape `(pairs,)` out. `VARIANTS` lists
them for `--method dpo --method.variant NAME`, with the hyper-parameters that each one reads. Symbols in equations:
D_w, D_l are the log-ratios of the chosen and the rejected completion (log policy minus log reference, summed over
completion tokens), h = D_w - D_l, s is the sigmoid, beta the KL-regularisation strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prefopt.batch_losses import (
    RUNNING_DELTA,
    SHIFTED,
    SORTED_MARGINS,
    SORTED_SIDES,
    WholeBatch,
    aot,
    aot_unpaired,
    bco,
    dpo_shift,
)

if TYPE_CHECKING:
    import torch

DpopPenalty = Literal["inside_beta", "outside_beta", "outside_sigmoid"]
ExoTarget = Literal["normalized", "authors"]
Sign = Literal["plus", "minus"]

_HEADROOM = 8.0  # e^8 below the largest number of a dtype: for the products that an exponential goes into


def sigmoid(chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, *, beta: float) -> torch.Tensor:
    """DPO: a logistic loss on the difference of the log-ratios.

    -log s(beta h)

    Args: chosen_logratios, rejected_logratios: shape `(pairs,)`. beta: KL-regularisation strength.
    Reference: Rafailov et al., arXiv 2305.18290, eq. 7.
    """
    return -_logsigmoid(beta * (chosen_logratios - rejected_logratios))


def cdpo(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, *, beta: float, label_smoothing: float
) -> torch.Tensor:
    """Conservative DPO: a label is wrong with probability e = label_smoothing, 0 <= e < 0.5.

    -(1 - e) log s(beta h) - e log s(-beta h)

    Reference: the authors' code of arXiv 2305.18290.
    """
    u = beta * (chosen_logratios - rejected_logratios)
    return -(1 - label_smoothing) * _logsigmoid(u) - label_smoothing * _logsigmoid(-u)


def robust(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, *, beta: float, label_smoothing: float
) -> torch.Tensor:
    """Robust DPO: an unbiased estimate of DPO's loss where labels are flipped with probability e = label_smoothing.

    [-(1 - e) log s(beta h) + e log s(-beta h)] / (1 - 2 e)

    Reference: Chowdhury et al., arXiv 2403.00409.
    """
    u, e = beta * (chosen_logratios - rejected_logratios), label_smoothing
    return (-(1 - e) * _logsigmoid(u) + e * _logsigmoid(-u)) / (1 - 2 * e)


def ipo_sum(chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, *, beta: float) -> torch.Tensor:
    """IPO: the difference of the log-ratios is regressed on 1 / (2 beta).

    (h - 1 / (2 beta))^2

    Reference: Azar et al., arXiv 2310.12036, eq. 17.
    """
    return (chosen_logratios - rejected_logratios - 1 / (2 * beta)) ** 2


def ipo_mean(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    *,
    beta: float,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
) -> torch.Tensor:
    """IPO on log-ratios per completion token, as TRL computes it.

    (D_w / |w| - D_l / |l| - 1 / (2 beta))^2

    Reference: Azar et al., arXiv 2310.12036, eq. 17. Differs from it: means over tokens.
    """
    return ipo_sum(chosen_logratios / chosen_lengths, rejected_logratios / rejected_lengths, beta=beta)


def hinge(chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, *, beta: float) -> torch.Tensor:
    """A hinge loss with margin 1.

    max(0, 1 - beta h)

    Reference: Zhao et al., SLiC-HF, arXiv 2305.10425; Liu et al., RSO, arXiv 2309.06657.
    """
    return (1 - beta * (chosen_logratios - rejected_logratios)).clamp(min=0)


def sigmoid_norm(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    *,
    beta: float,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
) -> torch.Tensor:
    """Length-normalised DPO: log-ratios per completion token.

    -log s(beta (D_w / |w| - D_l / |l|))

    Reference: Lambert et al., Tulu 3, arXiv 2411.15124. Differs from open-instruct's and TRL's code: nothing.
    """
    return sigmoid(chosen_logratios / chosen_lengths, rejected_logratios / rejected_lengths, beta=beta)


def r_dpo(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    *,
    beta: float,
    alpha: float,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    sign: Sign = "plus",
) -> torch.Tensor:
    """Regularised DPO: the length difference of a pair explains a part of the preference.

    -log s(beta h + alpha (|w| - |l|))

    The sign follows from max E[r - alpha |y|] - beta KL, whose optimum has r = beta D + alpha |y| + const: a chosen
    completion that is longer needs less of a log-ratio.

    Args:
        alpha: reward per token, outside of beta.
        sign: `minus` only reproduces public codes that have it (they put it inside beta: pass alpha times beta).
    Reference: Park et al., arXiv 2403.19159, eq. 9.
    """
    gap = (chosen_lengths - rejected_lengths).to(chosen_logratios.dtype)
    u = beta * (chosen_logratios - rejected_logratios)
    return -_logsigmoid(u + alpha * gap if sign == "plus" else u - alpha * gap)


def dpop(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    *,
    beta: float,
    penalty_weight: float,
    penalty: DpopPenalty = "inside_beta",
) -> torch.Tensor:
    """DPO-Positive: a penalty where the policy has made the chosen completion less likely than the reference does.

    -log s(beta (h - lambda max(0, -D_w)))

    Args:
        penalty_weight: lambda.
        penalty: `inside_beta` is the corrected paper's; `outside_beta` is -log s(beta h - lambda max(0, -D_w)),
            `outside_sigmoid` is -log s(beta h) + lambda max(0, -D_w).
    Reference: Pal et al., Smaug, arXiv 2402.13228, eq. 3, with the authors' correction of July 2024. There is no code
        of the authors. At D_w = 0 the penalty has gradient 0.
    """
    from torch.nn.functional import relu

    h = chosen_logratios - rejected_logratios
    drop = penalty_weight * relu(-chosen_logratios)
    if penalty == "inside_beta":
        return -_logsigmoid(beta * (h - drop))
    if penalty == "outside_beta":
        return -_logsigmoid(beta * h - drop)
    return -_logsigmoid(beta * h) + drop


def apo_zero(chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Anchored preference optimization, zero: chosen completions become likelier, rejected ones less likely.

    1 - s(beta D_w) + s(beta D_l)

    Reference: D'Oosterlinck et al., arXiv 2408.06266, eq. 7. For models that are worse than the chosen completions.
    """
    return (-beta * chosen_logratios).sigmoid() + (beta * rejected_logratios).sigmoid()


def apo_down(chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Anchored preference optimization, down: both completions become less likely, the rejected one more so.

    s(beta D_w) + 1 - s(beta h)

    Reference: D'Oosterlinck et al., arXiv 2408.06266, eq. 8. For models that are better than the chosen completions.
    """
    return (beta * chosen_logratios).sigmoid() + (-beta * (chosen_logratios - rejected_logratios)).sigmoid()


def exo(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    *,
    beta: float,
    eps: float,
    target: ExoTarget = "normalized",
) -> torch.Tensor:
    """Exact optimization: the reverse KL from the policy's preference probability to a smoothed label.

    q (log q - log p_w) + (1 - q) (log(1 - q) - log p_l),  q = s(beta h),  (p_w, p_l) = (1 - eps, eps)

    Args:
        eps: probability of the rejected completion in the label, 0 < eps < 0.5.
        target: `authors`: log p_w = 0 and log p_l = -10, an unnormalised label, whatever eps is.
    Reference: Ji et al., arXiv 2402.00856, eq. 16. TRL's `exo_pair` is this with eps = label_smoothing.
    """
    u = beta * (chosen_logratios - rejected_logratios)
    log_w, log_l = (0.0, -10.0) if target == "authors" else (math.log1p(-eps), math.log(eps))
    q, log_q, log_not_q = u.sigmoid(), _logsigmoid(u), _logsigmoid(-u)
    return q * (log_q - log_w) + (-u).sigmoid() * (log_not_q - log_l)


def nca(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, *, beta: float, biased: bool = False
) -> torch.Tensor:
    """Noise-contrastive alignment of a pair: rewards are pushed up or down each by itself.

    -log s(u_w) - 1/2 log s(-u_w) - 1/2 log s(-u_l),  u = beta D

    Args: biased: the form without the middle term and with weight 1 on the last, which is BCO without a shift.
    Reference: Chen et al., arXiv 2402.05369. Differs from the authors' code: nothing.
    """
    chosen, rejected = beta * chosen_logratios, beta * rejected_logratios
    if biased:
        return -_logsigmoid(chosen) - _logsigmoid(-rejected)
    return -_logsigmoid(chosen) - (_logsigmoid(-chosen) + _logsigmoid(-rejected)) / 2


def discopop(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, *, beta: float, tau: float
) -> torch.Tensor:
    """DiscoPOP: a mixture of the logistic and the exponential loss that the log-ratio itself gates.

    (1 - m) (-log s(u)) + m e^(-u),  u = beta h,  m = s(u / tau)

    The second term is exp(-u + log m), which stays finite where e^(-u) alone overflows.

    Args: tau: temperature of the gate.
    Reference: Lu et al., arXiv 2406.08414, eq. 5. Differs from the authors' code: finite below u = -88 in float32.
    """
    u = beta * (chosen_logratios - rejected_logratios)
    return -(-u / tau).sigmoid() * _logsigmoid(u) + (_logsigmoid(u / tau) - u).exp()


def f_forward_kl(chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, *, beta: float) -> torch.Tensor:
    """f-DPO with the forward KL.

    -log s(beta (e^(-D_l) - e^(-D_w)))

    Exponents beyond the dtype's range are capped, and the pairs concerned have the right sign and no gradient.

    Reference: Wang et al., arXiv 2309.16240. Differs from the authors' code: theirs overflows below D = -88.
    """
    return -_logsigmoid(beta * _difference_of_exponentials(-rejected_logratios, -chosen_logratios))


def f_js(chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, *, beta: float) -> torch.Tensor:
    """f-DPO with the Jensen-Shannon divergence.

    -log s(beta (log s(D_w) - log s(D_l)))

    Reference: Wang et al., arXiv 2309.16240; -softplus(-D) = log s(D). Differs from the authors' code: nothing.
    """
    return -_logsigmoid(beta * (_logsigmoid(chosen_logratios) - _logsigmoid(rejected_logratios)))


def f_alpha(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, *, beta: float, alpha: float
) -> torch.Tensor:
    """f-DPO with an alpha-divergence.

    -log s(beta (e^(-alpha D_l) - e^(-alpha D_w)) / alpha)

    Args: alpha: 0 < alpha < 1; towards 0 the loss is DPO's, at 1 it would be f_forward_kl.
    Reference: Wang et al., arXiv 2309.16240. TRL's f_alpha_divergence_coef is 1 - alpha.
    """
    gap = _difference_of_exponentials(-alpha * rejected_logratios, -alpha * chosen_logratios)
    return -_logsigmoid(beta / alpha * gap)


def chi_po(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    *,
    beta: float,
    r_max: float | None = None,
    exponent: float = 1.0,
    log_weight: float = 1.0,
    exponent_low: float = -88.0,
    exponent_high: float = 20.0,
) -> torch.Tensor:
    """chi-squared preference optimization: the link of DPO plus that of the chi-squared divergence.

    -log s(clip(beta (phi(D_w) - phi(D_l)), -2 R, 2 R)),  phi(D) = exp(clip(a D, low, high)) + g D

    Args:
        r_max: R, the range of rewards; None: no clip. Pairs beyond it have no gradient.
        exponent, log_weight: a and g; 1 and 1 in the theory.
        exponent_low, exponent_high: bounds of the inner clip; whole-sequence ratios overflow without it.
    Reference: Huang et al., arXiv 2407.13399, algorithm 1. There is no code of the authors.
    """

    def link(logratios: torch.Tensor) -> torch.Tensor:
        return (exponent * logratios).clamp(exponent_low, exponent_high).exp() + log_weight * logratios

    u = beta * (link(chosen_logratios) - link(rejected_logratios))
    return -_logsigmoid(u if r_max is None else u.clamp(-2 * r_max, 2 * r_max))


def cal_dpo(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, *, beta: float, calibration_weight: float
) -> torch.Tensor:
    """Calibrated DPO: the log-ratios are also regressed on +1 / (2 beta) and -1 / (2 beta).

    -log s(h) + c [(D_w - 1 / (2 beta))^2 + (D_l + 1 / (2 beta))^2]

    Args: calibration_weight: c. There is no beta in the logistic term, as in the authors' code.
    Reference: Xiao et al., Cal-DPO, NeurIPS 2024. Differs from the authors' code: theirs puts the batch's means of the
        squares into every pair, which has the same mean.
    """
    target = 1 / (2 * beta)
    squares = (chosen_logratios - target) ** 2 + (rejected_logratios + target) ** 2
    return -_logsigmoid(chosen_logratios - rejected_logratios) + calibration_weight * squares


def _logsigmoid(u: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(u)


def _difference_of_exponentials(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """e^a - e^b, of the right sign and finite where the larger exponent is beyond the dtype's range, without gradient
    there. Shape of `a`."""
    import torch

    top = torch.maximum(a, b).detach()
    most = math.log(torch.finfo(a.dtype).max) - _HEADROOM
    gap = top.clamp(max=most).exp() * ((a - top).exp() - (b - top).exp())
    return torch.where(top > most, gap.detach(), gap)


@dataclass(frozen=True)
class Variant:
    """A loss of two log-ratios as `dpo` offers it.

    Args:
        loss: the function.
        beta: default of `method.beta`, and `source`, where it comes from.
        options: hyper-parameters that only this loss reads, with their defaults.
        lengths: whether it reads the completions' lengths.
        whole: how it reads the global batch or the step; None: it does not.
        at_reference: the loss of a pair while policy and reference are equal, from beta and the options; None: it
            depends on the pair.
    """

    loss: Callable[..., torch.Tensor]
    beta: float = 0.1
    source: str = "arXiv 2305.18290"
    options: Mapping[str, Any] = field(default_factory=dict)
    lengths: bool = False
    whole: WholeBatch | None = None
    at_reference: Callable[..., float | None] = lambda beta, **_: math.log(2)


def _exo_at_reference(beta: float, eps: float, target: str) -> float:
    log_w, log_l = (0.0, -10.0) if target == "authors" else (math.log1p(-eps), math.log(eps))
    return -math.log(2) - (log_w + log_l) / 2


VARIANTS: dict[str, Variant] = {
    "sigmoid": Variant(sigmoid),
    "cdpo": Variant(cdpo, options={"label_smoothing": None}),
    "robust": Variant(robust, options={"label_smoothing": None}),
    "ipo_sum": Variant(ipo_sum, at_reference=lambda beta: 1 / (2 * beta) ** 2),
    "ipo_mean": Variant(ipo_mean, lengths=True, at_reference=lambda beta: 1 / (2 * beta) ** 2),
    "hinge": Variant(hinge, at_reference=lambda beta: 1.0),
    "sigmoid_norm": Variant(sigmoid_norm, 5.0, "open-instruct's default, arXiv 2411.15124", lengths=True),
    "r_dpo": Variant(r_dpo, options={"alpha": 0.05, "sign": "plus"}, lengths=True, at_reference=lambda **_: None),
    "dpop": Variant(dpop, 0.3, "arXiv 2402.13228", {"penalty_weight": 50.0, "penalty": "inside_beta"}),
    "apo_zero": Variant(apo_zero, source="arXiv 2408.06266", at_reference=lambda beta: 1.0),
    "apo_down": Variant(apo_down, source="arXiv 2408.06266", at_reference=lambda beta: 1.0),
    "exo": Variant(
        exo,
        0.5,
        "the authors' configs for HH and TL;DR",
        {"eps": 1e-3, "target": "normalized"},
        at_reference=_exo_at_reference,
    ),
    "nca": Variant(
        nca, 0.01, "the authors' configs", {"biased": False}, at_reference=lambda beta, biased: 2 * math.log(2)
    ),
    "bco": Variant(
        bco,
        0.01,
        "arXiv 2404.04656",
        {"delta": "running"},
        whole=RUNNING_DELTA,
        at_reference=lambda beta, delta: 2 * math.log(2),
    ),
    "aot": Variant(aot, 0.01, "arXiv 2406.05882", {"label_smoothing": 0.0}, whole=SORTED_MARGINS),
    "aot_unpaired": Variant(aot_unpaired, 0.01, "arXiv 2406.05882", {"label_smoothing": 0.0}, whole=SORTED_SIDES),
    "discopop": Variant(
        discopop,
        0.05,
        "arXiv 2406.08414",
        {"tau": 0.05},
        at_reference=lambda beta, tau: math.log(2) / 2 + 0.5,
    ),
    "f_forward_kl": Variant(f_forward_kl, source="the authors' config"),
    "f_js": Variant(f_js, source="the authors' config"),
    "f_alpha": Variant(f_alpha, source="the authors' config", options={"alpha": 0.5}),
    "chi_po": Variant(chi_po, options={"r_max": None, "exponent": 1.0, "log_weight": 1.0}),
    "dpo_shift": Variant(
        dpo_shift,
        0.01,
        "the authors' configs",
        {"factor": 0.95, "shift": "fixed", "low": 0.5, "high": 1.0},
        whole=SHIFTED,
    ),
    "cal_dpo": Variant(
        cal_dpo,
        2e-3,
        "the authors' script",
        {"calibration_weight": 0.5},
        at_reference=lambda beta, calibration_weight: math.log(2) + 2 * calibration_weight / (2 * beta) ** 2,
    ),
}
