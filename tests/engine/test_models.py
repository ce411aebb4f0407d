"""Models as they are loaded: what of their config would train or score them in another way than they compute."""

import pytest
import torch

from prefopt.config import ModelConfig
from prefopt.engine import models
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
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = AutoConfig.for_model("roberta", **sizes, num_attention_heads=2, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    judge = models.load_classifier(str(tmp_path), ModelConfig(), "judge.path")
    assert judge.roberta.embeddings.position_embeddings.padding_idx == 1
