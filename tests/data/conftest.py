import json
from pathlib import Path

import pytest

from tests.helpers import CHATML, byte_bpe_tokenizer

TEXTS = [
    "\n\nHuman: What is the colour of the sky?\n\nAssistant: The sky is blue on a clear day.",
    "\n\nHuman: Name a fruit, please.\n\nAssistant: An apple is a fruit. Pears are good as well.",
    "A question about numbers: 12 and 34? The answer is 46, of course.",
]


@pytest.fixture(scope="session")
def tokenizer():
    return byte_bpe_tokenizer(TEXTS, chat_template="{{ bos_token }}" + CHATML)


@pytest.fixture(scope="session")
def bare_tokenizer():
    """No BOS, no pad token, no chat template."""
    return byte_bpe_tokenizer(TEXTS, bos=False, pad=False)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes rows (objects, or bytes as they are) to a file in the working directory and gives its name."""
    monkeypatch.chdir(tmp_path)

    def write(*rows, name="pairs.jsonl"):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        Path(name).write_bytes(b"".join(line + b"\n" for line in lines))
        return name

    return write


PAIR = {"prompt": "A question:", "chosen": " good", "rejected": " bad"}


@pytest.fixture
def pair():
    return dict(PAIR)
