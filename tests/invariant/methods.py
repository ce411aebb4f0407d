"""Every method of the registry in every setting of its switches, found without naming one."""

import dataclasses
import itertools
import typing

from prefopt import registry
from prefopt.errors import ConfigError

_MOST_CHOICES = 6  # of one field, in tests that take seconds for each method
_NUMBERS = (0.1, 0.3, 1.0)  # tried where a setting asks for another one to be given with it


def methods(whole=False):
    """`{readable name: method}`: defaults, each choice of a Literal field, each bool field turned round.

    With them one from a user's file, whose terms are counted in every way there is. Of a field with many choices, such
    as the variants of a loss that differ in a formula of the same numbers, the first ones; `whole`: all.
    """
    found = {}
    for name in [*registry.names(), "tests.invariant.two_terms"]:
        cls = registry.get(name)
        hints = typing.get_type_hints(cls)
        for switch in _switches(cls, hints, None if whole else _MOST_CHOICES):
            method = _build(cls, hints, switch)
            if method not in found.values():
                found["-".join([name, *map(str, itertools.chain(*switch.items()))])] = method
    return found


def _switches(cls, hints, most):
    yield {}
    for field in dataclasses.fields(cls):
        if typing.get_origin(hints[field.name]) is typing.Literal:
            yield from ({field.name: choice} for choice in typing.get_args(hints[field.name])[:most])
        elif hints[field.name] is bool:
            yield {field.name: not field.default}


def _build(cls, hints, switch):
    others = [name for name, hint in hints.items() if hint is float and name not in switch]
    tries = [switch, *({**switch, name: number} for name in others for number in _NUMBERS)]
    for settings in tries:
        try:
            return cls(**settings)
        except ConfigError as error:
            refusal = error
    raise AssertionError(f"no setting found with which {cls.__name__} takes {switch}: {refusal}")
