"""Single completions with a label, for methods that read no pairs: columns `prompt`, `completion` and `label`.

The label is true where the completion is desirable, as in TRL. A pair is read as two such examples, the chosen
completion with true and the rejected one with false.
"""

from __future__ import annotations

from dataclasses import replace

from prefopt.data.bad_rows import RowProblem, kind
from prefopt.types import LABEL, PairRow

_LABELS = {True: 1.0, False: 0.0, "true": 1.0, "false": 0.0, "True": 1.0, "False": 0.0, "1": 1.0, "0": 0.0}


def label_of(value: object, key: str) -> float:
    """1.0 for a desirable completion and 0.0 for another one. Args: value: of the key `key` of an example.

    Raises: RowProblem.
    """
    if isinstance(value, bool | int | float | str) and value in _LABELS:
        return _LABELS[value]
    found = f"found {value}" if isinstance(value, int | float) else f"found {kind(value)}"
    raise RowProblem("bad label", key, found, "true for a desirable completion, or false")


def as_two(row: PairRow) -> list[PairRow]:
    """A pair as two examples, the chosen completion first."""
    ids = row.ids
    chosen = replace(row, rejected=None, columns={**row.columns, LABEL.name: 1.0}, ids=ids and ids[:2])
    rejected = replace(
        row,
        chosen=row.rejected,
        rejected=None,
        columns={**row.columns, LABEL.name: 0.0},
        ids=ids and (ids[0], ids[2]),
    )
    return [chosen, rejected]
