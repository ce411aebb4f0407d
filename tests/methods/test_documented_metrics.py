"""The metrics that a method's page promises are those that its runs write."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from prefopt import registry
from prefopt.training.forward import SUMS, statistics_to_evaluate
from prefopt.training.metrics import loss_metrics, shared_metrics
from prefopt.types import PairStats
from tests.invariant.methods import methods
from tests.methods.make_stats import batch, even_tokens, f64

PAGES = Path(__file__).resolve().parent.parent.parent / "docs" / "methods"


def written(method):
    """Names of an evaluation's figures, from the functions that a run has them from."""
    needs, paired = method.needs, method.needs.rows == "pairs"
    names = {SUMS.get(name, name) for name in statistics_to_evaluate(needs)} | (
        {"logps"} if needs.output != "scores" else set()
    )
    values = {f"{side}_{name}": f64([1.0]) for name in names for side in ("chosen", "rejected")[: 1 + paired]}
    given = {"chosen_logps": None, "rejected_logps": None} | values
    lengths = {"chosen_lengths": f64([2.0]), "rejected_lengths": f64([3.0]) if paired else None}
    view = even_tokens(given | lengths) if needs.output != "scores" else None
    stats = PairStats(**given, **lengths, token_view=view)
    rows = batch(1, **{column.name: [0.5] for column in needs.columns})
    per_token = {column.name: f64([1.0] * 5) for column in needs.token_columns}
    rows = dataclasses.replace(rows, token_columns=per_token)
    output = method.loss_of(stats, rows, method.first_state(stats, rows))
    terms = loss_metrics(output) if len(output.terms) > 1 else {}
    return {"loss", *terms, *shared_metrics(stats), *output.metrics}


@pytest.mark.parametrize("name", registry.names())
def test_every_metric_that_the_page_of_a_method_promises_is_written(name):
    variants = [method for key, method in methods(whole=True).items() if key == name or key.startswith(f"{name}-")]
    found = set().union(*map(written, variants))
    text = (PAGES / f"{name}.md").read_text()
    promised = re.search(r"\*\*Metrics\.?\*\*(.*?)(?:\n\n|\Z)", text, re.DOTALL)
    assert promised, f"{name}.md has no paragraph on metrics"
    cls = registry.get(name)
    settings = {f.name for f in dataclasses.fields(cls)}
    settings |= {str(c) for hint in typing.get_type_hints(cls).values() for c in typing.get_args(hint)}
    settings |= {"exp(loss)", *registry.names()}
    names = re.findall(r"(no )?`([^`]+)`", promised[1])
    assert names or "DPO's" in promised[1]
    for absent, metric in names:
        if metric in settings:
            continue
        pattern = re.escape(metric).replace(r"\*", "[^/]+")
        there = any(re.fullmatch(pattern, one) for one in found)
        assert there != bool(absent), f"{name}.md speaks of {metric}; there are {sorted(found)}"


@pytest.mark.parametrize("key", methods(whole=True))
def test_method_that_does_not_lead_to_the_optimum_says_why_in_one_line(key):
    method = methods(whole=True)[key]
    said = method.other_optimum()
    if key.startswith("tdpo"):
        assert "does not converge to pi*, the star of the plot" in said
    if key == "dpo":
        assert said == ""
    assert "\n" not in said
