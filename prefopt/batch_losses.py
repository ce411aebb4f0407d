"""Losses of the pairs of a global batch together, or of the step: bco, aot, aot_unpaired and dpo_shift.

The functions are pure and take a whole batch. A `WholeBatch` is the same loss cut into micro-batches: it names what is
collected over the global batch before the loss, and computes the part of one micro-batch from it. Symbols as in
`dpo_variants`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prefopt.types import LossState, PairStats

if TYPE_CHECKING:
    import torch

Delta = Literal["running", "none"]
Shift = Literal["fixed", "increase", "decrease"]


def bco(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    *,
    beta: float,
    shift: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """Binary classifier optimization: each completion is classified as chosen or rejected by its shifted reward.

    -log s(beta D_w - delta) - log s(-(beta D_l - delta))

    Args: shift: delta, a mean of rewards without gradient; 0: none.
    Reference: Jung et al., arXiv 2404.04656.
    """
    from torch.nn.functional import logsigmoid

    return -logsigmoid(beta * chosen_logratios - shift) - logsigmoid(shift - beta * rejected_logratios)


def aot(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    chosen_ref_logps: torch.Tensor,
    rejected_ref_logps: torch.Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Alignment by optimal transport: the policy's margins of a batch dominate the reference's, in sorted order.

    -(1 - e) log s(beta d_k) - e log s(-beta d_k),  d = sort(log pi_w - log pi_l) - sort(log ref_w - log ref_l)

    Returns: the loss of each rank k, smallest margin first. Shape `(pairs,)`. It depends on the batch as a whole.
    Reference: Melnyk et al., arXiv 2406.05882. Differs from TRL's `aot`: nothing.
    """
    policy, reference = chosen_logps - rejected_logps, chosen_ref_logps - rejected_ref_logps
    return _smoothed(policy.sort().values - reference.sort().values, beta, label_smoothing)


def aot_unpaired(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, *, beta: float, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Alignment by optimal transport of two bags: sorted rewards of the chosen against sorted ones of the rejected.

    -(1 - e) log s(beta d_k) - e log s(-beta d_k),  d = sort(D_w) - sort(D_l)

    Returns: the loss of each rank k. Shape `(pairs,)`. It depends on the batch as a whole.
    Reference: Melnyk et al., arXiv 2406.05882. Differs from TRL's `aot_unpaired`: nothing.
    """
    return _smoothed(chosen_logratios.sort().values - rejected_logratios.sort().values, beta, label_smoothing)


def dpo_shift(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, *, beta: float, factor: float
) -> torch.Tensor:
    """DPO-Shift: the rejected log-ratio counts less, so that chosen completions lose less probability.

    -log s(beta (D_w - f D_l))

    Args: factor: f, at 1 this is DPO.
    Reference: Yang et al., arXiv 2502.07599. Differs from the authors' code: nothing.
    """
    from torch.nn.functional import logsigmoid

    return -logsigmoid(beta * (chosen_logratios - factor * rejected_logratios))


def running_mean(state: Mapping[str, float], name: str, observed: float) -> dict[str, float]:
    """The state after one more observation of a mean. Args: state: has `name` and `name_count`."""
    count = state[f"{name}_count"] + 1
    return {**state, name: state[name] + (observed - state[name]) / count, f"{name}_count": count}


@dataclass(frozen=True)
class WholeBatch:
    """How a loss reads the global batch.

    Args:
        loss: of a micro-batch, from its statistics, the LossState, and `beta` and the variant's options by name. It
            returns the unreduced loss `(pairs,)`; its sum over the micro-batches of a step is that of the whole batch.
        values: name -> a function of statistics and beta that gives a number per pair, `(pairs,)`.
        state: numbers that are kept from step to step, with their initial values.
        update: the state after a global batch, from the state before and its values.
        step: whether the loss depends on the step.
        unused: whether options switch it off, so that nothing is collected.
    """

    loss: Callable[..., torch.Tensor]
    values: Mapping[str, Callable[[PairStats, float], torch.Tensor]] = field(default_factory=dict)
    state: Mapping[str, float] = field(default_factory=dict)
    update: Callable[[Mapping[str, float], Mapping[str, torch.Tensor]], Mapping[str, float]] = lambda state, _: state
    step: bool = False
    unused: Callable[[Mapping[str, Any]], bool] = lambda _: False


def _bco(stats: PairStats, state: LossState, *, beta: float, delta: Delta) -> torch.Tensor:
    shift = state.state["delta"] if delta == "running" else 0.0
    return bco(stats.chosen_logratios, stats.rejected_logratios, beta=beta, shift=shift)


def _aot(stats: PairStats, state: LossState, *, beta: float, label_smoothing: float) -> torch.Tensor:
    margins = _policy_margins(stats, beta)
    policy, reference = state.batch_values["policy_margins"], state.batch_values["reference_margins"]
    partners = _of_ranks(reference, policy, state.offset, margins)
    return _smoothed(margins - partners, beta, label_smoothing)


def _aot_unpaired(stats: PairStats, state: LossState, *, beta: float, label_smoothing: float) -> torch.Tensor:
    # A rank's loss has two members, which may lie in two micro-batches. Each pair gives the loss of its chosen
    # completion's rank, and of its rejected completion's rank the gradient alone.
    chosen, rejected = stats.chosen_logratios, stats.rejected_logratios
    all_chosen, all_rejected = state.batch_values["chosen_logratios"], state.batch_values["rejected_logratios"]
    partner_of_chosen = _of_ranks(all_rejected, all_chosen, state.offset, chosen)
    partner_of_rejected = _of_ranks(all_chosen, all_rejected, state.offset, rejected)
    losses = _smoothed(chosen - partner_of_chosen, beta, label_smoothing)
    others = _smoothed(partner_of_rejected - rejected, beta, label_smoothing)
    return losses + (others - others.detach())


def _shifted(
    stats: PairStats, state: LossState, *, beta: float, factor: float, shift: Shift, low: float, high: float
) -> torch.Tensor:
    moved = (high - low) * state.progress
    factor = {"fixed": factor, "increase": low + moved, "decrease": high - moved}[shift]
    return dpo_shift(stats.chosen_logratios, stats.rejected_logratios, beta=beta, factor=factor)


def _of_ranks(values: torch.Tensor, order: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    """For each pair of a micro-batch the entry of `values` whose rank among them is the pair's rank in `order`.

    Args: values, order: of the global batch, `(G,)`. offset: index of the first pair. like: `(pairs,)`.
    """
    rank = order.argsort(stable=True).argsort()[offset : offset + len(like)]
    return values.sort().values[rank].to(like)


def _smoothed(gap: torch.Tensor, beta: float, label_smoothing: float) -> torch.Tensor:
    from torch.nn.functional import logsigmoid

    u = beta * gap
    return -(1 - label_smoothing) * logsigmoid(u) - label_smoothing * logsigmoid(-u)


def _policy_margins(stats: PairStats, beta: float) -> torch.Tensor:
    assert stats.chosen_logps is not None
    assert stats.rejected_logps is not None
    return stats.chosen_logps - stats.rejected_logps


def _reference_margins(stats: PairStats, beta: float) -> torch.Tensor:
    assert stats.chosen_ref_logps is not None
    assert stats.rejected_ref_logps is not None
    return stats.chosen_ref_logps - stats.rejected_ref_logps


RUNNING_DELTA = WholeBatch(
    _bco,
    # the mean over a batch of both sides' rewards
    {"rewards": lambda stats, beta: beta / 2 * (stats.chosen_logratios + stats.rejected_logratios)},
    {"delta": 0.0, "delta_count": 0.0},
    lambda state, values: running_mean(state, "delta", float(values["rewards"].mean())),
    unused=lambda options: options["delta"] == "none",
)
SORTED_MARGINS = WholeBatch(_aot, {"policy_margins": _policy_margins, "reference_margins": _reference_margins})
SORTED_SIDES = WholeBatch(
    _aot_unpaired,
    {
        "chosen_logratios": lambda stats, beta: stats.chosen_logratios,
        "rejected_logratios": lambda stats, beta: stats.rejected_logratios,
    },
)
SHIFTED = WholeBatch(_shifted, step=True, unused=lambda options: options["shift"] == "fixed")
