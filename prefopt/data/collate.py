"""From encoded pairs to a `PairBatch`. Masks are carried from the encoder, never guessed from values.

In which cell of the (R, T) grid each token stands is said by a layout, see `prefopt.data.layouts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from prefopt.data.layouts import PADDED, grid, shares_prompts
from prefopt.types import EncodedPair, PairBatch


def collate(
    pairs: Sequence[EncodedPair],
    *,
    pad_id: int,
    need_rejected: bool = True,
    columns: tuple[str, ...] = (),
    weights: str | None = None,
    token_columns: tuple[str, ...] = (),
    layout: str = PADDED,
    one_row: bool = False,
    pad_to_multiple_of: int = 1,
    extra_padding: int = 0,
) -> PairBatch:
    """The batch of these pairs. Rows are padded on the right.

    Args:
        pairs: at least one token of prompt and one of completion each; an empty list gives one row of padding.
        pad_id: the id that fills the padding; no result depends on it.
        need_rejected: whether the rejected sides are laid down.
        columns: names of the numbers to carry.
        weights: name of the column with the weight of each pair in the loss, if there is one.
        token_columns: names of the numbers per loss token to carry, in the order of `labels`.
        layout: one of `layouts.LAYOUTS`; a batch of no pairs is padded in any case.
        one_row: whether packing makes one long row.
        pad_to_multiple_of: T is rounded up to a multiple of this.
        extra_padding: columns of padding to add, for tests of equality.
    """
    prompts = [pair.prompt_ids for pair in pairs]
    completions = [pair.chosen_ids for pair in pairs]
    masks = [pair.chosen_mask for pair in pairs]
    if need_rejected:
        prompts += prompts
        completions += [_rejected(pair) for pair in pairs]
        masks += [pair.rejected_mask or [] for pair in pairs]
    elif shares_prompts(layout):
        raise ValueError(f"layout {layout}: there is no rejected side to share a prompt with")
    sequences, scored = len(prompts), np.fromiter(chain.from_iterable(masks), bool)

    # Tokens of all sequences in one line: prompt, completion, prompt, completion, ...
    parts = np.empty((sequences, 2), np.int64)
    parts[:, 0] = [len(ids) for ids in prompts]
    parts[:, 1] = [len(ids) for ids in completions]
    if parts.size and parts.min() < 1:
        raise ValueError("a pair without a prompt token or without a completion token cannot be scored")
    lengths = parts.sum(1)
    total = int(lengths.sum())
    tokens = np.fromiter(
        chain.from_iterable(chain.from_iterable(zip(prompts, completions, strict=True))), np.int64, total
    )
    completion = np.tile([False, True], sequences).repeat(parts.reshape(-1))
    if len(scored) != int(parts[:, 1].sum()):
        raise ValueError("a mask is not as long as its completion")

    placed = grid(
        parts,
        layout if sequences else PADDED,
        one_row=one_row,
        pad_to_multiple_of=pad_to_multiple_of,
        extra_padding=extra_padding,
    )
    index, rows, width = placed.index, placed.rows, placed.width
    input_ids = np.full(rows * width, pad_id, np.int64)
    attention_mask = np.zeros(rows * width, np.int64)
    position_ids = np.tile(np.arange(width), rows) if placed.segments is None else np.zeros(rows * width, np.int64)
    input_ids[index] = tokens
    attention_mask[index] = 1
    position_ids[index] = placed.position_ids
    if not sequences:
        attention_mask[0] = 1  # a row that attends to nothing is NaN in some attention kernels

    at = np.flatnonzero(completion)[scored]  # loss tokens among all tokens; never the first of a sequence
    sequence = np.arange(sequences).repeat(parts[:, 1])[scored]
    counts = np.bincount(sequence, minlength=sequences)
    return PairBatch(
        input_ids=torch.from_numpy(input_ids).view(rows, width),
        attention_mask=torch.from_numpy(attention_mask).view(rows, width),
        position_ids=torch.from_numpy(position_ids).view(rows, width),
        segments=placed.segments,
        loss_index=torch.from_numpy(index[at - 1]),
        labels=torch.from_numpy(tokens[at]),
        sequence_index=torch.from_numpy(sequence),
        last_index=torch.from_numpy(index[np.cumsum(lengths) - 1]),
        chosen_lengths=torch.from_numpy(counts[: len(pairs)]),
        rejected_lengths=torch.from_numpy(counts[len(pairs) :]) if need_rejected else None,
        columns={name: torch.tensor([pair.columns[name] for pair in pairs], dtype=torch.float64) for name in columns},
        where=tuple(pair.where for pair in pairs),
        weights=None
        if weights is None
        else torch.tensor([pair.columns[weights] for pair in pairs], dtype=torch.float64),
        token_columns={name: _per_token(pairs, name, counts) for name in token_columns},
    )


def _per_token(pairs: Sequence[EncodedPair], name: str, counts: np.ndarray) -> torch.Tensor:
    """A number of each loss token, (N,). Args: counts: loss tokens of each sequence, (S,)."""
    sides = ("chosen", "rejected")[: len(counts) // max(len(pairs), 1)]
    values = [pair.token_columns[f"{side}_{name}"] for side in sides for pair in pairs]
    if [len(one) for one in values] != counts.tolist():
        raise ValueError(f"{name}: a list does not have one number per loss token")
    return torch.tensor([*chain.from_iterable(values)], dtype=torch.float64)


def _rejected(pair: EncodedPair) -> list[int]:
    if pair.rejected_ids is None or pair.rejected_mask is None:
        raise ValueError(f"{pair.where}: no rejected side, in a batch for a method that needs pairs")
    return pair.rejected_ids
