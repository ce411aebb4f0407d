"""Layouts of a batch: a layout assigns each token of each sequence a position in an (R, T) grid.

The log-probability of a token is computed from the hidden state at the position of the token before it. The two
completions of a pair may share the positions of their prompt, and a row may hold several sequences. Attention is
described by packed segments, groups of consecutive positions that do not attend to each other: a trunk, and up to two
branches after it, each of which attends to the trunk and to itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PADDED, PACKED, SHARED, PACKED_SHARED = "padded", "packed", "prefix_shared", "packed_prefix_shared"
LAYOUTS = (PADDED, PACKED, SHARED, PACKED_SHARED)  # the simplest first


@dataclass(frozen=True, eq=False)
class Grid:
    """Positions of the tokens of all sequences, concatenated: prompt, completion, prompt, completion, ...

    Args:
        index: (tokens,) int64 flat index into R * T; tokens of a shared prompt have the same index in both sequences.
        position_ids: (tokens,) int64, number of tokens before it in its own sequence.
        rows, width: R and T.
        segments: (U, 4) int64: flat index of the first position, then the lengths of the trunk and of the two branches,
            which follow each other in the row; None in the padded layout, where each row is one sequence.
    """

    index: np.ndarray
    position_ids: np.ndarray
    rows: int
    width: int
    segments: np.ndarray | None


def shares_prompts(layout: str) -> bool:
    """Whether the two completions of a pair share the positions of their prompt."""
    return layout in (SHARED, PACKED_SHARED)


def packs(layout: str) -> bool:
    """Whether a row may hold several segments."""
    return layout in (PACKED, PACKED_SHARED)


def segments_of(parts: np.ndarray, layout: str) -> np.ndarray:
    """Lengths of trunk and branches, (U, 3) int64: a segment per pair where prompts are shared, else one per sequence.

    Args:
        parts: (S, 2) lengths of prompt and completion of each sequence; where prompts are shared, all chosen ones come
            before all rejected ones.
    """
    if shares_prompts(layout):
        chosen, rejected = np.split(parts, 2)
        return np.column_stack((chosen, rejected[:, 1]))
    trunks = np.zeros((len(parts), 3), np.int64)  # a sequence of its own is a trunk without branches
    trunks[:, 0] = parts.sum(1)
    return trunks


def rows_of(lengths: np.ndarray, layout: str, one_row: bool = False) -> list[list[int]]:
    """The segments of each row.

    Packing is first-fit decreasing: the longest segment first, into the first row with enough free positions. A row has
    as many positions as the longest segment.

    Args:
        lengths: (U,) number of tokens of each segment.
        one_row: whether packing makes one row of all segments, in their order.
    """
    if not packs(layout):
        return [[segment] for segment in range(len(lengths))]
    if one_row:
        return [list(range(len(lengths)))]
    rows: list[list[int]] = []
    free: list[int] = []
    for segment in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[segment])
        row = next((i for i, left in enumerate(free) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(int(lengths.max()))
        rows[row].append(segment)
        free[row] -= length
    return rows


def width_of(lengths: np.ndarray, rows: list[list[int]], multiple_of: int = 1, extra: int = 0) -> int:
    """T: the length of the longest row plus `extra`, rounded up to a multiple; at least 1."""
    longest = max((int(lengths[row].sum()) for row in rows), default=0) + extra
    return -(-max(longest, 1) // multiple_of) * multiple_of


def grid(
    parts: np.ndarray, layout: str, *, one_row: bool = False, pad_to_multiple_of: int = 1, extra_padding: int = 0
) -> Grid:
    """The positions of these sequences in a layout.

    Args:
        parts: (S, 2) as in `segments_of`, at least one sequence unless the layout is padded.
        one_row: whether packing makes one long row rather than rows as long as the longest segment.
        pad_to_multiple_of: T is rounded up to a multiple of this.
        extra_padding: columns of padding to add.
    """
    lengths, segments = parts.sum(1), segments_of(parts, layout)
    rows = rows_of(segments.sum(1), layout, one_row)
    width = width_of(segments.sum(1), rows, pad_to_multiple_of, extra_padding)
    first = np.zeros(len(segments), np.int64)
    for number, row in enumerate(rows):
        sizes = segments[row].sum(1)
        first[row] = number * width + np.cumsum(sizes) - sizes

    # 0, 1, ... within each sequence
    position_ids = np.arange(int(lengths.sum())) - (np.cumsum(lengths) - lengths).repeat(lengths)
    if shares_prompts(layout):
        # the rejected completion follows the chosen one in the row, so its positions skip the chosen one's tokens
        prompts, skipped = parts[:, 0], np.concatenate((np.zeros(len(segments), np.int64), segments[:, 1]))
        skip = np.where(position_ids < prompts.repeat(lengths), 0, skipped.repeat(lengths))
        index = np.tile(first, 2).repeat(lengths) + position_ids + skip
    else:
        index = first.repeat(lengths) + position_ids
    placed = None if layout == PADDED else np.column_stack((first, segments))
    return Grid(index, position_ids, max(len(rows), 1), width, placed)


def block_and_branch(segments: np.ndarray, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """(block, branch), each (positions,) int64: the segment of each position, and 0 in its trunk, 1 and 2 in branches.

    Position i attends to position j of the same row iff j <= i, block[i] == block[j], and branch[j] is 0 or branch[i].
    A padding position is a block of its own, numbered from -1 down.
    """
    block, branch = -1 - np.arange(positions), np.zeros(positions, np.int64)
    lengths = segments[:, 1:].sum(1)
    within = np.arange(int(lengths.sum())) - (np.cumsum(lengths) - lengths).repeat(lengths)
    index = segments[:, 0].repeat(lengths) + within
    block[index] = np.arange(len(segments)).repeat(lengths)
    branch[index] = np.tile([0, 1, 2], len(segments)).repeat(segments[:, 1:].reshape(-1))
    return block, branch


def positions_of(segments: np.ndarray, sequence: int, sequences: int) -> np.ndarray:
    """Flat indices of the tokens of a sequence, in order, (tokens,) int64.

    Args: sequences: S; a segment is a sequence if there are S segments, and a pair if there are S / 2.
    """
    first, trunk, one, other = segments[sequence % len(segments)].tolist()
    if sequence < len(segments) or len(segments) == sequences:
        return first + np.arange(trunk + one)
    return first + np.concatenate((np.arange(trunk), trunk + one + np.arange(other)))
