"""Divergences on samples against brute force: a model's own logits, and all that it can sample."""

import numpy as np
import peft
import pytest
import torch

from prefopt.evaluate.samples import score_samples
from prefopt.kernels.head import make_head_aware
from prefopt.training.adapters import Frozen
from prefopt.types import Completion, Prompt
from tests.helpers import tiny_llama

VOCABULARY, END, LIMIT = 6, 1, 3
PROMPT = Prompt("p", (0, 4, 2), "0" * 16, "file:1")


def completions(ids=()):
    """All that can be sampled with a limit of three tokens: what ends by itself, and what is cut."""
    if ids and (ids[-1] == END or len(ids) == LIMIT):
        return [ids]
    return [whole for token in range(VOCABULARY) for whole in completions((*ids, token))]


EVERY = [(PROMPT, Completion(ids, "", "stop" if ids[-1] == END else "length")) for ids in completions()]


def model(seed):
    return tiny_llama(VOCABULARY, seed=seed, initializer_range=0.2).double()


@pytest.fixture
def base():
    return model(0)


@pytest.fixture
def policy():
    return model(1)


def plain(policy, reference, samples):
    """Log-ratio, KL and entropy of each sample by full logits, row by row."""
    rows = []
    for prompt, completion in samples:
        ids = torch.tensor([prompt.ids + completion.token_ids])
        span = slice(len(prompt.ids) - 1, -1)
        with torch.no_grad():
            pi, ref = (m(input_ids=ids).logits[0, span].log_softmax(-1) for m in (policy, reference))
        token = torch.tensor(completion.token_ids)[:, None]
        kl, entropy = (pi.exp() * (pi - ref)).sum(), -(pi.exp() * pi).sum()
        rows.append([float((pi - ref).gather(1, token).sum()), float(kl), float(entropy)])
    return np.array(rows).T


def test_figures_when_samples_are_ragged_then_they_are_those_of_plain_logits(base, policy):
    prompts = [Prompt("p", tuple(range(1 + i % 5)), "0" * 16, f"file:{i}") for i in range(12)]
    shortest = sorted((completion for _, completion in EVERY), key=lambda completion: len(completion.token_ids))
    ragged = list(zip(prompts, shortest, strict=False))
    assert len({len(completion.token_ids) for _, completion in ragged}) == LIMIT
    found = score_samples(policy, base, ragged, batch=5)
    np.testing.assert_allclose([found.log_ratio, found.kl, found.entropy], plain(policy, base, ragged), atol=1e-9)
    assert found.tokens.tolist() == [len(c.token_ids) for _, c in ragged]
    assert found.kl.min() > 0 > found.log_ratio.min()


def test_means_when_every_completion_is_weighed_by_its_probability_then_both_are_the_exact_kl(base, policy):
    assert len(EVERY) == 1 + 5 + 5 * 5 * 6
    found = score_samples(policy, base, EVERY, batch=64)
    log_pi, log_ref = (sequence_logps(lm) for lm in (policy, base))
    pi = np.exp(log_pi)
    assert pi.sum() == pytest.approx(1)
    exact = (pi * (log_pi - log_ref)).sum()
    assert exact > 0.05, "policy and reference are too alike for a test"
    assert (pi * found.log_ratio).sum() == pytest.approx(exact)
    assert (pi * found.kl).sum() == pytest.approx(exact)
    assert (pi * found.entropy).sum() == pytest.approx(-(pi * log_pi).sum())
    assert (pi * (found.kl - exact) ** 2).sum() < (pi * (found.log_ratio - exact) ** 2).sum()


def sequence_logps(lm):
    """Log-probability of each of EVERY."""
    out = []
    for prompt, completion in EVERY:
        with torch.no_grad():
            logps = lm(input_ids=torch.tensor([prompt.ids + completion.token_ids])).logits[0].log_softmax(-1)
        places = range(len(prompt.ids) - 1, logps.shape[0] - 1)
        out.append(sum(float(logps[i, t]) for i, t in zip(places, completion.token_ids, strict=True)))
    return np.array(out)


def test_policy_when_scored_then_its_modes_and_weights_are_as_before(base, policy):
    policy.train()
    policy.model.layers[0].eval()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    score_samples(policy, base, EVERY[:3])
    assert policy.training
    assert not policy.model.layers[0].training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in policy.parameters())
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_policy_when_its_reference_is_its_own_base_then_no_second_model_is_needed(base):
    lm = model(0)
    make_head_aware(lm)
    lm = peft.get_peft_model(lm, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    few = EVERY[::20]
    found = score_samples(lm, Frozen.BASE, few)
    np.testing.assert_allclose([found.log_ratio, found.kl, found.entropy], plain(lm, base, few), atol=1e-9)
    assert found.kl.min() > 0


def test_sample_when_it_has_no_token_then_it_counts_as_zeros(base, policy):
    empty = (PROMPT, Completion((), "", "stop"))
    found = score_samples(policy, base, [EVERY[0], empty])
    assert (found.tokens.tolist(), found.kl[1], found.log_ratio[1]) == ([len(EVERY[0][1].token_ids), 0], 0, 0)
    assert found.kl[0] > 0
    assert score_samples(policy, base, []).kl.shape == (0,)
