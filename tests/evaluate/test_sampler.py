"""Samples of a policy in training: by each kind of reference, and with thoughts before the responses."""

import contextlib
import dataclasses
import random

import numpy as np
import peft
import pytest
import torch

from prefopt import registry
from prefopt.errors import ConfigError
from prefopt.evaluate.sampler import sampler
from prefopt.evaluate.samples import score_samples
from prefopt.generation.base import Sampling, seeds_of
from prefopt.generation.transformers_engine import TransformersEngine
from prefopt.kernels.head import make_head_aware
from prefopt.rounds_method import in_rounds
from prefopt.settings import EvalConfig, GenerateConfig, KernelConfig, RunConfig
from prefopt.training.adapters import Frozen
from prefopt.training.forward import PolicyWithReference
from prefopt.types import EncodedPair
from tests.helpers import byte_bpe_tokenizer, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft calls transformers by an older name
TOKENIZER = byte_bpe_tokenizer(["name a colour: red, green or blue"], vocab_size=300)
SIZE = len(TOKENIZER)
THINKS = next(name for name in registry.names() if in_rounds(registry.get(name)()).thinks)


def pair(text, key=""):
    ids = TOKENIZER(text)["input_ids"]
    return EncodedPair(ids, [5, 1], [6, 1], [True] * 2, [True] * 2, where=text, prompt_key=key)


PAIRS = [pair("name a colour"), pair("name a colour"), pair("blue or red", "k1"), pair("red or blue", "k1"), pair("a")]


def settings(method="dpo", n=3, **generate):
    usual = GenerateConfig(max_tokens=8, **generate)
    chosen = registry.get(method)()
    return RunConfig(chosen, method, eval=EvalConfig(generate=n, batch=2), generate=usual, seed=3)


def policy_with(kind):
    """(a policy that has moved away from its reference, a plain model that says what the reference says)."""
    base = tiny_llama(SIZE, seed=1, initializer_range=0.2)
    if kind == "a frozen copy":
        return PolicyWithReference(tiny_llama(SIZE, seed=2, initializer_range=0.2), base, KernelConfig()), base
    if kind == "none":
        return PolicyWithReference(base, None, KernelConfig()), None
    lm = tiny_llama(SIZE, seed=1, initializer_range=0.2)
    make_head_aware(lm)
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    lm = peft.get_peft_model(lm, adapter)
    if kind == "the disabled adapter":
        return PolicyWithReference(lm, Frozen.BASE, KernelConfig()), base
    lm.add_adapter("reference", adapter)
    other = tiny_llama(SIZE, seed=1, initializer_range=0.2)
    other = peft.get_peft_model(other, adapter)
    state = {name: w for name, w in lm.state_dict().items() if ".reference." in name}
    missing = other.load_state_dict({n.replace(".reference.", ".default."): w for n, w in state.items()}, strict=False)
    assert not missing.unexpected_keys
    return PolicyWithReference(lm, Frozen.SNAPSHOT, KernelConfig()), other.eval()


def random_numbers():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("kind", ["a frozen copy", "the disabled adapter", "a snapshot", "none"])
def test_samples_are_those_of_policy_and_reference_asked_alone(kind):
    policy, plain = policy_with(kind)
    policy.train()
    ask = sampler(settings(), policy, TOKENIZER, PAIRS, contextlib.nullcontext)
    ids = [prompt.ids for prompt in ask.prompts]
    assert [prompt.prompt for prompt in ask.prompts] == ["name a colour", "blue or red", "a"]
    found = ask(policy.lm)
    assert policy.lm.training, "modes are given back"
    engine = TransformersEngine(policy.lm, TOKENIZER)
    sampling, seeds = Sampling(n=1, max_tokens=8), [seeds_of(3, "samples", i, 1, 1)[0] for i in range(3)]
    said = [one for (one,) in engine.generate(ids, sampling, seeds)]
    assert [row["policy"] for row in found.tables["samples"]] == [one.text.rstrip("\ufffd") for one in said]
    assert [tuple(row["policy_ids"]) for row in found.tables["samples"]] == [one.token_ids for one in said]
    assert [tuple(row["prompt_ids"]) for row in found.tables["samples"]] == ids
    if plain is None:
        assert "reference" not in found.tables["samples"][0]
        assert "samples/kl" not in found.figures
        return
    theirs = TransformersEngine(plain, TOKENIZER).generate(ids, sampling, seeds)
    assert [row["reference"] for row in found.tables["samples"]] == [one.text.rstrip("\ufffd") for (one,) in theirs]
    assert [tuple(row["reference_ids"]) for row in found.tables["samples"]] == [one.token_ids for (one,) in theirs]
    scored = score_samples(policy.lm, policy.frozen or policy.reference, list(zip(ask.prompts, said, strict=True)))
    assert found.figures["samples/kl"] == pytest.approx(scored.kl.mean(), rel=1e-5)
    assert found.figures["samples/kl"] > 0.1
    assert found.figures["samples/entropy"] == pytest.approx(scored.entropy.sum() / scored.tokens.sum(), rel=1e-5)
    assert [row["kl"] for row in found.tables["samples"]] == pytest.approx(scored.kl.tolist(), rel=1e-5)


def test_reference_is_asked_once_and_the_policy_each_time(monkeypatch):
    policy, _ = policy_with("the disabled adapter")
    asked = []
    generate = TransformersEngine.generate

    def counted(self, *args, **kwargs):
        off = self.lm.base_model.model.model.layers[0].self_attn.q_proj.disable_adapters
        asked.append("reference" if off else "policy")
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(TransformersEngine, "generate", counted)
    ask = sampler(settings(), policy, TOKENIZER, PAIRS, contextlib.nullcontext)
    one, two = ask(policy.lm), ask(policy.lm)
    assert asked == ["reference", "policy", "policy"]
    assert one == two, "the same seeds each time"


def test_sampling_draws_no_random_number_of_the_run():
    policy, _ = policy_with("a frozen copy")
    ask = sampler(settings(), policy, TOKENIZER, PAIRS, contextlib.nullcontext)
    for module in (random.seed, np.random.seed, torch.manual_seed):
        module(0)
    before = random_numbers()
    for module in (random.seed, np.random.seed, torch.manual_seed):
        module(0)
    ask(policy.lm)
    assert random_numbers() == before


def test_at_temperature_0_the_likeliest_tokens_are_said():
    policy, _ = policy_with("a frozen copy")
    greedy = sampler(settings(temperature=0.0), policy, TOKENIZER, PAIRS, contextlib.nullcontext)(policy.lm)
    other = sampler(
        dataclasses.replace(settings(temperature=0.0), seed=9), policy, TOKENIZER, PAIRS, contextlib.nullcontext
    )
    assert other(policy.lm).tables == greedy.tables


def test_thoughts_stand_beside_the_responses(monkeypatch):
    policy, _ = policy_with("a frozen copy")
    ask = sampler(settings(THINKS), policy, TOKENIZER, PAIRS, contextlib.nullcontext)
    marker = ask.config.method.format.response_marker
    texts = iter([f"first this{marker}then that", "no end in sight", f"x{marker}y"] * 2)
    answers = ask._answers
    monkeypatch.setattr(ask, "_answers", lambda lm: [dataclasses.replace(c, text=next(texts)) for c in answers(lm)])
    found = ask(policy.lm)
    rows = found.tables["samples"]
    assert [row["policy"] for row in rows] == ["then that", "[no response marker]", "y"]
    assert [row["policy_thought"] for row in rows][:2] == ["first this", "no end in sight"]
    assert [row["reference_thought"] for row in rows][2] == "x"
    assert found.figures["samples/parsed"] == pytest.approx(2 / 3)
    assert "first this" not in found.shown


def test_what_is_printed_is_short():
    policy, _ = policy_with("a frozen copy")
    long = pair("name a colour " * 40)
    found = sampler(settings(n=5), policy, TOKENIZER, [long, *PAIRS], contextlib.nullcontext)(policy.lm)
    lines = found.shown.splitlines()
    assert lines[0] == "4 held-out prompts answered, the first 3"
    assert lines[1].startswith("  prompt    ... ")
    assert lines[1].endswith("name a colour")
    assert len(lines) == 12
    assert max(map(len, lines)) <= 112


def test_nothing_held_out_is_refused():
    policy, _ = policy_with("none")
    with pytest.raises(ConfigError, match=r"^eval\.generate: found 3, but no pair is held out"):
        sampler(settings(), policy, TOKENIZER, [], contextlib.nullcontext)
