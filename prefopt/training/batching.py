"""From the pairs of a step to this rank's micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from prefopt.data.collate import collate
from prefopt.data.pairs import input_tokens, padded_lengths
from prefopt.training.layout_choice import Layouts
from prefopt.training.micro_batches import micro_batches
from prefopt.training.reference_cache import ReferenceValues
from prefopt.types import EncodedPair, Needs, PairBatch


def as_mismatched(pair: EncodedPair) -> EncodedPair:
    """The pair with its mismatched completion, which it carries as the rejected one, as the chosen one."""
    return replace(
        pair,
        chosen_ids=pair.rejected_ids or [],
        chosen_mask=pair.rejected_mask or [],
        rejected_ids=None,
        rejected_mask=None,
    )


@dataclass
class Batcher:
    """Partitions pairs among ranks and collates them.

    Args:
        needs: what the method reads of a pair.
        layouts: the layouts that are exact for the model.
        pad_id: token that fills padding positions.
        rank, world: this rank, and the world size.
        values: the reference cache, where it replaces a live reference.
        weights: column with the weight of each pair in the loss, if there is one.
    """

    needs: Needs
    layouts: Layouts
    pad_id: int
    rank: int
    world: int
    values: ReferenceValues | None = None
    weights: str | None = None

    def micro_batches(self, pairs: Sequence[EncodedPair], size: int) -> Iterator[tuple[list[int], PairBatch]]:
        """This rank's micro-batches of at most `size` pairs, each with the indices of its pairs in `pairs`.

        Every rank has the same number of them; a micro-batch may be empty.
        """
        parts = micro_batches(padded_lengths(pairs), input_tokens(pairs), size, self.world)
        for indices in parts[self.rank]:
            numbers = indices.tolist()
            yield numbers, self.collate([pairs[i] for i in numbers])

    def step_batches(self, pairs: Sequence[EncodedPair], size: int) -> tuple[list[list[int]], list[PairBatch]]:
        """All of this rank's micro-batches of a step: (indices of their pairs, batches)."""
        found = list(self.micro_batches(pairs, size))
        return [indices for indices, _ in found], [batch for _, batch in found]

    def mismatched(self, pairs: Sequence[EncodedPair]) -> PairBatch:
        """A batch of the mismatched completions of unpaired examples, as chosen ones."""
        return self.collate([as_mismatched(pair) for pair in pairs])

    def collate(self, pairs: Sequence[EncodedPair], layout: str | None = None) -> PairBatch:
        """A batch of pairs, with the cached values of the reference if there is a cache.

        Args: layout: None: the one that is expected to be fastest for these pairs.
        """
        need_rejected = self.needs.rows == "pairs"
        batch = collate(
            pairs,
            pad_id=self.pad_id,
            need_rejected=need_rejected,
            columns=tuple(column.name for column in self.needs.columns),
            weights=self.weights,
            token_columns=tuple(column.name for column in self.needs.token_columns),
            **self.layouts.settings(layout or self.layouts.of(pairs, need_rejected)),
        )
        return batch if self.values is None else self.values.fill(batch, pairs)
