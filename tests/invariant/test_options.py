"""What saves memory or time changes no number: recomputed, offloaded, quantised, compiled, with an adapter or not."""

import copy

import pytest
import torch

from prefopt.data.layouts import LAYOUTS, shares_prompts
from prefopt.errors import TrainError
from prefopt.settings import ModelConfig
from prefopt.training import offload, quantized
from tests.dist.ranks import run_ranks
from tests.helpers import byte_bpe_tokenizer
from tests.invariant.adapted import adapted_policy
from tests.invariant.methods import by_kind, methods, representatives
from tests.invariant.oracle import oracle_step
from tests.invariant.precise import models_of, precise
from tests.invariant.steps import BOUNDS, Bench, difference, random_pairs, two_models

METHODS = methods()
KINDS = representatives(METHODS)
TOKEN = next(name for name, m in METHODS.items() if m.needs.reference == "token")
SCORES = next(name for name, m in METHODS.items() if m.needs.output == "scores")
OPTIONS = {
    "recomputed": {"gradient_checkpointing": True},
    "offloaded": {"offload_activations": True},
    "recomputed and offloaded": {"gradient_checkpointing": True, "offload_activations": True},
}
WIDEST = "recomputed and offloaded"

# all options together for every method, each by itself for every kind of forward pass
each_option = pytest.mark.parametrize(
    ("name", "option"),
    [*((name, WIDEST) for name in METHODS), *by_kind(METHODS, [option for option in OPTIONS if option != WIDEST])],
)


@pytest.fixture(autouse=True)
def offload_all(monkeypatch):
    monkeypatch.setattr(offload, "SMALL", 0)  # the models are so small that all would stay where it is


@pytest.fixture(scope="module")
def plain():
    return models_of("llama", torch.float64)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    two_models(torch.float32)[0].save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapted(base):
    """By dtype, output and quantisation: (policy with an adapter, reference)."""
    made = {}

    def ask(method, dtype="float64", quantize=None):
        key = (method.needs.output, method.needs.reference == "none", dtype, quantize)
        if key not in made:
            policy, reference = adapted_policy(method, ModelConfig(path=str(base), dtype=dtype, quantize=quantize))
            made[key] = precise(policy) if dtype == "float64" else policy, reference
        return made[key]

    return ask


def layouts_of(name):
    """All layouts for each kind of forward pass, the last one for other methods."""
    found = layouts_for(METHODS[name])
    return found if name in KINDS else found[-1:]


def layouts_for(method):
    return [layout for layout in LAYOUTS if method.needs.rows == "pairs" or not shares_prompts(layout)]


def options(name, **more):
    return {"model": ModelConfig(**OPTIONS.get(name, {}), **more)}


def assert_equal(expected, found, dtype, what):
    gap, where = difference(expected, found)
    assert gap <= BOUNDS[dtype], f"{what}: {where} differs by {gap:.2e}"


@pytest.mark.parametrize(("name", "option"), by_kind(METHODS, OPTIONS))
def test_step_when_activations_are_recomputed_or_offloaded_then_the_oracles_in_any_layout(name, option, runtime, plain):
    method, rows = METHODS[name], random_pairs(METHODS[name].needs.columns)
    expected = oracle_step(*plain, method, rows)
    for layout in layouts_of(name):
        bench = Bench(runtime, method, plain, layout=layout, **options(option))
        assert_equal(expected, bench.step(rows, 3), torch.float64, f"{option}, {layout}")
        assert "offload" not in option or bench.run.policy.saved_tensors_context.copied > 0


@each_option
def test_step_when_an_adapter_trains_and_activations_are_recomputed_or_offloaded_then_the_same_step(
    name, option, runtime, adapted
):
    # that the step without these is right: tests/training/test_lora.py
    method, rows = METHODS[name], random_pairs(METHODS[name].needs.columns, 5)
    models = adapted(method)
    expected = Bench(runtime, method, models).step(rows, 3)
    for layout in layouts_of(name):
        found = Bench(runtime, method, models, layout=layout, **options(option)).step(rows, 3)
        assert_equal(expected, found, torch.float64, f"{option}, {layout}")


def _on_two(runtime, path):
    offload.SMALL = 0
    answers = {}
    for name, method in METHODS.items():
        if name not in KINDS:
            continue
        policy, reference = adapted_policy(method, ModelConfig(path=path, dtype="float64"))
        models = precise(policy), reference
        rows = random_pairs(method.needs.columns, 5)
        for layout in layouts_for(method)[::3]:
            answers[name, layout] = Bench(runtime, method, models, layout=layout, **options(WIDEST)).step(rows, 2)
    return answers


@pytest.fixture(scope="module")
def ranks(base):
    return run_ranks(_on_two, str(base))


@pytest.mark.parametrize("name", [name for name in METHODS if name in KINDS])
def test_step_when_two_processes_recompute_and_offload_under_an_adapter_then_the_same_step_on_both(
    name, ranks, runtime, adapted
):
    method = METHODS[name]
    expected = Bench(runtime, method, adapted(method)).step(random_pairs(method.needs.columns, 5), 3)
    for answers in ranks:
        for layout in layouts_for(method)[::3]:
            assert_equal(expected, answers[name, layout], torch.float64, layout)


# What is offloaded.


def test_offloading_when_products_are_autocast_then_no_weight_is_copied_and_no_tensor_twice():
    torch.manual_seed(0)
    part = torch.nn.Sequential(torch.nn.Linear(48, 64, bias=False), torch.nn.Tanh(), torch.nn.Linear(64, 8, bias=False))
    side = torch.nn.Linear(48, 64, bias=False)
    x = torch.randn(2, 5, 48)

    def gradients(around):
        with torch.autocast("cpu", torch.bfloat16), around:
            out = part(x).sum() + side(x).sum()
        return torch.autograd.grad(out, [*part.parameters(), *side.parameters()])

    hooks = offload.Offloading(torch.nn.ModuleList([part, side]), pin_memory=False)
    plain, found = gradients(torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)), gradients(hooks)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    # autocast rounds x for two products; the tanh's outcome is saved by itself and by the product after it
    assert hooks.copied == 2 * (2 * x.numel() + 10 * 64)


def test_offloading_when_the_step_is_done_then_no_copy_is_kept(runtime, plain):
    method = METHODS[TOKEN]
    bench = Bench(runtime, method, plain, **options("offloaded"))
    bench.step(random_pairs(method.needs.columns), 3)
    hooks = bench.run.policy.saved_tensors_context
    parameters = sum(p.numel() * p.element_size() for p in bench.run.policy.lm.parameters())
    first = hooks.copied
    bench.step(random_pairs(method.needs.columns), 3)
    assert hooks.copied == 2 * first > parameters / 4
    assert not hooks.copies


# Quantised.


def as_plain(lm):
    """A copy in which each quantised layer is a plain one with the weights that it computes with."""
    import bitsandbytes

    lm = copy.deepcopy(lm)
    for module in [*lm.modules()]:
        for name, child in [*module.named_children()]:
            if quantized.quantization_type(child) is not None and isinstance(child, bitsandbytes.nn.Linear4bit):
                weight = bitsandbytes.functional.dequantize_4bit(child.weight.data, child.weight.quant_state)
                layer = torch.nn.Linear(*reversed(weight.shape), bias=child.bias is not None)
                layer.weight = torch.nn.Parameter(weight, requires_grad=False)
                setattr(module, name, layer)
    return lm


@pytest.mark.parametrize(("name", "quantize"), [*by_kind(METHODS, ["nf4"]), (TOKEN, "fp4")])
def test_step_when_the_base_is_quantised_then_that_of_the_weights_it_computes_with(name, quantize, runtime, adapted):
    pytest.importorskip("bitsandbytes")
    method, rows = METHODS[name], random_pairs(METHODS[name].needs.columns, 5)
    policy, reference = adapted(method, "float32", quantize)
    assert sum(quantized.quantization_type(m) == quantize for m in policy.modules()) == 14
    written = as_plain(policy)
    assert not any(quantized.quantization_type(m) for m in written.modules())
    expected = Bench(runtime, method, (written, reference)).step(rows, 3)
    far = Bench(runtime, method, adapted(method, "float32")).step(rows, 3)
    assert difference(far, expected)[0] > 1e-2, "quantised weights are others"
    for layout in layouts_for(method):
        bench = Bench(runtime, method, (policy, reference), layout=layout, **options(WIDEST))
        # an evaluation before the step, after which bitsandbytes would compute in another way
        bench.run.model.eval()
        with torch.no_grad():
            bench.run.model.lm(input_ids=torch.tensor([[5, 6, 7]]))
        assert_equal(expected, bench.step(rows, 3), torch.float32, layout)


def test_check_when_the_base_is_quantised_then_it_holds_and_a_fault_is_seen(runtime, base):
    pytest.importorskip("bitsandbytes")
    tokenizer = byte_bpe_tokenizer(["any text"], vocab_size=300)
    model = ModelConfig(path=str(base), quantize="nf4")
    for name in (TOKEN, SCORES):
        policy, reference = adapted_policy(METHODS[name], model)
        for weight_name, weight in policy.named_parameters():
            if "lora_" in weight_name:
                torch.nn.init.zeros_(weight)
        bench = Bench(runtime, METHODS[name], (policy, reference), tokenizer=tokenizer)
        bench.check_first_batch(random_pairs(METHODS[name].needs.columns))
        layer = [m for m in bench.run.policy.lm.modules() if quantized.quantization_type(m)][-1]
        plain = layer.forward
        layer.forward = lambda x, plain=plain: plain(x) + (x.shape[0] > 1)  # another outcome in a batch than alone
        with pytest.raises(TrainError, match="an independent path gives"):
            bench.check_first_batch(random_pairs(METHODS[name].needs.columns))


# Compiled.


@pytest.mark.filterwarnings("ignore")  # torch's own, about its own code
@pytest.mark.parametrize("name", [TOKEN, *(pytest.param(n, marks=pytest.mark.slow) for n in METHODS if n != TOKEN)])
def test_step_when_layers_are_compiled_then_the_same_step_in_few_graphs(name, runtime, adapted):
    from torch._dynamo.utils import counters

    method, rows = METHODS[name], random_pairs(METHODS[name].needs.columns)
    models, layout = adapted(method, "float32"), layouts_for(method)[-1]
    expected = Bench(runtime, method, models).step(rows, 3)
    bench = Bench(runtime, method, models, layout=layout, compile=True)
    assert_equal(expected, bench.step(rows, 3), torch.float32, layout)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for micro in (1, 8, 2):  # other widths, other units, no other graphs
        assert_equal(expected, bench.step(rows, micro), torch.float32, f"{layout}, {micro} at a time")
    assert counters["stats"]["unique_graphs"] == graphs
    assert not [n for n, _ in bench.run.policy.lm.named_parameters() if "_orig_mod" in n]


def _compiled_on_two(runtime, path):
    method = METHODS[TOKEN]
    models = adapted_policy(method, ModelConfig(path=path))
    bench = Bench(runtime, method, models, layout=layouts_for(method)[-1], compile=True)
    return bench.step(random_pairs(method.needs.columns, 5), 2)


@pytest.mark.slow
def test_step_when_layers_are_compiled_on_two_processes_then_the_same_step_on_both(runtime, adapted, base):
    method = METHODS[TOKEN]
    expected = Bench(runtime, method, adapted(method, "float32")).step(random_pairs(method.needs.columns, 5), 3)
    for found in run_ranks(_compiled_on_two, str(base)):
        assert_equal(expected, found, torch.float32, "compiled")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("option", ["nothing", *OPTIONS])
@pytest.mark.parametrize("what", ["whole", "adapter"])
def test_step_when_layers_are_compiled_and_activations_recomputed_or_offloaded_then_the_same_step(
    what, option, runtime, adapted
):
    method, rows = METHODS[TOKEN], random_pairs(METHODS[TOKEN].needs.columns)
    models = two_models(torch.float32) if what == "whole" else adapted(method, "float32")
    expected = Bench(runtime, method, models).step(rows, 3)
    for layout in ("padded", "packed_prefix_shared"):
        bench = Bench(runtime, method, models, layout=layout, compile=True, **options(option))
        for micro in (3, 1):
            assert_equal(expected, bench.step(rows, micro), torch.float32, f"{layout}, {micro} at a time")
