"""Reference passes of a sweep: prefopt's `reference.cache logps` against TRL's precomputed log-probabilities.

    python benchmarks/sweep_cache.py [--data.train train.jsonl] [--pairs 256] [--runs 12]

The same sweep runs with both, each run in a fork of one process after the imports, two steps each, with empty caches at
the start: first the same run repeatedly, then over learning rate, beta and seed. The table counts the pairs that the
reference scores, in prefopt by the records of its passes, in TRL by counting the inputs of `compute_ref_log_probs`.
Without a data file the pairs are random words.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import measure

MOST = 400  # characters of a text
WORDS = ["red", "green", "blue", "amber", "violet", "teal", "pink", "olive", "grey", "brown", "white", "black"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.train", dest="train", type=Path)
    parser.add_argument("--pairs", default=256, type=int)
    parser.add_argument("--runs", default=12, type=int, help="of the sweep")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["PREFOPT_CACHE"] = str(root / "prefopt")
        os.environ["HF_DATASETS_CACHE"] = str(root / "datasets")
        rows = _rows(args.train, args.pairs)
        _model(root / "model", rows)
        (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rates, betas = (1e-5, 3e-5, 1e-4), (0.05, 0.1, 0.5)
        sweeps = {
            "the same run again": [(rates[0], betas[0], 0)] * args.runs,
            "lr, beta, seed": [(rates[i % 3], betas[i // 3 % 3], i % 4) for i in range(args.runs)],
        }
        table = []
        for number, (name, sweep) in enumerate(sweeps.items()):
            for who, run in (("prefopt", _ours), ("TRL", _trl)):
                os.environ["PREFOPT_CACHE"] = str(root / f"prefopt-{number}")
                os.environ["HF_DATASETS_CACHE"] = str(root / f"datasets-{number}")
                found = [_fork(run, root, i, *one) for i, one in enumerate(sweep)]
                scored = sum(count for count, _ in found)
                row = {"sweep": name, "of": who, "runs": len(sweep), "pairs scored by the reference": scored}
                row |= {"passes": scored / len(rows), "seconds of all runs": sum(seconds for _, seconds in found)}
                table.append(row)
    source = args.train.name if args.train else "random words"
    notes = [f"{len(rows)} pairs ({source}), a Llama of two layers of 64; two steps of 16 pairs in each run."]
    measure.write("sweep-cache", "cpu", table, notes)


def _fork(run: Callable[..., int], *args: Any) -> tuple[int, float]:
    """(result of `run`, its seconds) in its own process."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, run, args))
    process.start()
    answer = mine.recv()
    process.join()
    return answer


def _child(pipe: Any, run: Callable[..., int], args: tuple[Any, ...]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    import torch

    torch.set_num_threads(1)
    began = time.perf_counter()
    pipe.send((run(*args), time.perf_counter() - began))


def _ours(root: Path, number: int, lr: float, beta: float, seed: int) -> int:
    """Pairs that the reference scored in this run."""
    from prefopt import cli

    cache = Path(os.environ["PREFOPT_CACHE"]) / "reference"
    before = _passes(cache)
    with tempfile.TemporaryDirectory() as output:
        settings = {"method": "dpo", "model.path": root / "model", "data.train": root / "pairs.jsonl", "output": output}
        settings |= {"reference.cache": "logps", "data.eval_fraction": 0, "train.max_steps": 2, "data.max_length": 256}
        settings |= {"train.global_batch": 16, "train.micro_batch": 8, "optim.lr": lr, "method.beta": beta}
        settings |= {"seed": seed}
        status = cli.train([word for key, value in settings.items() for word in (f"--{key}", str(value))])
    assert status == 0, status
    return _passes(cache) - before


def _passes(cache: Path) -> int:
    """Pairs scored so far, over all passes."""
    scored = 0
    for path in cache.glob("*/passes.jsonl"):
        pairs = json.loads((path.parent / "cache.json").read_text())["pairs"]
        scored += sum(pairs * one["shards"] // one["of"] for one in map(json.loads, path.read_text().splitlines()))
    return scored


def _trl(root: Path, number: int, lr: float, beta: float, seed: int) -> int:
    """The same for TRL's DPOTrainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    scored = 0
    original = DPOTrainer.compute_ref_log_probs

    def counted(self: Any, model: Any, inputs: Any) -> Any:
        nonlocal scored
        scored += len(inputs["input_ids"]) // 2
        return original(self, model, inputs)

    DPOTrainer.compute_ref_log_probs = counted  # type: ignore[method-assign]
    args = DPOConfig(
        output_dir=str(root / f"trl-{lr}-{beta}-{seed}"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=2,
        max_length=256,
        precompute_ref_log_probs=True,
        learning_rate=lr,
        beta=beta,
        seed=seed,
    )
    DPOTrainer(
        AutoModelForCausalLM.from_pretrained(root / "model", dtype="float32"),
        None,
        args,
        train_dataset=Dataset.from_json(str(root / "pairs.jsonl")),
        processing_class=AutoTokenizer.from_pretrained(root / "model"),
    ).train()
    return scored


def _rows(path: Path | None, count: int) -> list[dict[str, str]]:
    if path is None:
        draw = random.Random(0)

        def words(least: int, most: int) -> str:
            return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

        return [
            {"prompt": f"{i} {words(4, 40)}:", "chosen": f" {words(4, 40)}", "rejected": f" {words(4, 40)} ."}
            for i in range(count)
        ]
    from prefopt.data.rows import read_rows

    rows = []
    for row in read_rows(path, on_bad_row="skip").rows:
        if len(str(row.prompt)) + max(len(str(row.chosen)), len(str(row.rejected))) > MOST:
            continue  # TRL drops pairs that it would have to truncate
        rows.append({"prompt": str(row.prompt), "chosen": str(row.chosen), "rejected": str(row.rejected)})
    return rows[:count]


def _model(folder: Path, rows: list[dict[str, str]]) -> None:
    from tests.helpers import byte_bpe_tokenizer, tiny_llama

    tokenizer = byte_bpe_tokenizer([" ".join(row.values()) for row in rows], vocab_size=2048)
    tiny_llama(len(tokenizer), hidden=64, layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    import datasets  # noqa: F401 - once, before the forks
    import torch  # noqa: F401
    import transformers  # noqa: F401

    main()
