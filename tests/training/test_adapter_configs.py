"""Adapters whose settings peft cannot build or whose files do not fit, and what peft can do that LoRA alone cannot."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from prefopt.errors import ConfigError, TrainError
from prefopt.kernels.head import HeadRequest
from prefopt.settings import KernelConfig, ModelConfig, parse
from prefopt.training import adapter_checks, adapter_loading, adapter_saving, adapters, model_sources, models
from prefopt.training.adapters import Frozen
from prefopt.training.forward import PolicyWithReference
from tests.helpers import tiny_llama

IDS = torch.arange(1, 9)[None]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for tied in (False, True):
        name = "tied" if tied else "untied"
        tiny_llama(40, hidden=16, layers=1, tie_word_embeddings=tied).save_pretrained(root / name)
        torch.manual_seed(0)
        lm = models.load_model(str(root / name), ModelConfig())
        of = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}
        with adapters.quiet_peft():
            adapted = peft.get_peft_model(lm, peft.LoraConfig(**of))
            with torch.no_grad():
                for weight in adapted.parameters():
                    weight += 0.2 * weight.requires_grad * torch.randn(weight.shape)
            adapted.save_pretrained(root / f"{name}_tokens", save_embedding_layers=False)
            torch.save(adapted(IDS).logits.detach(), root / f"{name}.pt")
    write(root / "untied_tokens", root / "untied_tokens", base_model_name_or_path=str(root / "untied"))
    write(root / "tied_tokens", root / "tied_tokens", base_model_name_or_path=str(root / "tied"))
    return root


def write(source, folder, **changes):
    """A copy of an adapter whose config says something else."""
    if source != folder:
        shutil.copytree(source, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def settings(path, *more):
    return parse(["--method", "dpo", "--model.path", str(path), "--data.train", "x", *more])


def check(path, *more):
    config = settings(path, *more)
    start = model_sources.find(str(path), config.model)
    adapter_checks.check(config, start, models.load_config(start.base, config.model))


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": -1},
        {"r": 10**12},
        {"r": "two"},
        {"r": None},
        {"target_modules": "*["},
        {"target_modules": ["no_such"]},
        {"target_modules": None},
        {"target_modules": 7},
        {"layers_to_transform": [9]},
        {"lora_alpha": "much"},
        {"rank_pattern": {"q_proj": -2}},
        {"rank_pattern": {"q_proj": 7}},
        {"modules_to_save": ["no_such"]},
        {"trainable_token_indices": [10**9]},
        {"lora_dropout": 7},
        {"peft_type": "NOPE"},
        {"peft_type": None},
    ],
    ids=str,
)
def test_adapter_when_peft_cannot_build_what_it_says_then_one_line_before_weights_are_loaded(
    changes, places, tmp_path, monkeypatch
):
    monkeypatch.setattr(models, "_load", None)
    folder = write(places / "untied_tokens", tmp_path / "adapter", **changes)
    with pytest.raises((TrainError, ConfigError), match=r"^model.path: ") as error:
        check(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("text", ["[1]", "{", "null", '"x"'])
def test_adapter_when_its_config_is_no_object_then_one_line(text, places, tmp_path):
    folder = shutil.copytree(places / "untied_tokens", tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(TrainError, match=r"^model.path: .*adapter_config.json") as error:
        check(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("alpha", [0, -2, "4", float("inf")])
def test_adapter_when_its_alpha_trains_nothing_then_one_line(alpha, places, tmp_path):
    folder = write(places / "untied_tokens", tmp_path / "adapter", lora_alpha=alpha)
    with pytest.raises(TrainError, match=f"adapter '.*' has lora_alpha {alpha!r}, expected a number above 0"):
        model_sources.find(str(folder), ModelConfig())


def test_adapter_when_its_weights_are_whole_numbers_then_it_is_refused(places, tmp_path):
    folder = write(places / "untied_tokens", tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    save_file({name: weight.to(torch.int8) for name, weight in load_file(file).items()}, file, {"format": "pt"})
    config = settings(folder)
    with pytest.raises(TrainError, match=r"does not fit .* holds whole numbers, expected floating-point weights"):
        adapter_loading.load_policy(config, model_sources.find(str(folder), config.model), None)


def test_adapter_when_a_shape_in_its_file_is_anothers_then_it_is_named_before_weights_are_loaded(places, tmp_path):
    folder = shutil.copytree(places / "untied_tokens", tmp_path / "adapter")
    held = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in held if "lora_A" in name)
    save_file(held | {name: torch.ones(3, 16)}, folder / "adapter_model.safetensors")
    with pytest.raises(TrainError, match=f"{name} has another shape"):
        check(folder)


# Rows of an embedding that are trained --------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [Frozen.SNAPSHOT, Frozen.BASE])
@pytest.mark.parametrize("name", ["untied", "tied"])
def test_trained_tokens_when_continued_then_statistics_gradients_and_files_are_pefts(name, which, places, tmp_path):
    config = settings(places / f"{name}_tokens")
    check(places / f"{name}_tokens")
    start = model_sources.find(config.model.path, config.model)
    lm = adapter_loading.load_policy(config, start, which)
    assert "and 2 rows of the embedding" in adapters.describe_policy(lm)
    logits = torch.load(places / f"{name}.pt")
    assert torch.allclose(lm(IDS).logits, logits, atol=1e-6)
    policy = PolicyWithReference(lm, which, KernelConfig())
    base = models.load_model(str(places / name), ModelConfig())(IDS).logits
    with torch.no_grad(), policy.as_reference() as reference:
        assert torch.allclose(reference(IDS).logits, logits if which is Frozen.SNAPSHOT else base, atol=1e-6)

    def gradients(logps):
        lm.zero_grad()
        logps.sum().backward()
        return {name: weight.grad.clone() for name, weight in lm.named_parameters() if weight.grad is not None}

    labels = torch.tensor([3, 5, 6, 7, 3, 1, 2, 5])
    states = lm.get_base_model().model(IDS).last_hidden_state[0]
    mine = gradients(lm.get_output_embeddings()(states, request=HeadRequest(labels=labels))[0])
    theirs = gradients(lm(IDS).logits[0].log_softmax(-1).gather(-1, labels[:, None]))
    assert any("trainable_tokens_delta" in weight for weight in mine)
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[weight], theirs[weight], atol=1e-5) for weight in mine)

    with torch.no_grad():
        for weight in lm.parameters():
            weight += 0.1 * weight.requires_grad
    adapter_saving.save(lm, tmp_path, dict(adapter_saving.tensors(lm)))
    again = adapter_loading.load_policy(config, start, which, tmp_path)
    assert torch.equal(again(IDS).logits, lm(IDS).logits)
    adapter_saving.merge(again, tmp_path, config.model)
    adapter_saving.save_merged(again, tmp_path / "merged")
    merged = models.load_model(str(tmp_path / "merged"), ModelConfig())
    assert torch.allclose(merged(IDS).logits, lm(IDS).logits, atol=1e-6)


def test_run_when_it_trains_tokens_of_a_tied_model_and_is_killed_then_it_ends_as_the_straight_one(
    server, command, task, tmp_path
):
    few = {"hidden": 16, "layers": 1, "tie_word_embeddings": True}
    tiny_llama(len(task.tokenizer), **few).save_pretrained(tmp_path / "base")
    task.tokenizer.save_pretrained(tmp_path / "base")
    lm = models.load_model(str(tmp_path / "base"), ModelConfig())
    of = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "trainable_token_indices": [1, 70, 71]}
    with adapters.quiet_peft():
        peft.get_peft_model(lm, peft.LoraConfig(**of)).save_pretrained(tmp_path / "start", save_embedding_layers=False)
    made = {}
    for name in ("straight", "killed"):
        argv = command("dpo", tmp_path / name, model__path=tmp_path / "start", train__max_steps=4, train__save_every=2)
        if name == "killed":
            fault = {"at": "prefopt.training.trainer:Trainer._step", "count": 4, "do": "SIGKILL"}
            assert server.train(argv, fault).status == -9
        ended = server.train(argv)
        assert ended.status == 0, ended.err
        made[name] = load_file(tmp_path / name / "model/adapter_model.safetensors")
    tokens = next(name for name in made["straight"] if "trainable_tokens_delta" in name)
    begun = load_file(tmp_path / "start/adapter_model.safetensors")[tokens]
    assert (made["straight"][tokens] - begun).abs().max() > 1e-3
    assert made["straight"].keys() == made["killed"].keys()
    assert all(torch.equal(made["straight"][name], made["killed"][name]) for name in made["straight"])


# All linear layers ----------------------------------------------------------------------------------------------------


def test_all_linear_when_named_then_it_is_all_layers_but_the_head(places):
    path = places / "untied"
    check(path, "--lora.r", "2", "--lora.target_modules", "all-linear")
    found = []
    for more in (("--lora.target_modules", "all-linear"), ()):
        config = settings(path, "--lora.r", "2", *more)
        lm = adapter_loading.load_policy(config, model_sources.find(str(path), config.model), Frozen.BASE)
        found.append({name for name, weight in lm.named_parameters() if weight.requires_grad})
    assert found[0] == found[1]
    with pytest.raises(ConfigError, match="'all-linear' is given with other names"):
        check(path, "--lora.r", "2", "--lora.target_modules", "all-linear,q_proj")


def test_policy_when_its_backbone_has_another_name_then_the_reason_is_given():
    from transformers import AutoConfig, AutoModelForCausalLM

    few = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    few |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "intermediate_size_mlp": 16}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **few, pad_token_id=None))
    with pytest.raises(TrainError, match="Llama4ForCausalLM names 'language_model' as its backbone"):
        PolicyWithReference(lm, None, KernelConfig())
