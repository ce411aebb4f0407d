"""One tiny model with random weights per architecture that differs where the engine touches it: head and positions."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.invariant.steps import VOCAB

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}

# name -> ((model type, settings), whether its logits are scaled or capped after the head)
ARCHITECTURES = {
    "llama": (("llama", {**_GROUPED, "tie_word_embeddings": False}), False),
    "llama, tied": (("llama", {**_GROUPED, "tie_word_embeddings": True}), False),
    "qwen2": (("qwen2", _GROUPED), False),
    "gpt-2, absolute positions": (("gpt2", {**_GPT2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}), False),
    "gpt-neox": (("gpt_neox", _COMMON), False),
    "phi, head with a bias": (("phi", _COMMON), False),
    "gemma2, soft cap": (("gemma2", {**_GROUPED, "head_dim": 8, "final_logit_softcapping": 2.0}), True),
    "gemma3, soft cap": (("gemma3_text", {**_GROUPED, "head_dim": 8, "final_logit_softcapping": 2.0}), True),
    "cohere, scale": (("cohere", {**_GROUPED, "logit_scale": 0.25}), True),
    "granite, scaling": (("granite", {**_GROUPED, "logits_scaling": 4.0}), True),
}


def tiny_model(name, seed):
    """A model of this architecture whose weights, biases too, are far from zero."""
    (kind, settings), _ = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.15 * torch.randn(parameter.shape)
    return model
