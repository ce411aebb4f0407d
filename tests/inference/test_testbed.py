"""Best-of-N through the real engine, against its exact value."""

import pytest
import torch

from prefopt.evaluate.intervals import bootstrap
from prefopt.generation.base import Sampling
from prefopt.generation.transformers_engine import TransformersEngine
from prefopt.inference.test_time_po import TestTimeSettings, optimize_all
from prefopt.testbed import build_world, truth


@pytest.fixture(scope="module")
def world(worlds):
    return build_world("bandit", cache_dir=worlds)


@pytest.mark.parametrize("n", [1, 4])
def test_best_of_n_has_the_expected_reward_that_it_must_have(world, n):
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    engine = TransformersEngine(LlamaForCausalLM.from_pretrained(world.base_model_path), world.tokenizer, batch=2048)
    settings = TestTimeSettings(n=n, depth=0, sampling=Sampling(n=1, max_tokens=4))
    traces = optimize_all(world.prompts(2048, 0), engine, world.judge(), world.tokenizer, settings)
    found = bootstrap([trace.score(trace.best) for trace in traces])
    exact = float(truth.best_of_n(world.log_ref, world.reward, n).mean())
    assert found.low < exact < found.high, (found, exact)
    assert found.high - found.low < 0.15
