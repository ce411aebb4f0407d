import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import tests.faults
from prefopt import registry
from tests.fork_server import ForkServer
from tests.helpers import byte_bpe_tokenizer, tiny_llama

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL reports each trainer that is made; read when the hub is imported
WORDS = ["red", "green", "blue", "amber", "violet", "teal", "pink", "olive"]


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    """A cache of the testbed's worlds, of all workers of pytest together: their base policies are trained once."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "worlds"


@pytest.fixture(scope="session")
def server(tmp_path_factory, worlds):
    """One process for all attempts of all tests here."""
    server = ForkServer(tmp_path_factory.mktemp("forks"), worlds)
    yield server
    server.close()


@pytest.fixture(scope="module")
def runtime():
    """One process on the CPU, with one thread."""
    import torch
    from accelerate import Accelerator

    from prefopt.training.runtime import Runtime

    torch.set_num_threads(1)
    return Runtime(Accelerator(cpu=True))


@pytest.fixture
def unreadable(monkeypatch):
    """Makes the system refuse to open, list or stat what has a name: `unreadable("manifest.json", errno.EIO)`."""
    with monkeypatch.context() as patch:

        def refuse(name, number=errno.EIO):
            patch.undo()
            if name is not None:
                tests.faults.refuse(name, number, patch.setattr)

        yield refuse


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """A tiny model, and pairs with every column that any method reads."""
    from prefopt.data.encoder import Encoder
    from prefopt.types import PairRow

    folder = tmp_path_factory.mktemp("task")
    needs = [registry.get(name)().needs for name in registry.names()]
    columns = {column.name: column for need in needs for column in need.columns}
    rows = []
    for i in range(50):
        prompt = f"Human: name colour {i % 20}.\n\nAssistant:"
        good, bad = " ".join(WORDS[: 1 + i % 5]), " ".join(WORDS[5 - i % 3 :]) + f" {i}"
        ends = {name: (max(column.low, -2.0), min(column.high, 2.0)) for name, column in columns.items()}
        numbers = {name: low + (high - low) * (i % 4) / 4 for name, (low, high) in ends.items()}
        rows.append({"prompt": prompt, "chosen": f" {good} {i}", "rejected": f" {bad}", **numbers})
    tokenizer = byte_bpe_tokenizer([row["prompt"] + row["chosen"] for row in rows], vocab_size=300)
    encoder = Encoder(tokenizer, 4096)
    for row in rows:
        pair = encoder.pair(PairRow(row["prompt"], row["chosen"], row["rejected"], {}, ""))
        tokens = len(pair.chosen_ids), len(pair.rejected_ids or ())
        for column in (column for need in needs for column in need.token_columns):
            row |= {key: [0.5 + i % 3 for i in range(n)] for key, n in zip(column.keys, tokens, strict=True)}
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = folder / "model"
    tiny_llama(len(tokenizer), hidden=16, layers=1).save_pretrained(model)
    tokenizer.save_pretrained(model)
    return SimpleNamespace(model=model, pairs=folder / "pairs.jsonl", folder=folder, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def command(task):
    """The command of a short run: 24 steps, a checkpoint every 3, an evaluation every 4."""

    usual = {"data.eval_fraction": 0.25, "optim.lr": 1e-2, "train.global_batch": 5, "train.micro_batch": 2}
    usual |= {"train.max_steps": 24, "train.save_every": 3, "eval.every": 4, "eval.batch": 4}

    def command(method: str, output: Path, *, without: tuple[str, ...] = (), **other: object) -> list[str]:
        """`train__max_steps=1` is `--train.max_steps 1`."""
        flags = {"method": method, "model.path": task.model, "data.train": task.pairs, "output": output, **usual}
        flags |= {name.replace("__", "."): value for name, value in other.items()}
        return [word for name, value in flags.items() if name not in without for word in (f"--{name}", str(value))]

    return command
