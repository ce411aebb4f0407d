"""One class of equality: however a step is cut, padded, ordered or spread, its loss and gradients are the same.

The member that the others are held against is an oracle outside the product: each row alone, by plain formulas.
"""

import random
import tempfile
from functools import partial

import pytest
import torch

from prefopt.data.collate import collate
from prefopt.training import batching
from tests.dist.ranks import run_ranks
from tests.invariant.methods import methods, representatives
from tests.invariant.oracle import oracle_step
from tests.invariant.steps import BOUNDS, Bench, difference, random_pairs, two_models

METHODS, ALL = methods(), methods(whole=True)
DTYPES = list(BOUNDS)
STATELESS = ("logps", "rewards", "accuracy")  # groups of metrics that read no number kept between steps
# the ways to cut a step that two processes are held to: (pairs, micro-batch)
SPREADS = {"8 pairs": (8, 4), "1 at a time": (8, 1), "5 pairs, one process has less": (5, 2), "1 pair": (1, 4)}
# each case costs seconds: all of them for each kind of forward pass and each loss that reads the global batch
ALL_SPREADS = representatives(METHODS) | {name for name, method in METHODS.items() if method.needs.batch_values}

each_method = pytest.mark.parametrize("name", METHODS)
each_variant = pytest.mark.parametrize("name", ALL)
# in float32 not the variants beyond: an exponential of a log-ratio amplifies how its sum was rounded
each_variant_and_dtype = pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for dtype in DTYPES for name in (ALL if dtype == torch.float64 else METHODS)]
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def models():
    return {(dtype, tied): two_models(dtype, tied) for dtype in DTYPES for tied in (False, True)}


@pytest.fixture(scope="module")
def expected(models):
    """The oracle's step, computed once for each question."""
    answers = {}

    def ask(name, dtype, pairs=8, tied=False):
        key = (name, dtype, pairs, tied)
        if key not in answers:
            method = ALL[name]
            answers[key] = oracle_step(*models[dtype, tied], method, rows_for(method, pairs))
        return answers[key]

    return ask


def rows_for(method, pairs=8):
    return random_pairs(method.needs.columns, pairs)


def assert_equal(expected, found, dtype, what):
    gap, where = difference(expected, found)
    assert gap <= BOUNDS[dtype], f"{what}: {where} differs by {gap:.2e}"


# One process.


@each_variant_and_dtype
def test_step_when_cut_padded_or_shuffled_in_any_way_then_loss_and_gradients_are_the_oracles(
    name, dtype, runtime, models, expected, monkeypatch
):
    method = ALL[name]
    rows = rows_for(method)
    shuffled = random.Random(5).sample(rows, len(rows))
    assert runtime.world == 1
    bench = Bench(runtime, method, models[dtype, False])
    if name not in METHODS:  # another formula of the numbers that one of METHODS reads
        assert_equal(expected(name, dtype), bench.step(shuffled, 3), dtype, "shuffled, 3 at a time")
        return
    small_tiles = Bench(runtime, method, models[dtype, False], (4, 16))
    for what, found in {
        "8x1": lambda: bench.step(rows, 8),
        "1x8": lambda: bench.step(rows, 1),
        "3 at a time": lambda: bench.step(rows, 3),
        "shuffled, 8x1": lambda: bench.step(shuffled, 8),
        "shuffled, 3 at a time": lambda: bench.step(shuffled, 3),
        "small tiles": lambda: small_tiles.step(rows, 8),
    }.items():
        assert_equal(expected(name, dtype), found(), dtype, what)
    for what, padding in {"7 columns more": {"extra_padding": 7}, "to 32": {"pad_to_multiple_of": 32}}.items():
        monkeypatch.setattr(batching, "collate", partial(collate, **padding))
        assert_equal(expected(name, dtype), bench.step(rows, 3), dtype, f"padded {what}")


@each_method
def test_step_when_the_last_batch_is_uneven_then_loss_and_gradients_are_the_oracles(name, runtime, models, expected):
    method, dtype = METHODS[name], torch.float64
    bench = Bench(runtime, method, models[dtype, False])
    for pairs, micro in SPREADS.values():
        found = bench.step(rows_for(method, pairs), micro)
        assert_equal(expected(name, dtype, pairs), found, dtype, f"{pairs} pairs, {micro} at a time")


@each_method
def test_step_when_embeddings_are_tied_then_loss_and_gradients_are_the_oracles(name, runtime, models, expected):
    dtype, method = torch.float64, ALL[name]
    found = Bench(runtime, method, models[dtype, True]).step(rows_for(method), 3)
    assert "lm_head.weight" not in found[1]
    assert_equal(expected(name, dtype, tied=True), found, dtype, "tied")


# Two processes: all that is asked of them is done in one go, and looked at by the tests below.


def spreads_of(name, dtype):
    """The ways to cut a step between two processes that a method is held to."""
    if name in ALL_SPREADS:
        return SPREADS if dtype == torch.float64 else {"8 pairs": SPREADS["8 pairs"]}
    return {what: SPREADS[what] for what in list(SPREADS)[2:3] if dtype == torch.float64}


def evaluated_by(name):
    """The batch sizes of evaluations on two processes."""
    return (1, 3) if name in ALL_SPREADS else (3,)


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(_two_processes)


def _two_processes(runtime):
    answers = {"processes": (runtime.world, str(runtime.accelerator.distributed_type.value), runtime.backend)}
    for dtype in DTYPES:
        untied, tied = two_models(dtype), two_models(dtype, tied=True)
        for name, method in METHODS.items():
            bench = Bench(runtime, method, untied)
            for what, (pairs, micro) in spreads_of(name, dtype).items():
                answers[name, dtype, what] = bench.step(rows_for(method, pairs), micro)
            if dtype == torch.float64:
                for batch in evaluated_by(name):
                    with tempfile.TemporaryDirectory() as folder:
                        answers[name, "eval", batch] = bench.evaluate(rows_for(method, 5), batch, folder)
                if name in ALL_SPREADS:
                    answers[name, "tied"] = Bench(runtime, method, tied).step(rows_for(method), 2)
    return answers


def test_two_processes_when_asked_then_they_are_two_and_joined_by_ddp(ranks):
    assert [answers["processes"] for answers in ranks] == [(2, "MULTI_CPU", "ddp")] * 2


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for dtype in DTYPES for name in METHODS if spreads_of(name, dtype)]
)
def test_step_when_two_processes_then_loss_and_gradients_are_the_oracles_on_both(name, dtype, ranks, expected):
    for rank, answers in enumerate(ranks):
        for what, (pairs, _) in spreads_of(name, dtype).items():
            assert_equal(expected(name, dtype, pairs), answers[name, dtype, what], dtype, f"rank {rank}, {what}")


@pytest.mark.parametrize("name", [name for name in METHODS if name in ALL_SPREADS])
def test_step_when_two_processes_and_tied_embeddings_then_loss_and_gradients_are_the_oracles(name, ranks, expected):
    for answers in ranks:
        assert_equal(expected(name, torch.float64, tied=True), answers[name, "tied"], torch.float64, "tied")


# Evaluation.


@each_method
def test_eval_metrics_when_batch_or_processes_change_then_they_are_the_same(
    name, runtime, models, ranks, expected, tmp_path
):
    method, dtype = METHODS[name], torch.float64
    rows = rows_for(method, 5)
    bench = Bench(runtime, method, models[dtype, False])
    lines = {f"one process, {batch}": bench.evaluate(rows, batch, tmp_path) for batch in (1, 3, 16)}
    lines |= {f"two processes, {batch}": ranks[0][name, "eval", batch] for batch in evaluated_by(name)}
    first = lines.pop("one process, 1")
    known = dict(expected(name, dtype, 5)[2])
    if method.needs.state:  # which a step updates before its loss, and an evaluation does not
        known = {key: value for key, value in known.items() if any(f"{one}/" in key for one in STATELESS)}
    assert known.keys() <= first.keys()
    assert {key: first[key] for key in known} == pytest.approx(known, rel=1e-9)
    for what, line in lines.items():
        assert line.keys() == first.keys(), what
        for key in first.keys() - {"seconds", "split"}:
            assert line[key] == pytest.approx(first[key], rel=1e-9), (what, key)
