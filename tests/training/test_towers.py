"""What no text reaches is frozen and takes no adapter; what text reaches is left alone, experts without a token too."""

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config, LlamaConfig, LlamaForCausalLM

from prefopt.errors import ConfigError
from prefopt.settings import LoraConfig, ModelConfig, RunConfig
from prefopt.training import adapter_checks, adapter_loading, adapter_saving, model_sources, towers
from prefopt.training.models import load_config
from tests.helpers import tiny_llama
from tests.invariant.two_terms import TwoTerms

TOWERS = ("model.vision_tower", "model.multi_modal_projector")


def tiny_gemma3(vocab_size):
    """A Gemma 3 with a vision tower whose leaf names, q_proj and so on, are those of its text layers too."""
    text = {"vocab_size": vocab_size, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma3") / "model"
    tiny_gemma3(60).save_pretrained(folder)
    return folder


def run_config(model, **lora):
    return RunConfig(
        method=TwoTerms(), method_name="under_test", model=ModelConfig(path=str(model)), lora=LoraConfig(**lora)
    )


def policy(config):
    start = model_sources.find(config.model.path, config.model)
    return adapter_loading.load_policy(config, start, model_sources.choose_reference(config, start))


def test_towers_are_frozen_when_a_wrapper_is_loaded_and_the_text_model_is_trained(gemma3):
    lm = policy(run_config(gemma3))
    assert towers.unreached_by_text(lm) == TOWERS
    frozen = {name for name, p in lm.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in lm.named_parameters() if name.startswith(TOWERS)}
    loss = lm.base_model(input_ids=torch.arange(5)[None]).last_hidden_state.sum()
    loss.backward()
    assert all(p.grad is not None for p in lm.parameters() if p.requires_grad)


def test_towers_take_no_adapter_and_its_file_names_them(gemma3, tmp_path):
    lm = policy(run_config(gemma3, r=2))
    names = [name for name, p in lm.named_parameters() if p.requires_grad]
    assert names
    assert not any("tower" in name or "projector" in name for name in names)
    adapter_saving.save(lm, tmp_path / "adapter")
    again = policy(run_config(tmp_path / "adapter"))  # continued
    assert [name for name, p in again.named_parameters() if p.requires_grad] == names


@pytest.mark.parametrize("setting", ["target_modules", "modules_to_save"])
def test_lora_setting_that_names_a_part_of_a_tower_is_refused(gemma3, setting):
    name = {"target_modules": "patch_embedding", "modules_to_save": "multi_modal_projector"}[setting]
    config = run_config(gemma3, r=2, **{setting: (name,)})
    start = model_sources.find(config.model.path, config.model)
    with pytest.raises(ConfigError, match=f"lora.{setting}: '{name}' is a part that text does not reach"):
        adapter_checks.check(config, start, load_config(str(gemma3), config.model))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # which peft asks for
def test_adapter_that_has_parts_on_a_tower_is_continued_and_those_stay_as_they_are(gemma3, tmp_path):
    lm = AutoModelForCausalLM.from_pretrained(gemma3)
    peft.get_peft_model(lm, peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"])).save_pretrained(tmp_path)
    again = policy(run_config(tmp_path))
    assert any("tower" in name and "lora" in name for name, _ in again.named_parameters())
    trained = [name for name, p in again.named_parameters() if p.requires_grad]
    assert trained
    assert all("language_model" in name for name in trained)


class Experts(nn.Module):
    """Experts as a list of modules, of which these tokens reach the first alone; and an image's part beside them."""

    def __init__(self):
        super().__init__()
        self.list = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])

    def forward(self, x):
        return self.list[0](x)


class WithImages(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.image_in = nn.Conv2d(3, 32, 2)
        self.model.layers[0].mlp = Experts()
        self.model.token_of_image = nn.Parameter(torch.zeros(32))


def test_experts_without_a_token_are_reached_and_single_weights_are_found():
    config = LlamaConfig(**tiny_llama(60).config.to_dict())
    assert towers.unreached_by_text(WithImages(config)) == ("model.token_of_image", "model.image_in")


def test_a_text_model_costs_no_pass(monkeypatch):
    monkeypatch.setattr(towers, "_find", lambda lm: pytest.fail("looked at"))
    assert towers.unreached_by_text(tiny_llama(60)) == ()


def test_what_cannot_be_run_without_values_is_said_and_trained(capsys):
    class Refuses(WithImages):
        def get_output_embeddings(self):
            raise NotImplementedError("of values")

    lm = WithImages(LlamaConfig(**tiny_llama(60).config.to_dict()))
    lm.__class__ = Refuses
    assert towers.unreached_by_text(lm) == ()
    assert "warning: cannot determine which parts of Refuses text uses" in capsys.readouterr().out
