import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from prefopt.errors import RoundError
from prefopt.generation.base import Sampling
from prefopt.generation.transformers_engine import TransformersEngine
from prefopt.settings import KernelConfig
from prefopt.training.forward import PolicyWithReference
from prefopt.training.models import recompute_activations
from tests.generation.test_sampling import assert_frequencies
from tests.helpers import tiny_llama
from tests.training.architectures import ARCHITECTURES, tiny_model


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def engine(policy, lm=None, **settings):
    return TransformersEngine(policy.lm if lm is None else lm, policy.tokenizer, **settings)


def tokens(groups):
    return [[c.token_ids for c in group] for group in groups]


WAYS = [(1, False), (3, False), (64, False), (3, True), (8, True)]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 40, "top_p": 0.9}, {"temperature": 0}], ids=str)
def test_a_completion_does_not_depend_on_what_is_beside_it_in_float64(policy, sampling):
    lm = copy.deepcopy(policy.lm).double()
    sampling = Sampling(n=2, max_tokens=16, logprobs=True, **sampling)
    results = [
        engine(policy, lm, batch=batch, continuous=continuous).generate(policy.prompts, sampling, policy.seeds)
        for batch, continuous in WAYS
    ]
    for other in results[1:]:
        assert tokens(other) == tokens(results[0])
        for a, b in zip(itertools.chain(*results[0]), itertools.chain(*other), strict=True):
            assert a.logps == pytest.approx(b.logps, abs=1e-12)
    (alone,) = engine(policy, lm).generate(policy.prompts[5:6], sampling, policy.seeds[5:6])
    assert tokens([alone]) == tokens(results[0][5:6])
    lengths = {len(c.token_ids) for c in itertools.chain(*results[0])}
    assert len(lengths) > 3 or not sampling.temperature, "the completions must be ragged for this to say anything"


@pytest.mark.parametrize("continuous", [False, True])
def test_each_prompt_is_told_once_when_the_last_of_its_completions_has_ended(policy, continuous):
    told, counted = {}, []

    def done(number, completions):
        assert number not in told
        told[number] = completions
        counted.append(len(told))
        if len(told) == 4:
            raise RuntimeError("what is told is kept")

    sampling = Sampling(n=3, max_tokens=16)
    with pytest.raises(RuntimeError, match="what is told is kept"):
        engine(policy, batch=8, continuous=continuous).generate(policy.prompts, sampling, policy.seeds, done)
    whole = engine(policy, batch=8, continuous=continuous).generate(policy.prompts, sampling, policy.seeds)
    assert len(told) == 4
    assert told == {number: whole[number] for number in told}


@pytest.mark.parametrize("continuous", [False, True])
def test_the_same_call_gives_the_same_completions_to_the_bit(policy, continuous):
    sampling = Sampling(n=3, max_tokens=16, logprobs=True)
    once, again = (
        engine(policy, batch=8, continuous=continuous).generate(policy.prompts, sampling, policy.seeds) for _ in "12"
    )
    assert once == again


def test_completion_i_draws_with_seed_plus_i(policy):
    lm = copy.deepcopy(policy.lm).double()
    five = engine(policy, lm).generate(policy.prompts[:1], Sampling(n=5, max_tokens=8), [40])[0]
    one = engine(policy, lm).generate(policy.prompts[:1], Sampling(n=1, max_tokens=8), [43])[0]
    assert five[3].token_ids == one[0].token_ids
    assert len({c.token_ids for c in five}) == 5


def test_a_larger_limit_only_makes_completions_longer(policy):
    lm = copy.deepcopy(policy.lm).double()
    short, long = (
        engine(policy, lm).generate(policy.prompts, Sampling(n=2, max_tokens=m), policy.seeds) for m in (4, 9)
    )
    for a, b in zip(itertools.chain(*short), itertools.chain(*long), strict=True):
        assert b.token_ids[:4] == a.token_ids
        assert (a.finish_reason == "length") == (len(b.token_ids) > 4 or b.token_ids[-1] != 1)


def exact(lm, ids, length):
    """Log-probabilities of every sequence of `length` tokens after `ids`, by whole forward passes, (V,) * length."""
    logps = torch.log_softmax(lm(torch.tensor([ids])).logits[0, -1].double(), -1)
    if length == 1:
        return logps
    return torch.stack([logp + exact(lm, [*ids, t], length - 1) for t, logp in enumerate(logps)])


@torch.no_grad()
def test_completions_come_as_often_as_the_model_says(policy):
    lm = tiny_llama(7, hidden=16, layers=1, seed=1, initializer_range=0.4, eos_token_id=None)
    tokenizer = SimpleNamespace(
        eos_token_id=None, added_tokens_decoder={}, decode=lambda ids, **_: " ".join(map(str, ids))
    )
    draws, prompt = 4000, [0, 3, 5]
    got = TransformersEngine(lm, tokenizer, batch=1000).generate([prompt], Sampling(n=draws, max_tokens=2), [0])[0]
    counts = np.zeros((7, 7))
    for completion in got:
        counts[completion.token_ids] += 1
    assert_frequencies(counts.ravel(), exact(lm, prompt, 2).exp().numpy().ravel())


@torch.no_grad()
def test_log_probabilities_are_the_models_own_whatever_the_sampling(policy):
    sampling = Sampling(n=2, temperature=0.5, top_p=0.9, max_tokens=12, logprobs=True)
    for prompt, group in zip(
        policy.prompts, engine(policy, batch=5).generate(policy.prompts, sampling, policy.seeds), strict=True
    ):
        for c in group:
            ids = torch.tensor([[*prompt, *c.token_ids]])
            logps = policy.lm(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            expected = logps.gather(-1, torch.tensor(c.token_ids)[:, None])[:, 0]
            assert c.logps == pytest.approx(expected.tolist(), abs=2e-5)
    assert engine(policy).generate(policy.prompts[:1], Sampling(n=1, max_tokens=2), [0])[0][0].logps is None


def shrunken(name):
    """A tiny model of an architecture; layers with a window have one that the completions leave behind."""
    lm = tiny_model(name, 0).eval()
    if getattr(lm.config, "sliding_window", None):
        lm.config.sliding_window = 8
        for module in lm.modules():
            if getattr(module, "sliding_window", None):
                module.sliding_window = 8
    return lm


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("continuous", [False, True])
def test_greedy_tokens_are_those_of_transformers_own_generate(policy, name, continuous):
    lm = shrunken(name)
    lm.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=2)
    vocabulary = lm.config.vocab_size
    prompts = [[token % vocabulary for token in prompt] for prompt in policy.prompts[:6]]
    tokenizer = SimpleNamespace(eos_token_id=None, added_tokens_decoder={}, decode=lambda ids, **_: "")
    ours = TransformersEngine(lm, tokenizer, batch=4, continuous=continuous)
    got = ours.generate(prompts, Sampling(n=1, temperature=0, max_tokens=20), [0] * 6)
    for prompt, (completion,) in zip(prompts, got, strict=True):
        ids = torch.tensor([prompt])
        theirs = lm.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
        assert list(completion.token_ids) == theirs[0, len(prompt) :].tolist()


def test_stop_texts_and_every_terminator_of_generation_config_and_template_end_a_completion(policy):
    lm = copy.deepcopy(policy.lm)
    turn = policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
    free = Sampling(n=4, max_tokens=40)
    whole = engine(policy, lm).generate(policy.prompts, free, policy.seeds)
    usual = next(t for t, n in _counted(whole) if policy.tokenizer.decode([t]).isascii() and t > 10 and n > 5)
    lm.generation_config.eos_token_id = [1, usual]
    stopped = engine(policy, lm).generate(policy.prompts, free, policy.seeds)
    ended_there = {1: 0, turn: 0, usual: 0}
    for a, b in zip(itertools.chain(*whole), itertools.chain(*stopped), strict=True):
        at = next((i for i, t in enumerate(a.token_ids) if t in (1, turn, usual)), None)
        assert b.token_ids == a.token_ids[: None if at is None else at + 1]
        assert b.finish_reason == ("length" if at is None else "stop")
        if at is not None:
            ended_there[b.token_ids[-1]] += 1
    assert min(ended_there.values()) > 0

    lm.generation_config.eos_token_id = 1
    text = policy.tokenizer.decode([usual])
    stopped = engine(policy, lm, batch=3).generate(
        policy.prompts, Sampling(n=4, max_tokens=40, stop=(text,)), policy.seeds
    )
    cut = 0
    for a, b in zip(itertools.chain(*whole), itertools.chain(*stopped), strict=True):
        assert b.text == a.text.split(text)[0]
        assert a.token_ids[: len(b.token_ids)] == b.token_ids
        cut += text in a.text
    assert cut


def _counted(groups):
    ids, counts = np.unique([t for g in groups for c in g for t in c.token_ids], return_counts=True)
    return sorted(zip(ids.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1])


def test_training_finds_the_model_as_it_was(policy):
    lm = tiny_llama(len(policy.tokenizer), attention_dropout=0.5)
    lm.train()
    lm.model.layers[0].eval()
    recompute_activations(lm)
    modes = [m.training for m in lm.modules()]
    state = torch.get_rng_state()
    sampling = Sampling(n=1, max_tokens=6, logprobs=True)
    one, two = (engine(policy, lm).generate(policy.prompts, sampling, policy.seeds) for _ in "12")
    assert one == two, "dropout was on"
    assert [m.training for m in lm.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state), "the run's own random numbers were used"
    assert all(p.grad is None and p.requires_grad for p in lm.parameters())


@pytest.mark.filterwarnings("ignore")
def test_a_policy_with_an_adapter_answers_with_it(policy):
    import peft

    lm = tiny_llama(
        len(policy.tokenizer), hidden=64, seed=3, initializer_range=0.2, num_attention_heads=2, num_key_value_heads=1
    )
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(lm, lora)
    wrapped = PolicyWithReference(adapted.double(), None, KernelConfig())
    sampling = Sampling(n=2, max_tokens=10, logprobs=True)
    with_adapter = engine(policy, wrapped.lm, batch=7).generate(policy.prompts, sampling, policy.seeds)
    merged = engine(policy, adapted.merge_and_unload()).generate(policy.prompts, sampling, policy.seeds)
    assert tokens(with_adapter) == tokens(merged)
    plain = engine(policy).generate(policy.prompts, sampling, policy.seeds)
    assert tokens(with_adapter) != tokens(plain)


def test_a_head_that_was_made_head_aware_answers_as_before(policy):
    sampling = Sampling(n=2, max_tokens=10, logprobs=True)
    plain = engine(policy).generate(policy.prompts, sampling, policy.seeds)
    wrapped = PolicyWithReference(copy.deepcopy(policy.lm), None, KernelConfig())
    assert engine(policy, wrapped.lm).generate(policy.prompts, sampling, policy.seeds) == plain


def test_a_completion_ends_with_the_positions_of_the_model(policy):
    lm = tiny_model("gpt-2, absolute positions", 0)
    lm.generation_config.eos_token_id = None
    tokenizer = SimpleNamespace(eos_token_id=None, added_tokens_decoder={}, decode=lambda ids, **_: "")
    ours = TransformersEngine(lm, tokenizer, batch=4)
    prompts = [[1] * length for length in (63, 40, 3)]
    got = ours.generate(prompts, Sampling(n=1, max_tokens=30), [0, 10, 20])
    assert [len(group[0].token_ids) for group in got] == [1, 24, 30]
    assert {group[0].finish_reason for group in got} == {"length"}
    with pytest.raises(RoundError, match=r"1 of 2 prompts fill the model's 64 positions .*64 tokens.*max_length"):
        ours.generate([[1] * 64, [1]], Sampling(n=1), [0, 10])
    with pytest.raises(RoundError, match=r"prompt without a token"):
        ours.generate([[]], Sampling(n=1), [0])


def test_weights_that_are_not_finite_are_named_not_sampled_from(policy):
    lm = copy.deepcopy(policy.lm)
    lm.lm_head.weight.data[5] = float("nan")
    for temperature in (0, 1):
        with pytest.raises(RoundError, match=r"logits are not finite after 0 tokens"):
            engine(policy, lm).generate([[0, 5]], Sampling(n=1, temperature=temperature), [0])


def test_nothing_is_asked_and_nothing_is_answered(policy):
    assert engine(policy).generate([], Sampling(n=2), []) == []


def test_models_that_cannot_be_sampled_from_this_way_are_refused(policy, monkeypatch):
    from transformers import MambaConfig, MambaForCausalLM

    lm = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4))
    with pytest.raises(RoundError, match=r"MambaForCausalLM has no key-value cache.*--generate.engine vllm"):
        engine(policy, lm)


@pytest.mark.filterwarnings("ignore")
def test_a_cache_with_recurrent_states_works_in_batches_and_is_refused_continuous(policy):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "lfm2",
        vocab_size=len(policy.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config).double().eval()
    assert any(not hasattr(layer, "keys") for layer in DynamicCache(config=config).layers)
    sampling = Sampling(n=2, max_tokens=10)
    many, one = (engine(policy, lm, batch=b).generate(policy.prompts, sampling, policy.seeds) for b in (5, 1))
    assert tokens(many) == tokens(one)
    with pytest.raises(RoundError, match=r"generate.continuous: Lfm2ForCausalLM has a cache"):
        engine(policy, lm, continuous=True)


def test_what_decides_the_completions_is_described(policy):
    described = engine(policy, batch=3, continuous=True).describe()
    assert described["engine"] == "transformers"
    assert (described["dtype"], described["batch"], described["continuous"]) == ("float32", 3, True)
    assert described["autocast"] is None
    with torch.autocast("cpu", torch.bfloat16):
        assert engine(policy).describe()["autocast"] == "bfloat16"
    assert described["versions"]["torch"] == torch.__version__
