import json
from pathlib import Path

import pytest

from tests.helpers import byte_bpe_tokenizer, tiny_llama

PROMPTS = 44


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A tiny model and prompts with answers."""
    place = tmp_path_factory.mktemp("rounds")
    rows = [{"prompt": f"say {i}", "chosen": f" it is {i}", "rejected": f" no {i * 7 % 11}"} for i in range(PROMPTS)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_bpe_tokenizer([row["prompt"] + row["chosen"] for row in rows], vocab_size=300)
    tiny_llama(len(tokenizer), hidden=16, layers=1).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    return place


@pytest.fixture(scope="session")
def rounds(place):
    """The flags of two short rounds of 16 prompts in shards of 4."""
    usual = {"method": "sppo", "method.beta": 0.1, "model.path": place / "model", "data.train": place / "pairs.jsonl"}
    usual |= {"rounds.count": 2, "rounds.prompts": 16, "rounds.shard": 4, "rounds.eval_prompts": 8}
    usual |= {"judge.kind": "length", "generate.n": 3, "generate.max_tokens": 8, "data.max_length": 64}
    usual |= {"train.global_batch": 4, "train.micro_batch": 2, "train.save_every": 2, "optim.lr": 1e-2}

    def rounds(output: Path, *, without: tuple[str, ...] = (), **other: object) -> list[str]:
        """`train__max_steps=1` is `--train.max_steps 1`."""
        flags = usual | {"output": output} | {name.replace("__", "."): value for name, value in other.items()}
        return [word for name, value in flags.items() if name not in without for word in (f"--{name}", str(value))]

    return rounds


@pytest.fixture(scope="session")
def uninterrupted(server, rounds, tmp_path_factory):
    """Both rounds, disturbed by nobody."""
    output = tmp_path_factory.mktemp("straight") / "run"
    ended = server.train(rounds(output))
    assert ended.status == 0, ended.err
    return output
