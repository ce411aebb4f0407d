"""PairStats and PairBatch from plain lists of numbers, for tests of one method."""

import torch

from prefopt.types import PairBatch, PairStats


def f64(values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def pair_stats(chosen, rejected, chosen_ref=None, rejected_ref=None, lengths=((4, 2), (3, 5)), **more):
    """Chosen and rejected log-probabilities; a reference of zeros unless given; lengths (chosen, rejected)."""
    zeros = [0.0] * len(chosen)
    return PairStats(
        chosen_logps=f64(chosen, grad=True),
        rejected_logps=f64(rejected, grad=True),
        chosen_ref_logps=f64(zeros if chosen_ref is None else chosen_ref),
        rejected_ref_logps=f64(zeros if rejected_ref is None else rejected_ref),
        chosen_lengths=torch.tensor(lengths[0]),
        rejected_lengths=torch.tensor(lengths[1]),
        **{name: value if isinstance(value, torch.Tensor) else f64(value) for name, value in more.items()},
    )


def batch(pairs, **columns):
    empty = torch.zeros(0, dtype=torch.int64)
    ones = torch.ones(pairs, dtype=torch.int64)
    values = {name: f64(value) for name, value in columns.items()}
    return PairBatch(empty, empty, empty, empty, empty, empty, empty, ones, ones, values, ("",) * pairs)


def means(out):
    return {name: (value.sum() / count.sum()).item() for name, (value, count) in out.metrics.items()}
