"""Every method of the registry in every setting of its switches, found without naming one."""

import dataclasses
import itertools
import typing
from types import SimpleNamespace

import pytest
import torch

from prefopt import registry
from prefopt.errors import ConfigError
from prefopt.training.normalizers import _placeholder

_NUMBERS = (0.1, 0.3, 1.0)  # tried where a setting asks for another one to be given with it


def methods(whole=False):
    """`{readable name: method}`: defaults, each choice of a Literal field, each bool field turned round.

    With them one from a user's file, whose terms are counted in every way there is. Of the settings of a method that
    differ in a formula of the same numbers alone, and so need the same, the first; `whole`: all.
    """
    found = {}
    for name in [*registry.names(), "tests.invariant.two_terms"]:
        cls = registry.get(name)
        hints = typing.get_type_hints(cls)
        seen = []
        for switch in _switches(cls, hints):
            method = _build(cls, hints, switch)
            if method.depends_on_cut:
                continue
            kind = method if whole else (method.needs, _terms(method))
            if kind not in seen:
                seen.append(kind)
                found["-".join([name, *map(str, itertools.chain(*switch.items()))])] = method
    return found


def representatives(of):
    """The first method of each kind of forward pass: those of one kind differ in what they do with its statistics.

    Args: of: what `methods` returns.
    """
    found = {}
    for name, method in of.items():
        needs = method.needs
        kind = needs.reference, needs.output, needs.rows, needs.sequences, needs.mismatched, needs.statistics
        found.setdefault(kind, name)
    return set(found.values())


def by_kind(of, *ways):
    """Parameters of a test: each method, or each with each way; `make test-all` alone runs those beyond the first of
    its kind of forward pass. Args: of: what `methods` returns. ways: lists of further values.
    """
    kinds = representatives(of)
    return [
        pytest.param(*values, marks=() if values[0] in kinds else pytest.mark.slow)
        for values in itertools.product(of, *ways)
    ]


def counted_in_every_way(of):
    """The first method of each list of terms and normalizers. Args: of: what `methods` returns."""
    found = {}
    for name, method in of.items():
        found.setdefault(str([counts for _, counts in _terms(method)]), name)
    return set(found.values())


def _switches(cls, hints):
    yield {}
    for field in dataclasses.fields(cls):
        if typing.get_origin(hints[field.name]) is typing.Literal:
            yield from ({field.name: choice} for choice in typing.get_args(hints[field.name]))
        elif hints[field.name] is bool:
            yield {field.name: not field.default}


def _terms(method):
    """The names and normalizers of a method's terms on a batch of two pairs of different lengths."""
    lengths = torch.tensor([2, 3])
    columns = {column.name: torch.tensor([0.5, 0.25]).double() for column in method.needs.columns}
    paired = lengths + 2 if method.needs.rows == "pairs" else None
    per_token = {column.name: torch.zeros(4).double() for column in method.needs.token_columns}
    batch = SimpleNamespace(
        pairs=2, columns=columns, token_columns=per_token, chosen_lengths=lengths, rejected_lengths=paired
    )
    stats = _placeholder(batch, method.needs)
    output = method.loss_of(stats, batch, method.first_state(stats, batch))
    return [(term.name, term.count.tolist()) for term in output.terms]


def _build(cls, hints, switch):
    others = [name for name, hint in hints.items() if hint is float and name not in switch]
    tries = [switch, *({**switch, name: number} for name in others for number in _NUMBERS)]
    for settings in tries:
        try:
            return cls(**settings)
        except ConfigError as error:
            refusal = error
    raise AssertionError(f"no setting found with which {cls.__name__} takes {switch}: {refusal}")
