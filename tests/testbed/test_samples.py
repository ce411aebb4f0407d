"""What is estimated on samples is what the world computes exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from prefopt.evaluate.samples import score_samples
from prefopt.testbed.bandit import Bandit
from prefopt.types import Completion, Prompt


def test_kl_on_every_response_is_the_exact_one(world: Bandit, base: torch.nn.Module) -> None:
    policy = AutoModelForCausalLM.from_pretrained(world.base_model_path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    prompt = Prompt("", tuple(world.prompt_ids[3]), "0" * 16, "world:1")
    every = [(prompt, Completion(tuple(ids), "", "stop")) for ids in world.response_ids]
    found = score_samples(policy, base, every, batch=512)
    log_pi, log_ref = (world.log_probs(lm)[3].numpy() for lm in (policy, base))
    pi, outside = np.exp(log_pi[:-1]), float(np.exp(log_pi[-1]))
    exact = (pi * (log_pi - log_ref)[:-1]).sum()
    assert outside < 2e-3, "the policy of this test has left the world"
    assert exact > 0.05, "policy and reference are too alike for a test"
    assert (pi * found.log_ratio).sum() == pytest.approx(exact, rel=1e-4)
    assert (pi * found.kl).sum() == pytest.approx(exact, abs=20 * outside)  # it knows of what leaves the world
    assert (pi * found.entropy).sum() == pytest.approx(-(pi * log_pi[:-1]).sum(), abs=20 * outside)
