"""Normalizers of the terms of a loss: the gradient does not depend on how a step is split into micro-batches.

Every term of a loss has a value and a count per pair: 1, or a number of tokens. Over the pairs b of a whole step, on
all ranks,

    loss = sum_t weight_t * (sum_b value_tb) / normalizer_t,    normalizer_t = sum_b count_tb.

A micro-batch contributes its part of the numerator, so the normalizer must be known before the first forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from prefopt.data.loader import Batches, Shares
from prefopt.data.pairs import BLOCK, pair_metadata
from prefopt.method import Method
from prefopt.training.batching import Batcher
from prefopt.training.forward import SUMS, statistics_for
from prefopt.training.runtime import Runtime
from prefopt.types import EncodedPair, LossOutput, Needs, PairBatch, PairStats, Term, TokenStats, TokenView


class Normalizers:
    """The normalizers of a run's steps.

    If steps are grouped by length, normalizing by a step's own token count would give a token in a step of short
    completions more weight than one in a step of long completions. In that case the normalizer is the number of pairs
    times the average count per pair of an epoch. For terms that count pairs the two are equal.
    """

    def __init__(self, method: Method, batcher: Batcher, runtime: Runtime, train: Batches) -> None:
        self.method, self.batcher, self.runtime, self.train = method, batcher, runtime, train
        grouped = train.grouped
        self.per_pair = None if grouped is None else self.averages(grouped)  # average counts, if steps are grouped

    def of_step(self, step: int, batches: Sequence[PairBatch]) -> dict[str, float]:
        """The normalizer of each term. Args: batches: this rank's micro-batches of the step."""
        if self.per_pair is not None:
            pairs = self.train.counted_pairs(step)
            return {name: count * pairs for name, count in self.per_pair.items()}
        totals = self._counts(batches)
        summed = self.runtime.sum(torch.tensor(list(totals.values()), dtype=torch.float64)).tolist()
        return {name: count if count > 0 else 1.0 for name, count in zip(totals, summed, strict=True)}

    def averages(self, shares: Shares) -> dict[str, float]:
        """The count of each term per pair, averaged over an epoch. Args: shares: see `Batches.grouped`."""
        averages: dict[str, float] = {}
        for share, pairs in shares:
            for name, count in self._counts(self._without_tokens(pairs)).items():
                averages[name] = averages.get(name, 0.0) + share * count / len(pairs)
        return {name: count if count > 0 else 1.0 for name, count in averages.items()}

    def _counts(self, batches: Iterable[PairBatch]) -> dict[str, float]:
        """The count of each term, summed over batches.

        Counts depend on the batch only, so evaluating the loss on placeholder statistics yields them before any forward
        pass.
        """
        totals: dict[str, float] = {}
        for batch in batches:
            for term in counted_terms(self.method, batch):
                totals[term.name] = totals.get(term.name, 0.0) + float(term.count.double().sum())
        return totals

    def _without_tokens(self, pairs: Sequence[EncodedPair]) -> Iterator[PairBatch]:
        """Batches with lengths and columns but no tokens: all that a count can depend on."""
        empty = self.batcher.collate([])
        for begin in range(0, len(pairs), BLOCK):
            end = min(begin + BLOCK, len(pairs))

            def of(name: str, begin: int = begin, end: int = end) -> torch.Tensor:
                return torch.from_numpy(pair_metadata(pairs, name, begin, end).copy())

            yield replace(
                empty,
                chosen_lengths=of("chosen_loss_tokens"),
                rejected_lengths=None if empty.rejected_lengths is None else of("rejected_loss_tokens"),
                columns={name: of(f"column.{name}") for name in empty.columns},
                where=("",) * (end - begin),
                weights=None if self.batcher.weights is None else of(f"column.{self.batcher.weights}"),
            )


def weighted(output: LossOutput, batch: PairBatch) -> LossOutput:
    """The loss with the weight w_b of each pair, if the data has one: `sum_b w_b value_tb / sum_b w_b count_tb`.

    A weight of 2 is the same as having the pair twice. Metrics are not weighted.
    """
    if batch.weights is None:
        return output
    weights = batch.weights
    terms = [
        replace(term, value=term.value * weights.to(term.value.dtype), count=term.count * weights)
        for term in output.terms
    ]
    return replace(output, terms=tuple(terms))


def normalized(output: LossOutput, normalizers: Mapping[str, float]) -> torch.Tensor:
    """This micro-batch's part of the loss: `sum_t weight_t * (sum_b value_tb) / normalizer_t`, shape ()."""
    return sum(
        (term.weight * term.value.sum() / normalizers[term.name] for term in output.terms),
        start=output.terms[0].value.new_zeros(()),
    )


def non_finite_pairs(output: LossOutput) -> torch.Tensor:
    """Which pairs have a term that is NaN or infinite, (B,) bool. It stays on the device, to avoid synchronising."""
    return torch.stack([~torch.isfinite(term.value.detach()) for term in output.terms]).any(0)


def counted_terms(method: Method, batch: PairBatch) -> tuple[Term, ...]:
    """The terms of a batch with their counts; their values are those of placeholder statistics."""
    stats = _placeholder(batch, method.needs)
    if batch.token_columns:
        of_tokens = torch.zeros_like(stats.tokens.stats.logp)
        batch = replace(batch, token_columns=dict.fromkeys(batch.token_columns, of_tokens))
    return weighted(method.loss_of(stats, batch, method.first_state(stats, batch)), batch).terms


def _placeholder(batch: PairBatch, needs: Needs) -> PairStats:
    """Statistics that are all zero, for which a loss is evaluated to read its counts."""
    zeros = torch.zeros(batch.pairs, dtype=torch.float64)
    paired = zeros if batch.rejected_lengths is not None else None
    members: dict[str, Any] = {"chosen_logps": None, "rejected_logps": None}
    names = statistics_for(needs) + (() if needs.output == "scores" else ("logp",))
    for name in (SUMS.get(name, name) for name in names):
        members[f"chosen_{name}"], members[f"rejected_{name}"] = zeros, paired
    if needs.output != "scores":  # one token per sequence: a count cannot depend on what a model computes of tokens
        sequences = batch.pairs if paired is None else 2 * batch.pairs
        each = torch.zeros(sequences, dtype=torch.float64)
        tokens = TokenStats(**{"logp": each, **dict.fromkeys(names, each)})
        members["token_view"] = TokenView(tokens, torch.arange(sequences), torch.ones(sequences), batch.pairs)
    return PairStats(**members, chosen_lengths=batch.chosen_lengths, rejected_lengths=batch.rejected_lengths)
