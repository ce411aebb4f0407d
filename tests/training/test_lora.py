"""LoRA: the adapter's formula by plain autograd, each kind of reference, and what is opened, continued and refused.

Adapters are written by peft itself, so that what is read here is what others write.
"""

import copy
import json
import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from prefopt.errors import ConfigError, TrainError
from prefopt.settings import KernelConfig, LoraConfig, ModelConfig, ReferenceConfig, RunConfig
from prefopt.training import adapter_checks, adapter_loading, adapter_saving, adapters, model_sources, models
from prefopt.training.adapters import Frozen
from prefopt.training.attention import Rows
from prefopt.training.forward import PolicyWithReference
from prefopt.training.metrics import read_lines
from tests.dist.ranks import run_ranks
from tests.helpers import byte_bpe_tokenizer
from tests.invariant.methods import by_kind, methods
from tests.invariant.oracle import oracle_step
from tests.invariant.steps import Bench, difference, random_pairs, two_models
from tests.training.architectures import tiny_model

METHODS = methods()
TOKEN = next(name for name, m in METHODS.items() if m.needs.reference == "token")
NO_REFERENCE = next(
    name for name, m in METHODS.items() if m.needs.reference == "none" and m.needs.output == "token_stats"
)
BOUND = 1e-9
RANK, ALPHA = 4, 6
TARGETS = ("q_proj", "v_proj", "down_proj")


def perturb(lm, seed, size=0.1):
    """Move what is trained away from where it starts; an adapter begins as nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)
    return lm


def write_adapter(folder, base, seed, **settings):
    """An adapter that peft trained elsewhere: its weights are far from zero."""
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    usual = {"task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm = peft.get_peft_model(lm, peft.LoraConfig(**{**usual, **settings}))
        perturb(lm, seed).save_pretrained(folder)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders: `base`, `tied`, `other` are models; `adapter`, `headed` (with a trained head), `second` are adapters."""
    root = tmp_path_factory.mktemp("places")
    other, base = two_models(torch.float64)
    tied = two_models(torch.float64, tied=True)[1]
    for name, lm in (("base", base), ("other", other), ("tied", tied)):
        lm.save_pretrained(root / name)
    write_adapter(root / "adapter", root / "base", 1)
    write_adapter(root / "second", root / "base", 2)
    write_adapter(root / "headed", root / "base", 3, modules_to_save=["lm_head"])
    return root


def config(method, path, reference=None, dtype="float64", seed=0, **lora):
    return RunConfig(
        method=method,
        method_name="under_test",
        model=ModelConfig(path=str(path), dtype=dtype),
        reference=ReferenceConfig(path=None if reference is None else str(reference)),
        lora=LoraConfig(**lora),
        seed=seed,
    )


def both(settings):
    """(policy, reference) as a run with these settings starts, the policy some steps on."""
    start = model_sources.find(settings.model.path, settings.model)
    reference = model_sources.choose_reference(settings, start)
    policy = perturb(adapter_loading.load_policy(settings, start, reference), seed=7)
    if isinstance(reference, model_sources.ModelSource):
        reference = adapter_loading.load_frozen(reference, settings.model, "reference.path")
    return policy, reference


class Written:
    """A plain model whose weights are written as W + s B A, s from the settings: the formula, without peft's layers.

    It is what the oracle takes for a policy: called with ids, and asked for the gradients of what is trained.
    """

    def __init__(self, base, tensors, scale, prefix="", adapter=".default"):
        self.base, self.scale = (
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).requires_grad_(False),
            scale,
        )
        self.leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
        self.suffix = adapter

    def __call__(self, input_ids):
        weights, plain = {}, dict(self.base.named_parameters(remove_duplicate=False))
        for name, tensor in self.leaves.items():
            layer = name.removeprefix("base_model.model.")
            if ".lora_A" in layer:
                target = layer.partition(".lora_A")[0] + ".weight"
                change = self.leaves[name.replace("lora_A", "lora_B")] @ tensor
                same_way = (
                    plain[target].shape == change.shape and "c_" not in target
                )  # GPT-2 holds weights turned round
                weights[target] = plain[target] + self.scale * (change if same_way else change.T)
            elif ".lora_B" not in layer:
                weights[layer.replace(".modules_to_save" + self.suffix, "")] = tensor
        return functional_call(self.base, weights, kwargs={"input_ids": input_ids}, tie_weights=False)

    def named_parameters(self):
        return self.leaves.items()

    def zero_grad(self, set_to_none=True):
        for leaf in self.leaves.values():
            leaf.grad = None


def written(policy, base, scale=ALPHA / RANK):
    return Written(base, {n: p for n, p in policy.named_parameters() if p.requires_grad}, scale)


def read(folder, base, scale=ALPHA / RANK):
    """The model that an adapter's folder means, from its bytes."""
    return Written(base, load_file(folder / "adapter_model.safetensors"), scale, adapter="")


# Each reference, for every method -------------------------------------------------------------------------------------

# what is named -> (model, reference, whether LoRA settings are given, the reference by the oracle)
REFERENCES = {
    "new adapter": ("base", None, True, lambda at: plain(at / "base")),
    "new adapter, reference named as the model": ("base", "base", True, lambda at: plain(at / "base")),
    "new adapter, other weights": ("base", "other", True, lambda at: plain(at / "other")),
    "new adapter, an adapter as reference": ("base", "second", True, lambda at: read(at / "second", at / "base")),
    "trained adapter": ("adapter", None, False, lambda at: read(at / "adapter", at / "base")),
    "trained adapter, its base": ("adapter", "base", False, lambda at: plain(at / "base")),
    "trained adapter, another": ("adapter", "second", False, lambda at: read(at / "second", at / "base")),
    "trained adapter and head": ("headed", None, False, lambda at: read(at / "headed", at / "base")),
    "trained adapter and head, their base": ("headed", "base", False, lambda at: plain(at / "base")),
    "all weights, an adapter as reference": ("base", "adapter", None, lambda at: read(at / "adapter", at / "base")),
}
EACH = ("new adapter", "new adapter, other weights", "trained adapter and head")  # for every method
LORA = {"r": RANK, "alpha": ALPHA, "target_modules": TARGETS}


def with_reference(name):
    return METHODS[name].needs.reference != "none"


def plain(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "what"),
    [(TOKEN, what) for what in REFERENCES]
    + [way for way in by_kind(METHODS, EACH) if way.values[0] != TOKEN and with_reference(way.values[0])]
    + [(NO_REFERENCE, "trained adapter")],
)
def test_step_when_any_reference_then_loss_and_gradients_are_those_of_two_plain_models(name, what, runtime, places):
    method = METHODS[name]
    model, reference, lora, expected_reference = REFERENCES[what]
    settings = config(method, places / model, reference and places / reference, **(LORA if lora else {}))
    models_ = both(settings)
    pairs = random_pairs(method.needs.columns)
    policy = models_[0] if lora is None else written(models_[0], places / "base")
    expected = oracle_step(copy.deepcopy(policy) if lora is None else policy, expected_reference(places), method, pairs)
    found = Bench(runtime, method, models_).step(pairs, 3)
    gap, where = difference(expected, found)
    assert gap <= BOUND, f"{where} differs by {gap:.2e}"


@pytest.mark.parametrize("what", ["tied", "tied, head trained whole", "head trained whole", "rslora", "small tiles"])
def test_step_when_a_new_adapter_of_any_kind_then_loss_and_gradients_are_those_of_two_plain_models(
    what, runtime, places
):
    base = places / ("tied" if "tied" in what else "base")
    lora = LORA | ({"modules_to_save": ("lm_head",)} if "whole" in what else {}) | {"use_rslora": "rslora" in what}
    method, scale = METHODS[TOKEN], ALPHA / RANK ** (0.5 if "rslora" in what else 1)
    models_ = both(config(method, base, **lora))
    assert models_[1] is Frozen.BASE
    pairs = random_pairs(method.needs.columns)
    expected = oracle_step(written(models_[0], base, scale), plain(base), method, pairs)
    assert ("base_model.model.lm_head.modules_to_save.default.weight" in expected[1]) == ("whole" in what)
    tiles = (4, 16) if "tiles" in what else (1024, 8192)
    gap, where = difference(expected, Bench(runtime, method, models_, tiles).step(pairs, 8))
    assert gap <= BOUND, f"{where} differs by {gap:.2e}"


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_step_when_activations_are_recomputed_then_nothing_changes(what, runtime, places):
    method = METHODS[TOKEN]
    policy, reference = both(config(method, places / what, **(LORA if what == "base" else {})))
    pairs = random_pairs(method.needs.columns)
    expected = Bench(runtime, method, (policy, reference)).step(pairs, 3)
    models.recompute_activations(policy)
    bench = Bench(runtime, method, (policy, reference))
    calls = []
    layer = adapters.base_of(bench.run.policy.lm).model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    assert difference(expected, bench.step(pairs, 3))[0] <= 1e-12
    assert calls == [False, True, True] * 3, "the reference once, the policy twice"


@pytest.mark.parametrize("name", ["gpt-2, absolute positions", "phi, head with a bias", "cohere, scale"])
def test_step_when_another_architecture_then_loss_and_gradients_are_those_of_two_plain_models(name, runtime, tmp_path):
    tiny_model(name, seed=0).double().save_pretrained(tmp_path)
    method = METHODS[TOKEN]
    models_ = both(config(method, tmp_path, r=RANK, alpha=ALPHA))
    pairs = random_pairs(method.needs.columns)
    expected = oracle_step(written(models_[0], tmp_path), plain(tmp_path), method, pairs)
    gap, where = difference(expected, Bench(runtime, method, models_).step(pairs, 3))
    assert gap <= BOUND, f"{where} differs by {gap:.2e}"


BY_NEED = {method.needs.reference: name for name, method in METHODS.items()}.values()  # one method of each kind


def _on_two(runtime, root):
    answers = {}
    for name in BY_NEED:
        method = METHODS[name]
        for what in ("base", "headed"):
            models_ = both(config(method, root / what, **(LORA if what == "base" else {})))
            bench = Bench(runtime, method, models_)
            answers[name, what] = [bench.step(random_pairs(method.needs.columns, n), 2) for n in (8, 1)]
    return answers


def test_step_when_two_processes_then_loss_and_gradients_are_those_of_two_plain_models(places):
    ranks = run_ranks(_on_two, places)
    for name in BY_NEED:
        method = METHODS[name]
        for what, reference in (("base", plain(places / "base")), ("headed", read(places / "headed", places / "base"))):
            policy = both(config(method, places / what, **(LORA if what == "base" else {})))[0]
            for n, found in zip((8, 1), zip(*(answers[name, what] for answers in ranks), strict=True), strict=True):
                pairs = random_pairs(method.needs.columns, n)
                expected = oracle_step(written(policy, places / "base"), reference, method, pairs)
                for rank, one in enumerate(found):
                    gap, where = difference(expected, one)
                    assert gap <= BOUND, f"{name}, {what}, {n} pairs, rank {rank}: {where} differs by {gap:.2e}"


# What the policy holds ------------------------------------------------------------------------------------------------


def test_reference_when_it_is_under_the_disabled_adapter_then_both_share_one_head(places):
    policy, reference = both(config(METHODS[TOKEN], places / "base", **LORA))
    model = PolicyWithReference(policy, reference, KernelConfig())
    rows = Rows(torch.tensor([[0, 7, 8]]), torch.ones(1, 3), torch.arange(3)[None], None)
    request = model._reference_request(rows, torch.tensor([0, 1]))
    assert request["ref_weight"] is model.get_output_embeddings().weight
    names = [name for name, _ in model.named_parameters() if "lora" not in name]
    assert len(names) == len(list(plain(places / "base").parameters())), "a second copy of the base is held"


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_policy_when_the_reference_has_been_asked_then_it_trains_what_it_trained(what, places):
    policy, reference = both(config(METHODS[TOKEN], places / what, **(LORA if what == "base" else {})))
    model = PolicyWithReference(policy, reference, KernelConfig())
    before = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert before
    assert all(".default." in name for name in before)
    own = policy(input_ids=torch.tensor([[0, 7, 8]])).logits
    with torch.no_grad(), model.as_reference() as lm:
        other = lm(input_ids=torch.tensor([[0, 7, 8]])).logits
    assert (own - other).abs().max() > 1e-3
    assert torch.equal(policy(input_ids=torch.tensor([[0, 7, 8]])).logits, own)
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == before


def test_new_adapter_when_made_again_then_it_depends_on_the_seed_alone(places):
    def weights(seed):
        torch.rand(3)
        settings = config(METHODS[TOKEN], places / "base", seed=seed, **LORA)
        lm = adapter_loading.load_policy(settings, model_sources.find(settings.model.path, settings.model), Frozen.BASE)
        return {name: p for name, p in lm.named_parameters() if "lora_A" in name}

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_policy_when_it_is_resumed_then_it_is_the_checkpoint_and_its_reference_is_not(places, tmp_path):
    settings = config(METHODS[TOKEN], places / "headed")
    lm, _ = both(settings)
    adapter_saving.save(lm, tmp_path)
    start = model_sources.find(settings.model.path, settings.model)
    resumed = adapter_loading.load_policy(settings, start, Frozen.SNAPSHOT, resume_from=tmp_path)
    ids = torch.tensor([[0, 7, 8]])
    assert torch.equal(resumed(input_ids=ids).logits, lm(input_ids=ids).logits)
    order = [name for name, p in lm.named_parameters() if p.requires_grad]  # the optimizer's state is kept by number
    assert [name for name, p in resumed.named_parameters() if p.requires_grad] == order
    with torch.no_grad(), PolicyWithReference(resumed, Frozen.SNAPSHOT, KernelConfig()).as_reference() as reference:
        expected = read(places / "headed", places / "base")(ids).logits
        assert (reference(input_ids=ids).logits - expected).abs().max() < 1e-12


def test_dropout_when_trained_then_it_is_the_policys_alone(places):
    settings = config(METHODS[TOKEN], places / "adapter", dropout=0.5)
    policy, reference = both(settings)
    model = PolicyWithReference(policy, reference, KernelConfig()).train()
    ids = torch.tensor([[0, 7, 8]])
    with torch.no_grad():
        assert not torch.equal(policy(input_ids=ids).logits, policy(input_ids=ids).logits)
        with model.as_reference() as lm:
            assert torch.equal(lm(input_ids=ids).logits, lm(input_ids=ids).logits)
        model.eval()
        assert torch.equal(policy(input_ids=ids).logits, policy(input_ids=ids).logits)


def test_step_0_when_the_policy_has_an_adapter_then_policy_and_reference_are_checked(runtime, places, capsys):
    method = next(m for m in METHODS.values() if m.needs.reference == "token" and m.loss_at_reference() is not None)
    tokenizer = byte_bpe_tokenizer(["any text"], vocab_size=300)
    settings = config(method, places / "headed")
    start = model_sources.find(settings.model.path, settings.model)
    lm = adapter_loading.load_policy(settings, start, Frozen.SNAPSHOT)
    Bench(runtime, method, (lm, Frozen.SNAPSHOT), tokenizer=tokenizer).check_first_batch(random_pairs())
    assert f"loss {method.loss_at_reference():.4f} as expected" in capsys.readouterr().out
    with pytest.raises(TrainError, match=r"^step 0: rows:\d: the loss is .* while policy and reference are the same"):
        Bench(runtime, method, (lm, Frozen.BASE), tokenizer=tokenizer).check_first_batch(random_pairs())


# Whole runs -----------------------------------------------------------------------------------------------------------

RUN = {"lora__r": 4, "lora__alpha": 8, "train__max_steps": 6, "eval__every": 6, "optim__lr": 3e-2}


@pytest.fixture(scope="module")
def trained(server, command, tmp_path_factory):
    """A finished run with a new adapter, and what it said."""
    output = tmp_path_factory.mktemp("lora") / "first"
    ended = server.train(command(TOKEN.partition("-")[0], output, **RUN))
    assert ended.status == 0, ended.err
    return SimpleNamespace(output=output, said=ended.out)


def evals(output):
    return [line for line in read_lines(output / "metrics.jsonl") if line["split"] == "eval"]


def test_run_when_it_has_an_adapter_then_it_says_what_is_trained_and_compared(trained, task):
    count = sum(w.numel() for w in load_file(trained.output / "model/adapter_model.safetensors").values())
    assert f" parameters, {count:,} of them trained (LoRA r 4, alpha 8 on down_proj, gate_proj, k_proj, o_proj, " in (
        trained.said
    )
    assert f"\nreference: the base weights under the disabled adapter (no second copy), {task.model}\n" in trained.said
    card = json.loads((trained.output / "run_card.json").read_text())
    assert card["reference"]["is"].startswith("the base weights under the disabled adapter")
    assert card["reference"]["sha256"] == card["model"]["sha256"]
    assert evals(trained.output)[-1]["loss"] < 0.9 * evals(trained.output)[0]["loss"]


@pytest.mark.parametrize("opener", [peft.AutoPeftModelForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize("part", ["model", "checkpoints/step_00000006"])
def test_run_when_finished_then_any_loader_opens_what_it_trained(opener, part, trained, task, monkeypatch, tmp_path):
    folder = trained.output / part
    weights = load_file(folder / "adapter_model.safetensors")
    merged = plain(task.model)
    parameters = dict(merged.named_parameters())
    with torch.no_grad():
        for name, a in weights.items():
            if "lora_A" in name:
                layer = name.removeprefix("base_model.model.").partition(".lora_A")[0] + ".weight"
                parameters[layer] += 8 / 4 * weights[name.replace("lora_A", "lora_B")].double() @ a.double()
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm = opener.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[0, 30, 40, 50]])
    assert (lm(input_ids=ids).logits - merged(input_ids=ids).logits).abs().max() < 1e-4
    assert (plain(task.model)(input_ids=ids).logits - merged(input_ids=ids).logits).abs().max() > 1e-2
    assert not [p for p in trained.output.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("reference", [None, "base"])
def test_run_when_it_starts_from_a_trained_adapter_then_policy_and_reference_honour_it(
    reference, trained, server, command, task, tmp_path
):
    named = {} if reference is None else {"reference__path": task.model}
    argv = command(
        TOKEN.partition("-")[0],
        tmp_path / "run",
        model__path=trained.output / "model",
        **named,
        **{k: v for k, v in RUN.items() if not k.startswith("lora")},
    )
    ended = server.train(argv)
    assert ended.status == 0, ended.err
    last, first = evals(trained.output)[-1], evals(tmp_path / "run")[0]
    assert last["kl/chosen"] > 1e-3
    assert first["logps/chosen"] == pytest.approx(last["logps/chosen"], rel=1e-5)
    card = json.loads((tmp_path / "run/run_card.json").read_text())
    assert card["model"]["base"] == str(task.model)
    if reference is None:
        assert first["kl/chosen"] == pytest.approx(0, abs=1e-6)
        assert "\nreference: a frozen snapshot of the adapter that the policy starts from " in ended.out
        assert card["reference"]["sha256"] == card["model"]["sha256"] != card["model"]["base_sha256"]
    else:
        assert first["kl/chosen"] == pytest.approx(last["kl/chosen"], rel=1e-3)
        assert "\nreference: the base weights under the disabled adapter " in ended.out
        assert card["reference"]["sha256"] == card["model"]["base_sha256"]
    assert set(load_file(tmp_path / "run/model/adapter_model.safetensors")) == set(
        load_file(trained.output / "model/adapter_model.safetensors")
    )


def test_head_when_trained_whole_beside_a_tied_embedding_then_it_is_saved_and_continued(places, tmp_path):
    settings = config(METHODS[TOKEN], places / "tied", **LORA, modules_to_save=("lm_head",))
    lm, _ = both(settings)
    adapter_saving.save(lm, tmp_path)
    again = config(METHODS[TOKEN], tmp_path)
    start = model_sources.find(again.model.path, again.model)
    other = adapter_loading.load_policy(again, start, model_sources.choose_reference(again, start))
    ids = torch.tensor([[0, 7, 8]])
    assert torch.equal(other(input_ids=ids).logits, lm(input_ids=ids).logits)
    model = PolicyWithReference(other, Frozen.SNAPSHOT, KernelConfig())
    with torch.no_grad(), model.as_reference() as reference:
        assert torch.equal(reference(input_ids=ids).logits, lm(input_ids=ids).logits)


# Refusals -------------------------------------------------------------------------------------------------------------


def check(settings):
    start = model_sources.find(settings.model.path, settings.model)
    adapter_checks.check(settings, start, models.load_config(start.base, settings.model))


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"alpha": 8}, "lora.alpha: found 8 without lora.r; name the rank (--lora.r 16) to turn LoRA on"),
        ({"dropout": 0.1}, "lora.dropout: found 0.1 without lora.r; name the rank (--lora.r 16) to turn LoRA on"),
        (
            {"r": 4, "target_modules": ("q_porj",)},
            "lora.target_modules: 'q_porj' is no module of LlamaForCausalLM; did you mean 'q_proj'?; its linear layers "
            "are down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj",
        ),
        (
            {"r": 4, "target_modules": ("q_proj", "lm_head")},
            "lora.target_modules: 'lm_head' is the output head, which takes no adapter; train it whole "
            "(--lora.modules_to_save lm_head) or leave it out",
        ),
        (
            {"r": 4, "target_modules": ("embed_tokens",)},
            "lora.target_modules: 'embed_tokens' is a Embedding, expected linear layers, such as down_proj, gate_proj, "
            "k_proj, lm_head, o_proj, q_proj, up_proj, v_proj",
        ),
        (
            {"r": 4, "modules_to_save": ("lm_heat",)},
            "lora.modules_to_save: 'lm_heat' is no module of LlamaForCausalLM; did you mean 'lm_head'?",
        ),
    ],
)
def test_settings_when_they_cannot_be_then_one_line_says_so(lora, said, places):
    with pytest.raises(ConfigError) as caught:
        check(config(METHODS[TOKEN], places / "base", **lora))
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"r": 8}, f"lora.r: found 8, but model.path '{{}}' holds an adapter with {RANK}"),
        ({"alpha": 8}, f"lora.alpha: found 8, but model.path '{{}}' holds an adapter with {ALPHA}"),
        ({"use_rslora": True}, "lora.use_rslora: found True, but model.path '{}' holds an adapter with none"),
        (
            {"target_modules": ("q_proj",)},
            "lora.target_modules: found q_proj, but model.path '{}' holds an adapter with down_proj,q_proj,v_proj",
        ),
        (
            {"modules_to_save": ("lm_head",)},
            "lora.modules_to_save: found lm_head, but model.path '{}' holds an adapter with none",
        ),
    ],
)
def test_settings_when_a_trained_adapter_contradicts_them_then_one_line_says_so(lora, said, places):
    with pytest.raises(ConfigError) as caught:
        check(config(METHODS[TOKEN], places / "adapter", **lora))
    assert str(caught.value) == said.format(places / "adapter") + ", which is continued; leave it out"
    check(config(METHODS[TOKEN], places / "adapter", **LORA, dropout=0.1))  # what is true of it may be said


def edited(folder, to, **changes):
    """A copy of an adapter whose settings say something else."""
    to.mkdir()
    save_file(load_file(folder / "adapter_model.safetensors"), to / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(settings | changes))
    return to


def test_settings_when_they_deny_what_the_adapter_has_then_one_line_says_so(places, tmp_path):
    stable = edited(places / "adapter", tmp_path / "stable", use_rslora=True)
    with pytest.raises(ConfigError, match=r"lora.use_rslora: found False, but model.path .* an adapter with True"):
        check(config(METHODS[TOKEN], stable, use_rslora=False))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bias": "all"}, "was trained with bias 'all', which changes the weights below it that the reference reads"),
        ({"init_lora_weights": "pissa"}, "was started by 'pissa', which changes the base weights below it"),
        ({"base_model_name_or_path": None}, "names no base model, expected base_model_name_or_path in"),
        ({"base_model_name_or_path": "./gone"}, "is an adapter of './gone', which does not exist; name the model's"),
        ({"peft_type": "NO"}, "is not readable"),
    ],
)
def test_adapter_when_it_cannot_be_exact_then_it_is_refused_before_it_is_loaded(changes, said, places, tmp_path):
    folder = edited(places / "adapter", tmp_path / "edited", **changes)
    for key in ("model.path", "reference.path"):
        with pytest.raises(TrainError, match=f"^{key}: ") as caught:
            model_sources.find(str(folder), ModelConfig(), key)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_adapter_when_it_is_of_another_kind_then_it_is_refused(places, tmp_path):
    peft.IA3Config(base_model_name_or_path=str(places / "base")).save_pretrained(tmp_path)
    with pytest.raises(TrainError, match=r"^model.path: the adapter '.*' is a IA3 adapter, expected a LoRA adapter$"):
        model_sources.find(str(tmp_path), ModelConfig())


def test_adapter_when_its_base_holds_an_adapter_too_then_it_is_refused(places, tmp_path):
    below = str(places / "second")
    folder = edited(places / "adapter", tmp_path / "above", base_model_name_or_path=below)
    with pytest.raises(TrainError, match=f"names '{below}' as its base model, which holds an adapter itself"):
        model_sources.find(str(folder), ModelConfig())


def test_adapter_when_it_does_not_fit_its_base_then_it_is_refused(places, tmp_path):
    settings = config(METHODS[NO_REFERENCE], edited(places / "adapter", tmp_path / "less"))
    path = tmp_path / "less" / "adapter_model.safetensors"
    whole = load_file(path)
    gone = sorted(whole)[0]
    for spoil, said in (
        ({k: v for k, v in whole.items() if k != gone}, "is missing"),
        (whole | {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 32)}, "is unknown"),
        (whole | {gone: whole[gone] * float("nan")}, "is not finite"),
    ):
        save_file(spoil, path)
        with pytest.raises(TrainError, match=r"^model.path: the adapter '.*' does not fit LlamaForCausalLM: .*") as e:
            adapter_loading.load_policy(settings, model_sources.find(settings.model.path, settings.model), None)
        assert said in str(e.value)


@pytest.mark.parametrize("key", ["model.path", "reference.path"])
def test_adapter_when_a_part_of_it_is_on_the_head_then_it_is_refused(key, places, tmp_path):
    for what in (["lm_head", "q_proj"], r".*\.(q_proj|v_proj)|lm_head"):
        folder = tmp_path / str(len(what))
        write_adapter(folder, places / "base", 4, target_modules=what)
        weights = model_sources.find(str(folder), ModelConfig())
        with pytest.raises(TrainError, match=f"^{key}: the adapter .*the output head"):
            adapter_loading.load_frozen(weights, ModelConfig(dtype="float64"), key)


def test_run_when_a_target_is_misspelt_then_it_stops_before_the_data_is_read(server, command, tmp_path):
    ended = server.train(command("dpo", tmp_path / "run", lora__r=4, lora__target_modules="q_proj,w_proj"))
    assert ended.status == 2
    assert ended.err.startswith("error: lora.target_modules: 'w_proj' is no module of LlamaForCausalLM; did you mean ")
    assert ended.err.count("\n") == 1
    assert "pairs" not in ended.out
