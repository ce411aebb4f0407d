"""A policy that equals its reference ranks nothing: every accuracy of every method is one half."""

import dataclasses

import pytest
import torch

from prefopt.method import ahead
from prefopt.settings import parse
from prefopt.training.progress_bar import _postfix
from tests.invariant.methods import methods
from tests.methods.make_stats import batch, f64, means, pair_stats


@pytest.mark.parametrize("name", methods(whole=True))
def test_accuracies_when_both_sides_are_equal_then_are_one_half(name):
    method = methods(whole=True)[name]
    logps = [[-3.0, -9.0]] * 4
    read = ("kl", "scores", *method.needs.statistics)
    zeros = {f"{side}_{what}": [0.0, 0.0] for side in ("chosen", "rejected") for what in read}
    stats = pair_stats(*logps, lengths=((4, 2), (4, 2)), **zeros)
    columns = {column.name: [0.5, 0.5] for column in method.needs.columns}
    tokens = {column.name: torch.ones(12).double() for column in method.needs.token_columns}
    rows = dataclasses.replace(batch(2, **columns), token_columns=tokens)
    found = means(method.loss_of(stats, rows, method.first_state(stats, rows)))
    ties = {name: value for name, value in found.items() if "accurac" in name or "contradictions" in name}
    assert set(ties.values()) <= {0.5}
    if method.needs.rows == "pairs" and "." not in name:
        assert "rewards/accuracies" in ties
    if method.needs.reference != "none":
        assert {name for name in ties if name != "accuracy/logit"} <= set(method.tied_at_reference)
    else:
        assert method.tied_at_reference == ()


def test_ahead_counts_a_tie_half_and_not_a_number_as_wrong():
    first, second = f64([2.0, 1.0, 1.0, float("nan")]), f64([1.0, 1.0, 2.0, 0.0])
    assert ahead(first, second).tolist() == [1.0, 0.5, 0.0, 0.0]
    assert ahead(torch.tensor([0.0], dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_logit_accuracy_when_the_loss_reads_no_reference_then_is_a_figure_before_training_too():
    plain, free = (parse(["--method", "dpo", "--method.reference_free", value]) for value in ("false", "true"))
    assert "accuracy/logit" in plain.tied_at_start
    assert "accuracy/logit" not in free.tied_at_start
    assert "rewards/accuracies" in free.tied_at_start
    other = dataclasses.replace(plain, reference=dataclasses.replace(plain.reference, path="another"))
    assert other.tied_at_start == ()


@pytest.mark.parametrize(("step", "tied", "shown"), [(1, True, "-"), (2, True, "0.500"), (1, False, "0.500")])
def test_progress_bar_when_nothing_is_trained_yet_then_shows_no_accuracy(step, tied, shown):
    line = {"step": step, "loss": 0.6931, "tokens_per_second": 12345.6, "rewards/accuracies": 0.5}
    assert _postfix(line, ("rewards/accuracies",) if tied else ()) == {
        "loss": "0.6931",
        "tok/s": "12,346",
        "acc": shown,
    }
