"""Models as they are loaded: what of their config would train or score them in another way than they compute."""

import json
import os

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, MistralConfig

from prefopt.errors import TrainError
from prefopt.settings import ModelConfig
from prefopt.training import models, sizes
from tests.helpers import tiny_llama

EOS = 1


@pytest.mark.parametrize("load", [models.load_model, models.load_scorer])
def test_load_when_eos_pads_then_its_embedding_has_the_gradient_of_a_model_without_padding(load, tmp_path):
    tiny_llama(40, hidden=16, layers=1, pad_token_id=EOS).save_pretrained(tmp_path)
    torch.manual_seed(0)
    lm = load(str(tmp_path), ModelConfig())
    ids = torch.tensor([[0, 5, EOS, 7, EOS]])

    def gradient(padding_idx):
        lm.zero_grad()
        lm.get_input_embeddings().padding_idx = padding_idx
        lm.model(ids).last_hidden_state[:, -1].square().sum().backward()
        return lm.get_input_embeddings().weight.grad.clone()

    as_loaded = gradient(lm.get_input_embeddings().padding_idx)
    assert torch.equal(as_loaded, gradient(None))
    assert as_loaded[EOS].norm() > 0
    assert gradient(EOS)[EOS].norm() == 0  # what a config's pad_token_id does to a model that is loaded as it is


def test_load_when_positions_are_counted_from_their_padding_then_they_still_are(tmp_path):
    few = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = AutoConfig.for_model("roberta", **few, num_attention_heads=2, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    judge = models.load_classifier(str(tmp_path), ModelConfig(), "judge.path")
    assert judge.roberta.embeddings.position_embeddings.padding_idx == 1


# Attention


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory):
    """Whose attention has a soft-cap, which SDPA does not know."""
    folder = tmp_path_factory.mktemp("gemma2")
    few = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    config = AutoConfig.for_model("gemma2", **few, num_attention_heads=2, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_load_when_a_family_has_no_sdpa_then_it_attends_eagerly(gemma2, tmp_path):
    assert models.load_model(str(gemma2), ModelConfig()).config._attn_implementation == "eager"
    assert models.load_scorer(str(gemma2), ModelConfig()).config._attn_implementation == "eager"
    tiny_llama(40, hidden=16, layers=1).save_pretrained(tmp_path)
    assert models.load_model(str(tmp_path), ModelConfig()).config._attn_implementation == "sdpa"


def test_run_when_a_family_has_no_sdpa_then_it_says_that_it_attends_eagerly(gemma2, server, command, task, tmp_path):
    task.tokenizer.save_pretrained(gemma2)
    ended = server.train(command("dpo", tmp_path / "run", model__path=gemma2, train__max_steps=1))
    assert ended.status == 0, ended.err
    assert "attention: eager, since Gemma2ForCausalLM needs what SDPA does not support" in ended.out + ended.err


# Configs


@pytest.fixture
def with_config(tmp_path):
    tiny_llama(40, hidden=16, layers=1).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    known = json.loads(file.read_text())

    def with_config(text=None, **changes):
        file.write_text(json.dumps(known | changes) if text is None else text)
        return str(tmp_path)

    return with_config


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 10**12},
        {"vocab_size": 10**12},
        {"vocab_size": -1},
        {"hidden_size": 0},
        {"hidden_size": "16"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": True},
        {"intermediate_size": 1.5},
        {"text_config": {"num_hidden_layers": 10**9}},
    ],
    ids=str,
)
def test_config_when_it_counts_what_nobody_has_then_the_setting_is_named_before_anything_is_made(change, with_config):
    name, value = next(iter(change.items()))
    name, value = next(iter(value.items())) if isinstance(value, dict) else (name, value)
    with pytest.raises(TrainError, match=f"^model.path: '.*config.json' has {name} {value!r}, expected a number from"):
        models.load_config(with_config(**change), ModelConfig())


def test_config_when_its_sizes_together_are_absurd_then_it_is_refused(with_config):
    path = with_config(num_hidden_layers=1500, hidden_size=900_000)
    with pytest.raises(TrainError, match=r"describes a model of 4.9e\+15 weights, expected at most 1e\+14"):
        models.load_config(path, ModelConfig())


def test_load_when_a_config_is_far_larger_than_its_files_then_it_is_refused_before_memory_is_taken(with_config):
    """1e12 weights, which would be made before anybody could see that they are missing."""
    path = with_config(num_hidden_layers=2, hidden_size=2**18, intermediate_size=2**19, num_attention_heads=2**10)
    with pytest.raises(TrainError, match=f"holds lm_head.weight of shape 40 x 16, .* requires 40 x {2**18}"):
        models.load_model(path, ModelConfig())


def test_load_when_a_config_pads_with_a_token_without_a_row_then_it_loads_without_one(with_config):
    """As after a pad token was added to the tokenizer, and the embedding was not resized."""
    path = with_config(pad_token_id=40)
    assert models.parameter_count(path, ModelConfig()) > 0
    for load in (models.load_model, models.load_scorer):
        assert load(path, ModelConfig()).config.pad_token_id is None


@pytest.mark.parametrize(
    ("text", "holds"), [("[1]", "a JSON list"), ("null", "a JSON NoneType"), ("{", "no JSON"), ("[" * 10**5, "no JSON")]
)
def test_config_when_it_is_no_object_then_the_line_says_what_it_is(text, holds, with_config):
    with pytest.raises(TrainError, match=f"config.json' holds {holds}, expected the JSON object"):
        models.load_config(with_config(text), ModelConfig())


def test_config_when_it_is_a_pipe_then_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(TrainError, match=r"config.json' holds no file"):
        models.load_config(str(tmp_path), ModelConfig())


def test_weights_of_when_a_model_is_known_then_they_are_its_own_within_a_quarter():
    lm = tiny_llama(300, hidden=64, layers=4)
    assert sizes.estimated_weights(lm.config) == pytest.approx(sum(p.numel() for p in lm.parameters()), rel=0.25)


def test_config_when_its_window_is_negative_then_it_is_refused_before_weights_are_loaded(tmp_path):
    MistralConfig(sliding_window=-1).save_pretrained(tmp_path)
    with pytest.raises(TrainError, match="has sliding_window -1, expected a number above 0, or null"):
        models.load_config(str(tmp_path), ModelConfig())
