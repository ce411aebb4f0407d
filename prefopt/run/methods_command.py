"""The table of `prefopt methods`: each method's data, reference, rate and paper, from its declarations."""

from __future__ import annotations

import re

from prefopt import registry
from prefopt.method import Method
from prefopt.settings.defaults import method_defaults
from prefopt.settings.nested import flatten
from prefopt.types import LABEL

_REFERENCE = {"none": "-", "sequence": "log-probabilities", "token": "distribution"}
_HEAD = ("method", "reference", "further data columns", "optim.lr", "arXiv")


def methods_table() -> str:
    """All methods by kind, one line each."""
    kinds = registry.by_kind()
    rows = {name: _row(name, registry.get(name)) for names in kinds.values() for name in names}
    width = [max(map(len, column)) for column in zip(_HEAD, *rows.values(), strict=True)]

    def line(cells: tuple[str, ...]) -> str:
        return "  ".join(cell.ljust(size) for cell, size in zip(cells, width, strict=True)).rstrip()

    lines = [line(_HEAD)]
    for kind, names in kinds.items():
        lines += ["", f"{kind}: they {registry.KINDS[kind]}", *(line(rows[name]) for name in names)]
    return "\n".join([*lines, "", "--method NAME --help method lists the settings of one."])


def _row(name: str, cls: type[Method]) -> tuple[str, ...]:
    method = cls()
    needs, defaults = method.needs, flatten(method_defaults(cls))
    columns = [column.name for column in needs.columns if column != LABEL]
    columns += [key for column in needs.token_columns for key in column.keys]
    rate = defaults.get("optim.lr")
    paper = re.search(r"arXiv (\d{4}\.\d{5})", method.paper())
    reference = _REFERENCE[needs.reference] + (", mismatched too" if needs.mismatched else "")
    return name, reference, ", ".join(columns), "" if rate is None else f"{rate:g}", paper[1] if paper else ""
