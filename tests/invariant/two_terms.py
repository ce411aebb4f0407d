"""A method with all that a term may be: averaged over pairs, over tokens, over a column's weights, and weighted."""

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from prefopt.method import Method, pair_term, per_pair
from prefopt.types import Column, LossOutput, Needs, Term


@dataclass(frozen=True)
class TwoTerms(Method):
    """A preference between completions that have cost KL, likelihood per token, and likelihood weighted by trust."""

    @property
    def needs(self):
        return Needs(reference="token", columns=(Column("trust", low=0.0, high=0.2),))

    def loss(self, stats, batch):
        trust = batch.columns["trust"].to(stats.chosen_logps.dtype)
        logits = stats.chosen_logratios - stats.rejected_logratios - 0.3 * (stats.chosen_kl - stats.rejected_kl)
        terms = (
            pair_term(-logsigmoid(logits), "preference"),
            Term("nll", -stats.chosen_logps, stats.chosen_lengths, weight=0.5),
            Term("trusted", -trust * stats.rejected_logps, trust, weight=0.01),
        )
        return LossOutput(terms, metrics=per_pair(logits=logits))
