from types import SimpleNamespace

import pytest
import torch

from prefopt.types import Question, Response
from tests.helpers import CHATML, byte_bpe_tokenizer, tiny_llama
from tests.invariant.oracle import scorer_of


def question(*texts, prompt="Name a colour:", key="k", answer=None):
    return Question(prompt, tuple(Response(text) for text in texts), key, answer)


QUESTIONS = [
    question(" red", " green is a colour, and so is blue", " violet", key="one"),
    question(" seven", " blue", prompt="Name a number:", key="two"),
]


@pytest.fixture(scope="package")
def places(tmp_path_factory):
    """Folders of tiny models and tokenizers: `lm`, `classifier` made from it, `chat` the same with a template."""
    root = tmp_path_factory.mktemp("judges")
    texts = ["Name a colour: red green blue violet. Name a number: seven is a and so"] * 2
    plain = byte_bpe_tokenizer(texts, vocab_size=320)
    chat = byte_bpe_tokenizer(texts, vocab_size=320, bos=False, chat_template=CHATML)
    with torch.random.fork_rng():
        lm = tiny_llama(len(plain), max_position_embeddings=128)
    classifier = scorer_of(lm)
    classifier.config.pad_token_id = plain.pad_token_id
    for name, model, tokenizer in (("lm", lm, plain), ("classifier", classifier, plain), ("chat", classifier, chat)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return SimpleNamespace(
        root=root, lm=root / "lm", classifier=root / "classifier", chat=root / "chat", tokenizer=plain
    )
