"""However sequences stand in rows, loss and gradients are those of each row alone, unpadded, by plain formulas."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from prefopt.data.collate import collate
from prefopt.data.layouts import LAYOUTS, shares_prompts
from prefopt.errors import TrainError
from prefopt.settings import ModelConfig
from prefopt.training import attention, batching, layout_choice
from prefopt.training.models import recompute_activations
from tests.dist.ranks import run_ranks
from tests.helpers import byte_bpe_tokenizer
from tests.invariant.adapted import adapted_policy
from tests.invariant.methods import by_kind, methods
from tests.invariant.oracle import oracle_step
from tests.invariant.precise import models_of, precise
from tests.invariant.steps import BOUNDS, Bench, difference, random_pairs, two_models

METHODS = methods()
TOKEN_LEVEL = next(m for m in METHODS.values() if m.needs.reference == "token" and m.needs.rows == "pairs")
SCORES = next(m for m in METHODS.values() if m.needs.output == "scores")
ARCHITECTURES = ("llama", "tied", "bias", "soft cap", "learned positions")
SMALL_TILES = (4, 16)  # of which no vocabulary here is a multiple

each_method = pytest.mark.parametrize("name", METHODS)
each_kind = pytest.mark.parametrize("name", by_kind(METHODS))


def layouts_for(method):
    return [name for name in LAYOUTS if method.needs.rows == "pairs" or not shares_prompts(name)]


def steps_of(bench, rows, layouts, cuts=(8, 3)):
    """(what, step) of each layout and cut on one bench."""
    for layout in layouts:
        bench.run.batcher.layouts = replace(bench.run.batcher.layouts, allowed=(layout,))
        for micro in cuts:
            yield f"{layout}, {micro} at a time", bench.step(rows, micro)


def assert_all_equal(expected, steps, bound):
    for what, found in steps:
        gap, where = difference(expected, found)
        assert gap <= bound, f"{what}: {where} differs by {gap:.2e}"


@pytest.mark.parametrize(
    ("name", "what"), [*((name, "llama") for name in METHODS), *by_kind(METHODS, ARCHITECTURES[1:])]
)
def test_step_when_in_any_layout_then_loss_and_gradients_are_the_oracles(name, what, runtime):
    method, models = METHODS[name], models_of(what, torch.float64)
    rows = random_pairs(method.needs.columns, pairs=5)
    bench = Bench(runtime, method, models, SMALL_TILES)
    cuts = (5, 2) if what == "llama" else (3,)
    assert_all_equal(oracle_step(*models, method, rows), steps_of(bench, rows, layouts_for(method), cuts), 1e-9)


@each_kind
def test_step_when_float32_and_in_any_layout_then_loss_and_gradients_are_the_oracles(name, runtime):
    method, models = METHODS[name], two_models(torch.float32)
    rows = random_pairs(method.needs.columns)
    bench = Bench(runtime, method, models, SMALL_TILES)
    steps = steps_of(bench, rows, layouts_for(method), cuts=(8,))
    assert_all_equal(oracle_step(*models, method, rows), steps, 1e-5)


@each_method
def test_step_when_a_micro_batch_scores_nothing_then_loss_and_gradients_are_the_oracles(name, runtime):
    method, models = METHODS[name], models_of("llama", torch.float64)
    first, *rest = random_pairs(method.needs.columns, pairs=4)
    blank = {side: [False] * len(getattr(first, side)) for side in ("chosen_mask", "rejected_mask")}
    rows = [replace(first, **blank, token_columns={key: [] for key in first.token_columns}), *rest]
    expected = oracle_step(*models, method, rows)
    if not math.isfinite(expected[0]):  # the method divides by the length of a completion: with a token it has a loss
        one = {side: [True, *marks[1:]] for side, marks in blank.items()}
        tokens = {key: values[:1] for key, values in first.token_columns.items()}
        again = replace(first, **one, token_columns=tokens)
        assert math.isfinite(oracle_step(*models, method, [again, *rest])[0])
        return
    bench = Bench(runtime, method, models, SMALL_TILES)
    assert_all_equal(expected, steps_of(bench, rows, layouts_for(method), cuts=(1,)), 1e-9)


@pytest.mark.parametrize(("stock", "kind"), [("sdpa", "dense"), ("eager", "additive")])
def test_step_when_attention_takes_a_dense_mask_then_loss_and_gradients_are_the_oracles(stock, kind, runtime):
    models = two_models(torch.float32)
    rows = random_pairs(TOKEN_LEVEL.needs.columns)
    bench = Bench(runtime, TOKEN_LEVEL, models, SMALL_TILES)
    policy = bench.run.policy
    for lm in (policy.lm, policy.reference):
        lm.set_attn_implementation(stock)
    policy.attention = policy.reference_attention = kind
    bench.run.batcher.layouts = replace(bench.run.batcher.layouts, kind=kind)
    assert_all_equal(oracle_step(*models, TOKEN_LEVEL, rows), steps_of(bench, rows, LAYOUTS), 1e-5)


@pytest.mark.parametrize("cost", [0.0, 100.0])
def test_step_when_masks_are_cheap_or_dear_then_loss_and_gradients_are_the_oracles(cost, runtime, monkeypatch):
    monkeypatch.setitem(attention.MASKED_COST, "cpu", cost)
    models = models_of("bias", torch.float64)
    rows = random_pairs(TOKEN_LEVEL.needs.columns, pairs=5)
    steps = steps_of(Bench(runtime, TOKEN_LEVEL, models), rows, ["prefix_shared", "packed_prefix_shared"], cuts=(3,))
    assert_all_equal(oracle_step(*models, TOKEN_LEVEL, rows), steps, 1e-9)


@pytest.mark.parametrize("layout", ["packed_prefix_shared", "prefix_shared"])
def test_step_when_activations_are_recomputed_then_loss_and_gradients_are_the_oracles(layout, runtime):
    models = models_of("llama", torch.float64)
    rows = random_pairs(TOKEN_LEVEL.needs.columns)
    bench = Bench(runtime, TOKEN_LEVEL, models, layout=layout)
    recompute_activations(bench.run.policy.lm)
    assert_all_equal(oracle_step(*models, TOKEN_LEVEL, rows), steps_of(bench, rows, [layout]), 1e-9)


def test_step_when_bfloat16_autocast_then_layouts_agree_to_its_precision(runtime):
    rows = random_pairs(TOKEN_LEVEL.needs.columns)
    bench = Bench(runtime, TOKEN_LEVEL, two_models(torch.float32), SMALL_TILES)
    with torch.autocast("cpu", torch.bfloat16):
        (_, padded), *others = steps_of(bench, rows, LAYOUTS, cuts=(8,))
    for what, found in others:
        gap, where = difference(padded, found)
        assert 0 < gap < 0.05, f"{what}: {where} differs by {gap:.2e}"


@each_kind
def test_step_when_the_policy_has_an_adapter_then_layouts_agree(name, runtime, adapted):
    # that the padded step is right: tests/training/test_lora.py
    method = METHODS[name]
    (_, padded), *others = steps_of(
        Bench(runtime, method, adapted[method.needs.output]),
        random_pairs(method.needs.columns, pairs=5),
        layouts_for(method),
        cuts=(3,),
    )
    assert_all_equal(padded, others, 1e-9)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapted")
    two_models(torch.float64)[0].save_pretrained(path)
    model = ModelConfig(path=str(path), dtype="float64")
    return {
        method.needs.output: (precise(policy), reference)
        for method in (TOKEN_LEVEL, SCORES)
        for policy, reference in [adapted_policy(method, model)]
    }


# Several processes.


def _on_two(runtime):
    rows = random_pairs(TOKEN_LEVEL.needs.columns, pairs=5)
    bench = Bench(runtime, TOKEN_LEVEL, models_of("llama", torch.float64))
    # 5 pairs, 2 at a time; then one pair, which leaves one process without any
    return [*steps_of(bench, rows, LAYOUTS, cuts=(2,)), *steps_of(bench, rows[:1], LAYOUTS, cuts=(4,))]


def test_step_when_two_processes_and_any_layout_then_loss_and_gradients_are_the_oracles_on_both():
    rows = random_pairs(TOKEN_LEVEL.needs.columns, pairs=5)
    models = models_of("llama", torch.float64)
    five, one = (oracle_step(*models, TOKEN_LEVEL, some) for some in (rows, rows[:1]))
    for steps in run_ranks(_on_two):
        assert_all_equal(five, steps[: len(LAYOUTS)], 1e-9)
        assert_all_equal(one, steps[len(LAYOUTS) :], 1e-9)


# Chosen by itself.


def test_step_when_auto_mixes_layouts_then_the_oracles_and_the_same_bits_again(runtime, monkeypatch):
    # the model is so small that sharing never pays; were calls cheaper, it would for some
    monkeypatch.setitem(
        layout_choice.SPEEDS, "cpu", layout_choice.Work(linear=1e9, causal=1e9, masked=1e9, mask=1e9, calls=3e4)
    )
    models, method = models_of("llama", torch.float64), TOKEN_LEVEL
    rows = random_pairs(method.needs.columns, pairs=12)
    # two pairs with long prompts, which sharing is for
    rows += [replace(p, prompt_ids=[*p.prompt_ids, *range(5, 35)]) for p in random_pairs((), pairs=2, seed=1)]
    rows[-2:] = [replace(p, columns=rows[0].columns) for p in rows[-2:]]

    def run():
        bench = Bench(runtime, method, models, layout="auto")
        assert bench.run.batcher.layouts.allowed == LAYOUTS
        chosen = []
        honest = bench.run.batcher.collate
        bench.run.batcher.collate = lambda pairs: chosen.append(honest(pairs)) or chosen[-1]
        step = bench.step(rows, 2)
        return step, [batch.segments is None for batch in chosen]

    (first, kinds), (again, same) = run(), run()
    assert kinds == same
    assert len(set(kinds)) == 2, "padded and shared rows in one step"
    assert_all_equal(oracle_step(*models, method, rows), [("auto", first)], 1e-9)
    assert first[0] == again[0]
    assert all(torch.equal(gradient, again[1][name]) for name, gradient in first[1].items())


# Faults that a layout could have.


def chosen_token_leaked(batch, pairs):
    """The rejected side of the pair sees the first token of the chosen one."""
    segments = batch.segments.copy()
    segments[:, 1] += 1
    segments[:, 2] -= 1
    return replace(batch, segments=segments)


def neighbour_leaked(batch, pairs):
    """Each segment but the first sees the last cell of the segment before it."""
    segments = batch.segments.copy()
    order = segments[:, 0].argsort()
    last = 3 if segments[:, 3].any() else 1
    for before, after in pairwise(order):
        segments[before, last] -= 1
        segments[after, 0] -= 1
        segments[after, 1] += 1
    return replace(batch, segments=segments)


def position_shifted(batch, pairs):
    """One token of the last rejected completion stands one position too late."""
    positions = batch.position_ids.clone()
    at = int(batch.loss_index[-1])  # the last token but one of the last completion
    positions.view(-1)[at] += 1
    return replace(batch, position_ids=positions)


def positions_not_restarted(batch, pairs):
    """Positions run on through the rejected completion as through one text."""
    positions = batch.position_ids.flatten().clone()
    for pair, (first, trunk, one, other) in enumerate(batch.segments.tolist()):
        positions[first + trunk + one : first + trunk + one + other] += len(pairs[pair].chosen_ids)
    return replace(batch, position_ids=positions.view_as(batch.position_ids))


def scored_from_the_cell_before(batch, pairs):
    """The first token of a rejected completion is scored from the cell before it, which is the chosen one's last."""
    at = batch.loss_index.clone()
    for pair, (first, trunk, one, _) in enumerate(batch.segments.tolist()):
        mine = (batch.sequence_index == len(pairs) + pair).nonzero().flatten()
        if len(mine) and int(at[mine[0]]) == first + trunk - 1:
            at[mine[0]] = first + trunk + one - 1
    return replace(batch, loss_index=at)


FAULTS = [
    (chosen_token_leaked, "packed_prefix_shared"),
    (chosen_token_leaked, "prefix_shared"),
    (neighbour_leaked, "packed"),
    (neighbour_leaked, "packed_prefix_shared"),
    (position_shifted, "packed"),
    (position_shifted, "packed_prefix_shared"),
    (positions_not_restarted, "prefix_shared"),
    (scored_from_the_cell_before, "prefix_shared"),
    (scored_from_the_cell_before, "packed_prefix_shared"),
]
each_fault = pytest.mark.parametrize(("fault", "layout"), FAULTS, ids=lambda x: getattr(x, "__name__", x))
PAIRS = [p for p in random_pairs(TOKEN_LEVEL.needs.columns, pairs=9) if len(p.prompt_ids) > 1][:4]


@pytest.fixture
def turn_on(monkeypatch):
    def turn_on(fault):
        monkeypatch.setattr(batching, "collate", lambda pairs, **how: fault(collate(pairs, **how), pairs))

    return turn_on


@each_fault
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_comparison_when_a_layout_has_a_fault_then_it_is_far_beyond_the_bound(fault, layout, dtype, runtime, turn_on):
    models = models_of("llama", dtype)
    expected = oracle_step(*models, TOKEN_LEVEL, PAIRS)
    bench = Bench(runtime, TOKEN_LEVEL, models, layout=layout)
    assert difference(expected, bench.step(PAIRS, 4))[0] <= BOUNDS[dtype]
    turn_on(fault)
    assert difference(expected, bench.step(PAIRS, 4))[0] > 100 * BOUNDS[dtype]


@each_fault
def test_step_0_when_a_layout_has_a_fault_then_the_run_stops_and_names_the_row(fault, layout, runtime, turn_on):
    tokenizer = byte_bpe_tokenizer(["any text"], vocab_size=300)
    _, reference = two_models(torch.float32)
    ready = Bench(runtime, TOKEN_LEVEL, (reference, reference), tokenizer=tokenizer, layout=layout)
    ready.check_first_batch(PAIRS)
    turn_on(fault)
    with pytest.raises(TrainError, match=r"^step 0: rows:\d \((chosen|rejected)\): .* an independent path gives"):
        ready.check_first_batch(PAIRS)
