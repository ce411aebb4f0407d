"""Injected faults: the comparison that the equality tests make and the check before the first step catch each one."""

import re
from dataclasses import replace

import pytest
import torch

from prefopt.data.encoder import Encoder
from prefopt.errors import TrainError
from prefopt.training import batching
from prefopt.types import EncodedPair, PairRow
from tests.helpers import byte_bpe_tokenizer, tiny_llama
from tests.invariant.faults import COLLATOR_FAULTS
from tests.invariant.methods import methods
from tests.invariant.oracle import oracle_step
from tests.invariant.steps import BOUNDS, Bench, difference, random_pairs, two_models

METHOD = next(m for m in methods().values() if m.needs.reference == "token")
PAIRS = random_pairs(METHOD.needs.columns)
TEXTS = [("Name a colour:", " red", " blue, as far as I know"), ("And a fruit?", " A pear.", " No.")]

each_fault = pytest.mark.parametrize("fault", COLLATOR_FAULTS, ids=lambda fault: fault.__name__)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_bpe_tokenizer([" ".join(text) for text in TEXTS], vocab_size=300)


def bench(runtime, models, tokenizer=None):
    return Bench(runtime, METHOD, models, tokenizer=tokenizer)


# By the collator.


@each_fault
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_comparison_when_the_collator_has_a_fault_then_it_is_far_beyond_the_bound(fault, dtype, runtime, monkeypatch):
    models = two_models(dtype)
    expected = oracle_step(*models, METHOD, PAIRS)
    assert difference(expected, bench(runtime, models).step(PAIRS, 3))[0] <= BOUNDS[dtype]
    monkeypatch.setattr(batching, "collate", fault)
    assert difference(expected, bench(runtime, models).step(PAIRS, 3))[0] > 1000 * BOUNDS[dtype]


@each_fault
def test_step_0_when_the_collator_has_a_fault_then_the_run_stops_and_names_the_row(
    fault, runtime, tokenizer, monkeypatch
):
    _, reference = two_models(torch.float32)
    ready = bench(runtime, (reference, reference), tokenizer)
    ready.check_first_batch(PAIRS)
    monkeypatch.setattr(batching, "collate", fault)
    with pytest.raises(TrainError, match=r"^step 0: rows:\d \((chosen|rejected)\): .* an independent path gives") as e:
        ready.check_first_batch(PAIRS)
    only_rejected = fault.__name__ in ("position_leaked", "chosen_leaked", "token_hidden")
    assert not only_rejected or "(rejected)" in str(e.value)


# By the encoder.


@pytest.fixture
def faulty_encoder(monkeypatch):
    """The encoder lets a BOS stand that the text or the template has written before its own, and does not see it."""
    honest = Encoder._checked

    def doubled(self, *args):
        cut = honest(self, *args)
        return replace(cut, pair=replace(cut.pair, prompt_ids=[self.bos, *cut.pair.prompt_ids]))

    def turn_on():
        monkeypatch.setattr(Encoder, "_checked", doubled)

    return turn_on


def encoded(tokenizer):
    return [Encoder(tokenizer, 64).pair(PairRow(*text, {}, f"rows:{i + 1}")) for i, text in enumerate(TEXTS)]


def by_hand(tokenizer):
    """The rows as the tokenizer itself would have them: BOS and text, then the completion's tokens and EOS."""
    pairs = []
    for prompt, *sides in TEXTS:
        head = tokenizer(prompt)["input_ids"]
        tails = [[*tokenizer(prompt + side)["input_ids"][len(head) :], tokenizer.eos_token_id] for side in sides]
        pairs.append(EncodedPair(head, *tails, *([True] * len(tail) for tail in tails)))
    return pairs


def test_comparison_when_the_encoder_doubles_bos_then_it_is_far_beyond_the_bound(runtime, tokenizer, faulty_encoder):
    models = [tiny_llama(len(tokenizer), seed=seed).double() for seed in (0, 1)]
    expected = oracle_step(*models, METHOD, by_hand(tokenizer))
    assert difference(expected, bench(runtime, models).step(encoded(tokenizer), 2))[0] <= 1e-9
    faulty_encoder()
    assert difference(expected, bench(runtime, models).step(encoded(tokenizer), 2))[0] > 1e-6


def test_step_0_when_the_encoder_doubles_bos_then_the_run_stops_and_names_the_row(runtime, tokenizer, faulty_encoder):
    lm = tiny_llama(len(tokenizer))
    ready = bench(runtime, (lm, lm), tokenizer)
    ready.check_first_batch(encoded(tokenizer))
    faulty_encoder()
    with pytest.raises(TrainError, match=re.escape("step 0: rows:1: prompt: BOS (0) is twice at the start")):
        ready.check_first_batch(encoded(tokenizer))
