from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers import CHATML, byte_bpe_tokenizer, tiny_llama


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    """A tiny policy whose answers differ in length, in memory and in a folder, and prompts of one to thirty tokens."""
    lines = [f"the {word} answer to question {i} is yes" for i, word in enumerate(["red", "green", "blue", "amber"])]
    tokenizer = byte_bpe_tokenizer(lines * 3, 300, chat_template=CHATML)
    lm = tiny_llama(
        len(tokenizer), hidden=64, seed=3, initializer_range=0.2, num_attention_heads=2, num_key_value_heads=1
    )  # heads of 32, the smallest that vLLM has a kernel for
    lm.lm_head.weight.data[tokenizer.eos_token_id] *= 3  # likely here, unlikely there
    folder = tmp_path_factory.mktemp("policy") / "model"
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rng = np.random.default_rng(0)
    lengths = [1, 2, 30, 7, 7, 12, 3, 20, 1, 15, 5, 9]
    prompts = [[0, *rng.integers(5, len(tokenizer), size=length - 1).tolist()] for length in lengths]
    return SimpleNamespace(
        lm=lm, tokenizer=tokenizer, folder=folder, prompts=prompts, seeds=[100 * i for i in range(len(prompts))]
    )
