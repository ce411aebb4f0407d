"""Mixture-of-experts: the router's loss is that of the whole step however it is cut; experts compute under autocast."""

from dataclasses import replace

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from prefopt.data.collate import collate
from prefopt.data.layouts import LAYOUTS
from prefopt.errors import ConfigError
from prefopt.settings import LoraConfig, ModelConfig, RunConfig
from prefopt.training import adapter_loading, adapters, experts, model_sources
from tests.helpers import tiny_llama
from tests.invariant.steps import VOCAB, Bench, difference, random_pairs
from tests.invariant.two_terms import TwoTerms

METHOD = TwoTerms()
PAIRS = random_pairs(METHOD.needs.columns)
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


def tiny_mixtral(seed=0, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MixtralForCausalLM(MixtralConfig(**SIZES, max_position_embeddings=64, **settings)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape)
    return model


def models():
    """In float64, which transformers' grouped product is not made for."""
    both = tiny_mixtral(0).double(), tiny_mixtral(1).double()
    for model in both:
        model.set_experts_implementation("eager")
    return both


def bench(runtime, weight, layout="padded", **how):
    return Bench(runtime, METHOD, models(), layout=layout, model=ModelConfig(router_aux_weight=weight), **how)


@pytest.fixture(scope="module")
def whole(runtime):
    """(loss, gradients) of a step of one pass."""
    return bench(runtime, 0.5).step(PAIRS, 8)


def test_router_loss_of_a_pass_is_that_of_transformers_without_padding(runtime, whole):
    plain = bench(runtime, 0.0).step(PAIRS, 8)
    policy = models()[0]
    batch = collate(PAIRS, pad_id=2, columns=("trust",))
    out = policy.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        output_router_logits=True,
    )
    expected = load_balancing_loss_func(out.router_logits, 4, 2, batch.attention_mask)
    assert int(batch.attention_mask.sum()) < batch.attention_mask.numel()
    assert whole[0] - plain[0] == pytest.approx(0.5 * expected.item(), rel=1e-6)
    names = [name for name, _ in policy.named_parameters() if "gate.weight" in name]
    gradients = torch.autograd.grad(0.5 * expected, [dict(policy.named_parameters())[name] for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        assert torch.allclose(whole[1][name] - plain[1][name], gradient.double(), atol=1e-6)


@pytest.mark.parametrize(("micro", "layout"), [(1, "padded"), (3, "padded"), *((3, layout) for layout in LAYOUTS[1:])])
def test_router_loss_is_the_same_in_micro_batches_and_layouts(micro, layout, runtime, whole):
    found = bench(runtime, 0.5, layout)
    gap, where = difference(whole, found.step(PAIRS, micro))
    assert gap <= 1e-6, where  # Mixtral's routers take their softmax in float32
    assert found.line["aux_loss"] > 1  # E sum f P is 1 where all experts are used alike


def test_router_loss_is_the_same_with_recomputed_activations(runtime, whole):
    one = Bench(runtime, METHOD, models(), model=ModelConfig(router_aux_weight=0.5, gradient_checkpointing=True)).step(
        PAIRS, 4
    )
    assert difference(whole, one)[0] <= 1e-6


def test_weight_is_the_familys_own_where_none_is_given():
    config = MixtralConfig(**SIZES, router_aux_loss_coef=0.07)
    assert experts.router_weight(config, None) == 0.07
    assert experts.router_weight(config, 0.2) == 0.2
    assert experts.router_weight(config, 0.0) == 0.0
    assert experts.router_weight(tiny_llama(50).config, None) == 0.0
    with pytest.raises(ConfigError, match=r"model.router_aux_weight: found 0.2, but models of type llama"):
        experts.router_weight(tiny_llama(50).config, 0.2)


def test_experts_compute_in_16_bits_under_autocast_and_their_weights_stay_as_they_are():
    model = tiny_mixtral()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    experts.follow_autocast(model)
    seen = []
    for module in experts.stacked_experts(model).values():
        module.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    ids = torch.arange(8)[None]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids).logits.float().square().mean()
    assert seen == [torch.bfloat16] * 2
    loss.backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "expert" in n
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(ids)
    assert seen[2:] == [torch.float32] * 2


def test_first_lines_say_that_an_adapter_leaves_routed_experts_out(tmp_path):
    tiny_mixtral().save_pretrained(tmp_path)
    config = RunConfig(
        method=METHOD, method_name="under_test", model=ModelConfig(path=str(tmp_path)), lora=LoraConfig(r=2)
    )
    start = model_sources.find(str(tmp_path), config.model)
    lm = adapter_loading.load_policy(config, start, model_sources.choose_reference(config, start))
    count = sum(p.numel() for name, p in lm.named_parameters() if ".experts." in name)
    assert f"adapter: none on routed experts ({count:,} weights in 2 stacked modules)" in adapters.remarks(lm)[0]
    assert not any("experts" in name for name, p in lm.named_parameters() if p.requires_grad)
    plain = adapter_loading.load_policy(replace(config, lora=LoraConfig()), start, None)
    assert adapters.remarks(plain) == []
