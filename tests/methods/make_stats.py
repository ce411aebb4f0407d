"""PairStats and PairBatch from plain lists of numbers, for tests of one method."""

from dataclasses import fields

import torch

from prefopt.training.forward import SUMS
from prefopt.types import PairBatch, PairStats, TokenStats, TokenView


def f64(values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def pair_stats(chosen, rejected, chosen_ref=None, rejected_ref=None, lengths=((4, 2), (3, 5)), **more):
    """Chosen and rejected log-probabilities; a reference of zeros unless given; lengths (chosen, rejected)."""
    zeros = [0.0] * len(chosen)
    members = {
        "chosen_logps": f64(chosen, grad=True),
        "rejected_logps": f64(rejected, grad=True),
        "chosen_ref_logps": f64(zeros if chosen_ref is None else chosen_ref),
        "rejected_ref_logps": f64(zeros if rejected_ref is None else rejected_ref),
        "chosen_lengths": torch.tensor(lengths[0]),
        "rejected_lengths": torch.tensor(lengths[1]),
    } | {name: value if isinstance(value, torch.Tensor) else f64(value) for name, value in more.items()}
    return PairStats(**members, token_view=even_tokens(members))


def even_tokens(members):
    """The view of tokens that share the sums of their sequence equally. Args: members: of PairStats."""
    sides = [side for side in ("chosen", "rejected") if members.get(f"{side}_lengths") is not None]
    lengths = torch.cat([members[f"{side}_lengths"] for side in sides]).long()
    index = torch.arange(len(lengths)).repeat_interleave(lengths)
    values = {}
    for field in fields(TokenStats):
        sums = [members.get(f"{side}_{SUMS.get(field.name, field.name)}") for side in sides]
        if all(one is not None for one in sums):
            values[field.name] = (torch.cat(sums) / lengths)[index]
    return TokenView(TokenStats(**values), index, lengths, len(members["chosen_lengths"]))


def batch(pairs, **columns):
    empty = torch.zeros(0, dtype=torch.int64)
    ones = torch.ones(pairs, dtype=torch.int64)
    values = {name: f64(value) for name, value in columns.items()}
    return PairBatch(empty, empty, empty, empty, empty, empty, empty, ones, ones, values, ("",) * pairs)


def means(out):
    return {name: (value.sum() / count.sum()).item() for name, (value, count) in out.metrics.items()}
