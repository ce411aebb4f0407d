"""The check before the first step. That it catches faults of collator and encoder: tests/invariant/test_faults.py."""

import contextlib
import math
import types
from dataclasses import replace

import pytest
import torch

from prefopt.errors import TrainError
from prefopt.training import forward
from prefopt.training import step0_check as step0
from prefopt.training.forward import token_stats_of
from prefopt.training.step0_check import unexpected_loss
from tests.dist.ranks import run_ranks
from tests.helpers import byte_bpe_tokenizer
from tests.invariant.methods import by_kind, methods
from tests.invariant.steps import Bench, random_pairs, two_models
from tests.training.architectures import ARCHITECTURES, tiny_model

METHODS = methods(whole=True)
WITH_REFERENCE = next(m for m in METHODS.values() if m.needs.reference == "token")
KNOWN = {name: m for name, m in METHODS.items() if m.loss_at_reference() is not None}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_bpe_tokenizer(["any text"], vocab_size=300)


def check(runtime, tokenizer, method, models, pairs=None):
    pairs = random_pairs(method.needs.columns) if pairs is None else pairs
    Bench(runtime, method, models, tokenizer=tokenizer).check_first_batch(pairs)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in methods()), *by_kind(METHODS, [torch.float64, torch.bfloat16])],
    ids=str,
)
def test_check_when_all_is_well_then_it_says_so(name, dtype, runtime, tokenizer, capsys):
    _, reference = two_models(dtype)
    check(runtime, tokenizer, METHODS[name], (reference, reference))
    known = METHODS[name].loss_at_reference()
    agreed = "" if known is None else f", loss {known:.4f} as expected"
    said = capsys.readouterr().out.splitlines()[-1]  # a loss of the global batch has printed a line before
    assert said.startswith("step 0: 4 pairs scored again by an independent path agree to ")
    assert said.endswith(agreed)


@pytest.mark.parametrize(("name", "dtype"), by_kind(KNOWN, [torch.float32, torch.bfloat16]), ids=str)
def test_check_when_the_first_loss_is_not_the_known_value_then_it_stops_and_names_the_row(
    name, dtype, runtime, tokenizer
):
    with pytest.raises(TrainError, match=r"^step 0: rows:\d: the loss is .* while policy and reference are the same"):
        check(runtime, tokenizer, KNOWN[name], two_models(dtype))


def test_check_when_the_reference_differs_in_one_weight_of_bfloat16_then_it_stops(runtime, tokenizer):
    policy, reference = two_models(torch.bfloat16)[1], two_models(torch.bfloat16)[1]
    with torch.no_grad():
        reference.model.norm.weight[3] *= 1.1
    method = next(method for name, method in KNOWN.items() if name.startswith("dpo"))
    with pytest.raises(TrainError, match="while policy and reference are the same"):
        check(runtime, tokenizer, method, (policy, reference))


@pytest.mark.parametrize("other", [False, True])
def test_check_when_the_reference_is_cached_in_bfloat16_then_its_log_probabilities_are_compared(
    other, runtime, tokenizer
):
    policy, reference = two_models(torch.bfloat16)[1], two_models(torch.bfloat16)[0 if other else 1]
    method = next(method for name, method in KNOWN.items() if name.startswith("dpo"))
    pairs = random_pairs(method.needs.columns)
    live = Bench(runtime, method, (reference, reference), tokenizer=tokenizer).run
    batch = live.batcher.collate(pairs)
    values = token_stats_of(live.policy, batch, ()).logp.detach()
    values += 0.03 * torch.randn(
        values.shape, generator=torch.Generator().manual_seed(0)
    )  # of batches of another shape
    cached = replace(batch, ref_logps=values)
    found = unexpected_loss(Bench(runtime, method, (policy, policy)).run.policy, method, cached, 0.1, cached=True)
    assert (found is not None) == other
    assert not other or "in the reference cache, while policy and reference are the same weights" in found


@pytest.mark.parametrize("named", [None, "same", "other"])
def test_check_when_reference_path_names_the_policys_own_folder_then_the_loss_is_known(
    named, runtime, tokenizer, tmp_path
):
    (tmp_path / "same").mkdir()
    method = next(method for name, method in KNOWN.items() if name.startswith("dpo"))
    bench = Bench(runtime, method, two_models(torch.float32), tokenizer=tokenizer)
    config = bench.run.config
    path = None if named is None else f"{tmp_path}/x/../same" if named == "same" else str(tmp_path)
    bench.run.config = replace(
        config,
        model=replace(config.model, path=str(tmp_path / "same")),
        reference=replace(config.reference, path=path),
    )
    (tmp_path / "x").mkdir()
    with pytest.raises(TrainError) if named != "other" else contextlib.nullcontext():
        bench.check_first_batch(random_pairs(method.needs.columns))


def test_check_when_the_loss_is_not_finite_then_it_stops(runtime, tokenizer):
    policy, reference = two_models(torch.float32)
    with torch.no_grad():
        policy.lm_head.weight[7] = math.nan
    with pytest.raises(TrainError, match=r"^step 0: rows:\d \(chosen\): completion token \d+ has logp nan"):
        check(runtime, tokenizer, WITH_REFERENCE, (policy, reference))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name, (_, scaled) in ARCHITECTURES.items() if scaled])
def test_check_when_the_head_scales_logits_otherwise_than_the_model_then_it_stops(
    name, dtype, runtime, tokenizer, monkeypatch
):
    lm = tiny_model(name, seed=0).to(dtype)
    check(runtime, tokenizer, WITH_REFERENCE, (lm, lm))
    monkeypatch.setattr(forward, "head_scaling", lambda lm: (1.0, None))
    with pytest.raises(TrainError, match=r"^step 0: rows:\d \(chosen\): .* an independent path gives"):
        check(runtime, tokenizer, WITH_REFERENCE, (lm, lm))


def test_check_when_weights_of_16_bits_hide_a_scale_then_float32_shows_it(runtime, tokenizer, capsys):
    lm = tiny_model("llama", seed=0).to(torch.bfloat16)
    bench = Bench(runtime, WITH_REFERENCE, (lm, lm), tokenizer=tokenizer)
    held = [parameter.data for parameter in bench.run.policy.parameters()]
    bench.check_first_batch(random_pairs())
    assert "agree to 0.1, in float32 to 0.001" in capsys.readouterr().out
    after = [parameter.data for parameter in bench.run.policy.parameters()]
    assert all(
        one.data_ptr() == other.data_ptr() and one.dtype == torch.bfloat16
        for one, other in zip(held, after, strict=True)
    )
    bench.run.policy._scaling = bench.run.policy._reference_scaling = (1.002, None)
    with pytest.raises(TrainError, match="an independent path gives"):
        bench.check_first_batch(random_pairs())


def test_check_when_memory_is_short_then_it_says_that_float32_was_left_out(runtime, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(step0, "free_bytes", lambda device, processes: 1000)
    lm = tiny_model("llama", seed=0).to(torch.bfloat16)
    check(runtime, tokenizer, WITH_REFERENCE, (lm, lm))
    assert "agree to 0.1 (not in float32: not enough memory)" in capsys.readouterr().out


def test_check_when_the_reference_alone_is_scored_wrong_then_it_stops(runtime, tokenizer, monkeypatch):
    lm = tiny_model("llama", seed=0)
    bench = Bench(runtime, WITH_REFERENCE, (lm, lm), tokenizer=tokenizer)
    bench.run.policy._reference_scaling = (1.0, 0.5)
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
            honest = bench.run.batcher.collate

            def shifted(self, *args, honest=honest):
                batch = honest(*args)
                if runtime.rank == 1:
                    batch.labels[0] += 1
                return batch

            bench.run.batcher.collate = types.MethodType(shifted, bench.run.batcher)
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
    assert "BOS (0) is twice at the start" in first[2]
    assert "an independent path gives" in first[3]
