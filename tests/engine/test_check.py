"""The check before the first step. That it catches faults of collator and encoder: tests/invariant/test_faults.py."""

import math
import types

import pytest
import torch

from prefopt.engine import forward
from prefopt.errors import TrainError
from tests.dist.ranks import run_ranks
from tests.engine.architectures import ARCHITECTURES, tiny_model
from tests.helpers import byte_bpe_tokenizer
from tests.invariant.methods import methods
from tests.invariant.steps import Bench, random_pairs, two_models

METHODS = methods()
WITH_REFERENCE = next(m for m in METHODS.values() if m.needs.reference == "token")
KNOWN = {name: m for name, m in METHODS.items() if m.loss_at_reference() is not None}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_bpe_tokenizer(["any text"], vocab_size=300)


def check(runtime, tokenizer, method, models, pairs=None):
    pairs = random_pairs(method.needs.columns) if pairs is None else pairs
    Bench(runtime, method, models, tokenizer=tokenizer).check_first_batch(pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_check_when_all_is_well_then_it_says_so(name, dtype, runtime, tokenizer, capsys):
    _, reference = two_models(dtype)
    check(runtime, tokenizer, METHODS[name], (reference, reference))
    known = METHODS[name].loss_at_reference()
    agreed = "" if known is None else f", loss {known:.4f} as it must be"
    said = capsys.readouterr().out
    assert said.startswith("step 0: 4 pairs scored again by an independent path agree to ")
    assert said.endswith(agreed + "\n")


@pytest.mark.parametrize("name", KNOWN)
def test_check_when_the_first_loss_is_not_the_known_value_then_it_stops_and_names_the_row(name, runtime, tokenizer):
    with pytest.raises(TrainError, match=r"^step 0: rows:\d: the loss is .* while policy and reference are the same"):
        check(runtime, tokenizer, KNOWN[name], two_models(torch.float32))


def test_check_when_the_loss_is_not_finite_then_it_stops(runtime, tokenizer):
    policy, reference = two_models(torch.float32)
    with torch.no_grad():
        policy.lm_head.weight[7] = math.nan
    with pytest.raises(
        TrainError, match=r"^step 0: rows:\d \(chosen\): scored token \d+ of the completion has logp nan"
    ):
        check(runtime, tokenizer, WITH_REFERENCE, (policy, reference))


@pytest.mark.parametrize("name", [name for name, (_, scaled) in ARCHITECTURES.items() if scaled])
def test_check_when_the_head_scales_logits_otherwise_than_the_model_then_it_stops(
    name, runtime, tokenizer, monkeypatch
):
    lm = tiny_model(name, seed=0)
    check(runtime, tokenizer, WITH_REFERENCE, (lm, lm))
    monkeypatch.setattr(forward, "head_scaling", lambda lm: (1.0, None))
    with pytest.raises(TrainError, match=r"^step 0: rows:\d \(chosen\): .* an independent path gives"):
        check(runtime, tokenizer, WITH_REFERENCE, (lm, lm))


def test_check_when_the_reference_alone_is_scored_wrong_then_it_stops(runtime, tokenizer, monkeypatch):
    lm = tiny_model("llama", seed=0)
    bench = Bench(runtime, WITH_REFERENCE, (lm, lm), tokenizer=tokenizer)
    bench.trainer.policy._reference_scaling = (1.0, 0.5)
    with pytest.raises(TrainError, match="has ref_logp"):
        bench.check_first_batch(random_pairs())


# Two processes: a fault on one of them stops both, with one line.


def _check_on_two(runtime, tokenizer, faults):
    """The error of each kind of first batch, on this rank."""
    _, reference = two_models(torch.float32)
    said = []
    for fault in faults:
        pairs = random_pairs(WITH_REFERENCE.needs.columns, pairs=1 if fault == "one pair" else 6)
        # the longest pair goes to the last process when there is one, and comes first otherwise
        longest = max(pairs, key=lambda p: len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)))
        if fault == "structure":
            longest.prompt_ids[:0] = [0]
        bench = Bench(runtime, WITH_REFERENCE, (reference, reference), tokenizer=tokenizer)
        if fault == "rank 1":
            honest = bench.trainer._collate

            def shifted(self, *args, honest=honest):
                batch = honest(*args)
                if runtime.rank == 1:
                    batch.labels[0] += 1
                return batch

            bench.trainer._collate = types.MethodType(shifted, bench.trainer)
        try:
            bench.check_first_batch(pairs)
            said.append("")
        except TrainError as error:
            said.append(str(error))
    return said


def test_check_when_two_processes_then_the_fault_of_one_stops_both_with_one_line(tokenizer):
    faults = ("none", "one pair", "structure", "rank 1", "none")
    first, second = run_ranks(_check_on_two, tokenizer, faults)
    assert first == second
    assert [bool(line) for line in first] == [False, False, True, True, False]
    assert "BOS (0) stands twice" in first[2]
    assert "an independent path gives" in first[3]
