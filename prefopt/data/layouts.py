"""Where tokens stand: a layout is a function that gives each token of each sequence its cell in an (R, T) grid.

All else follows: a token is scored from the hidden state in the cell of the token before it. The two sides of a pair
may share the cells of their prompt, and a row may hold several sequences. What a cell may attend to is said by units,
the groups of cells that see nothing of each other: a trunk, and up to two branches behind it that each see the trunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PADDED, PACKED, SHARED, PACKED_SHARED = "padded", "packed", "prefix_shared", "packed_prefix_shared"
LAYOUTS = (PADDED, PACKED, SHARED, PACKED_SHARED)  # from the simplest on


@dataclass(frozen=True, eq=False)
class Grid:
    """Cells of the tokens of all sequences, which stand in one line: prompt, completion, prompt, completion, ...

    Args:
        cell: (tokens,) int64 into R * T; the tokens of a shared prompt name the same cells twice.
        position: (tokens,) int64, how many tokens of its own sequence stand before it.
        rows, width: R and T.
        units: (U, 4) int64: first cell, then how many tokens its trunk and its two branches have, which follow each
            other in the row; None in the padded layout, where each row is one sequence.
    """

    cell: np.ndarray
    position: np.ndarray
    rows: int
    width: int
    units: np.ndarray | None


def shares_prompts(layout: str) -> bool:
    """Whether the two sides of a pair share the cells of their prompt."""
    return layout in (SHARED, PACKED_SHARED)


def packs(layout: str) -> bool:
    """Whether a row may hold several units."""
    return layout in (PACKED, PACKED_SHARED)


def units_of(parts: np.ndarray, layout: str) -> np.ndarray:
    """Trunk and branches, (U, 3) int64: a unit per pair where prompts are shared, else one per sequence.

    Args:
        parts: (S, 2) tokens of prompt and completion of each sequence; all chosen ones, then all rejected ones where
            prompts are shared.
    """
    if shares_prompts(layout):
        chosen, rejected = np.split(parts, 2)
        return np.column_stack((chosen, rejected[:, 1]))
    whole = np.zeros((len(parts), 3), np.int64)
    whole[:, 0] = parts.sum(1)
    return whole


def rows_of(lengths: np.ndarray, layout: str, one_row: bool = False) -> list[list[int]]:
    """Which units stand in which row.

    Packing takes the longest unit first and the first row that has room for it; a row holds as many tokens as the
    longest unit.

    Args:
        lengths: (U,) tokens of each unit.
        one_row: whether packing makes one row that holds them all, in their order.
    """
    if not packs(layout):
        return [[unit] for unit in range(len(lengths))]
    if one_row:
        return [list(range(len(lengths)))]
    rows: list[list[int]] = []
    room: list[int] = []
    for unit in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[unit])
        row = next((i for i, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(int(lengths.max()))
        rows[row].append(unit)
        room[row] -= length
    return rows


def width_of(lengths: np.ndarray, rows: list[list[int]], multiple_of: int = 1, extra: int = 0) -> int:
    """T: cells of the longest row, some more, and rounded up; at least 1."""
    longest = max((int(lengths[row].sum()) for row in rows), default=0) + extra
    return -(-max(longest, 1) // multiple_of) * multiple_of


def grid(
    parts: np.ndarray, layout: str, *, one_row: bool = False, pad_to_multiple_of: int = 1, extra_padding: int = 0
) -> Grid:
    """The cells of these sequences in a layout.

    Args:
        parts: (S, 2) as in `units_of`, at least one sequence unless the layout is padded.
        one_row: whether packing makes one long row rather than rows as long as the longest unit.
        pad_to_multiple_of: T is rounded up to a multiple of this.
        extra_padding: columns of padding to add.
    """
    lengths, units = parts.sum(1), units_of(parts, layout)
    rows = rows_of(units.sum(1), layout, one_row)
    width = width_of(units.sum(1), rows, pad_to_multiple_of, extra_padding)
    first = np.zeros(len(units), np.int64)
    for index, row in enumerate(rows):
        sizes = units[row].sum(1)
        first[row] = index * width + np.cumsum(sizes) - sizes

    position = np.arange(int(lengths.sum())) - (np.cumsum(lengths) - lengths).repeat(lengths)
    if shares_prompts(layout):
        # a rejected completion stands behind the chosen one, whose tokens are none of its own
        prompts, skipped = parts[:, 0], np.concatenate((np.zeros(len(units), np.int64), units[:, 1]))
        skip = np.where(position < prompts.repeat(lengths), 0, skipped.repeat(lengths))
        cell = np.tile(first, 2).repeat(lengths) + position + skip
    else:
        cell = first.repeat(lengths) + position
    placed = None if layout == PADDED else np.column_stack((first, units))
    return Grid(cell, position, max(len(rows), 1), width, placed)


def block_and_branch(units: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """(block, branch), each (cells,) int64: the unit of each cell, and 0 in its trunk, 1 and 2 in its branches.

    Cell i sees cell j of the same row iff j is not behind i, both have the same block, and j is of the trunk or of i's
    branch. A cell of padding is a block of its own, numbered from -1 down.
    """
    block, branch = -1 - np.arange(cells), np.zeros(cells, np.int64)
    lengths = units[:, 1:].sum(1)
    inside = np.arange(int(lengths.sum())) - (np.cumsum(lengths) - lengths).repeat(lengths)
    cell = units[:, 0].repeat(lengths) + inside
    block[cell] = np.arange(len(units)).repeat(lengths)
    branch[cell] = np.tile([0, 1, 2], len(units)).repeat(units[:, 1:].reshape(-1))
    return block, branch


def cells_of(units: np.ndarray, sequence: int, sequences: int) -> np.ndarray:
    """The cells of a sequence's tokens in their order, (tokens,) int64.

    Args: sequences: S; with as many units each one is a sequence, with half as many each one is a pair.
    """
    first, trunk, one, other = units[sequence % len(units)].tolist()
    if sequence < len(units) or len(units) == sequences:
        return first + np.arange(trunk + one)
    return first + np.concatenate((np.arange(trunk), trunk + one + np.arange(other)))
