"""DPO, TDPO1 and TDPO2 on real pairs with a small model: every step from text to the table of held-out results.

    python benchmarks/hh.py --data.train train.jsonl --data.eval test.jsonl --output runs/hh

Trains a byte-level BPE tokenizer on the training text, a Llama of about 5M parameters by `--method sft` until its
held-out loss stops falling, and from that checkpoint one run per method and seed. The same command resumes a killed
study.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from study import lines, machine, train_all

from prefopt.evaluate.intervals import bootstrap

METHODS = {
    "dpo": ["--method", "dpo"],
    "tdpo1": ["--method", "tdpo", "--method.variant", "tdpo1"],
    "tdpo2": ["--method", "tdpo", "--method.variant", "tdpo2"],
}
VOCABULARY = 8192
EPOCHS = 5  # at most, of SFT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.train", dest="train", required=True, type=Path)
    parser.add_argument("--data.eval", dest="eval", required=True, type=Path)
    parser.add_argument("--output", default=Path("runs/hh"), type=Path)
    parser.add_argument("--seeds", default=3, type=int)
    parser.add_argument("--jobs", default=max(1, len(os.sched_getaffinity(0))), type=int, help="runs at the same time")
    parser.add_argument("--sft_lr", default=1e-3, type=float)
    parser.add_argument("--lr", default=1e-4, type=float)
    parser.add_argument("--beta", default=0.1, type=float)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    data = ["--data.train", str(args.train), "--data.eval", str(args.eval), "--data.on_bad_row", "skip"]
    data += ["--data.max_length", "512"]
    base = make_base(args.train, args.output / "base")
    policy, sft = train_sft(base, data, args.output / "sft", args.sft_lr)

    common = ["--method.beta", str(args.beta), "--model.path", str(policy), *data, "--optim.lr", str(args.lr)]
    common += ["--train.global_batch", "16", "--train.micro_batch", "4", "--eval.every", "1000"]
    runs = {
        f"{name}-seed{seed}": [*flags, *common, "--seed", str(seed)]
        for seed in range(args.seeds)
        for name, flags in METHODS.items()
    }
    train_all(runs, args.output, args.jobs)
    result = {
        "sft": sft,
        "machine": machine(),
        "settings": {"lr": args.lr, "beta": args.beta, "seeds": args.seeds},
        **summarise(args.output, args.seeds),
    }
    (args.output / "result.json").write_text(json.dumps(result, indent=1))
    table = render(result)
    (args.output / "result.md").write_text(table)
    print(table)


def make_base(file: Path, folder: Path, vocabulary: int = VOCABULARY, width: int = 256) -> Path:
    """A tokenizer trained on the text of the training file, and a randomly initialised Llama of 5.5M parameters."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rows = [json.loads(line) for line in file.read_text().splitlines()]
    texts = [row[side] for row in rows for side in ("chosen", "rejected")]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
        )
    )
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    return folder


def train_sft(base: Path, data: Sequence[str], output: Path, lr: float) -> tuple[Path, dict[str, Any]]:
    """Train on the chosen side while the held-out loss falls; returns the best epoch's checkpoint and its metrics."""
    rows = sum(1 for line in Path(data[1]).read_text().splitlines() if line.strip())
    flags = ["--method", "sft", "--model.path", str(base), *data, "--optim.lr", str(lr), "--optim.schedule", "cosine"]
    flags += ["--train.global_batch", "8", "--train.micro_batch", "8", "--train.epochs", str(EPOCHS)]
    steps = -(-(rows - bad_rows(base, data)) // 8)
    flags += ["--eval.every", str(steps), "--train.save_every", str(steps), "--train.keep_last", str(EPOCHS)]
    train_all({output.name: flags}, output.parent, 1)
    evals, trained = lines(output), lines(output, "train")
    best = next((a for a, b in itertools.pairwise(evals[1:]) if b["loss"] >= a["loss"]), evals[-1])
    figures = {
        "loss_per_epoch": [line["loss"] for line in evals],
        "epochs": best["step"] / steps,
        "perplexity": math.exp(best["loss"]),
        "unigram_perplexity": unigram_perplexity(base, data),
        "tokens_per_second": float(np.median([line["tokens_per_second"] for line in trained])),
    }
    return output / "checkpoints" / f"step_{best['step']:08d}", figures


def encoded(base: Path, data: Sequence[str]) -> tuple[Any, Any]:
    """The pairs of both files, as a run encodes them."""
    from transformers import AutoTokenizer

    from prefopt.data.encode import encode_file
    from prefopt.testbed.cache import cache_root

    tokenizer = AutoTokenizer.from_pretrained(base)

    def read(path: str) -> Any:
        return encode_file(
            path, tokenizer, max_length=512, need_rejected=False, on_bad_row="skip", cache_dir=cache_root() / "encoded"
        )

    return read(data[1]), read(data[3])


def bad_rows(base: Path, data: Sequence[str]) -> int:
    report = encoded(base, data)[0].report
    return report.read - report.kept


def unigram_perplexity(base: Path, data: Sequence[str]) -> float:
    """Held-out perplexity per completion token of the training completions' token frequencies, add-one smoothed."""
    train_file, eval_file = encoded(base, data)
    counts = Counter(token for pair in train_file.pairs for token in pair.chosen_ids)
    total = sum(counts.values()) + VOCABULARY
    tokens = [token for pair in eval_file.pairs for token in pair.chosen_ids]
    return math.exp(-sum(math.log((counts[token] + 1) / total) for token in tokens) / len(tokens))


def summarise(folder: Path, seeds: int) -> dict[str, Any]:
    """Held-out metrics per method, and paired bootstrap differences between methods, over pairs and seeds."""
    per_pair: dict[str, np.ndarray] = {}  # method -> (seeds, pairs) of 0/1
    methods: dict[str, dict[str, Any]] = {}
    for name in METHODS:
        tables = [
            [json.loads(line) for line in (folder / f"{name}-seed{seed}" / "eval_pairs.jsonl").read_text().splitlines()]
            for seed in range(seeds)
        ]
        per_pair[name] = np.array([[row["rewards/accuracies"] for row in table] for table in tables])
        last = [lines(folder / f"{name}-seed{seed}")[-1] for seed in range(seeds)]
        keys = ("rewards/accuracies", "loss", "rewards/margins", "kl/chosen", "kl/rejected", "entropy")
        keys += ("logps/chosen", "logps/rejected")
        methods[name] = {key: [line[key] for line in last] for key in keys}
        methods[name]["interval"] = interval(per_pair[name])
    pairs = [("tdpo1", "dpo"), ("tdpo2", "dpo"), ("tdpo2", "tdpo1")]
    differences = {f"{a} - {b}": interval(per_pair[a] - per_pair[b]) for a, b in pairs}
    return {"methods": methods, "differences": differences}


def interval(values: np.ndarray) -> list[float]:
    """Mean and 95% bootstrap interval of a (seeds, pairs) table, both resampled."""
    found = bootstrap(values)
    return [found.mean, found.low, found.high]


def render(result: dict[str, Any]) -> str:
    """The tables of the study in Markdown."""
    sft = result["sft"]
    losses = ", ".join(f"{loss:.3f}" for loss in sft["loss_per_epoch"])
    out = [
        f"SFT: {sft['epochs']:g} epochs; held-out loss at the start and after each epoch {losses}; perplexity "
        f"{sft['perplexity']:.1f} against {sft['unigram_perplexity']:.1f} of a unigram model; "
        f"{sft['tokens_per_second']:.0f} tokens/s.",
        "",
        "| method | held-out accuracy [95%] | per seed | loss | KL chosen | KL rejected | entropy | reward margin |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["methods"].items():
        mean, low, high = row["interval"]
        per_seed = ", ".join(f"{value:.3f}" for value in row["rewards/accuracies"])
        cells = [
            f"{np.mean(row[key]):.3f}" for key in ("loss", "kl/chosen", "kl/rejected", "entropy", "rewards/margins")
        ]
        out.append(f"| {name} | {mean:.3f} [{low:.3f}, {high:.3f}] | {per_seed} | {' | '.join(cells)} |")
    out += ["", "| difference in accuracy | mean [95%, paired] | |", "|---|---|---|"]
    for name, (mean, low, high) in result["differences"].items():
        verdict = "not distinguishable" if low <= 0 <= high else "distinguishable"
        out.append(f"| {name} | {mean:+.3f} [{low:+.3f}, {high:+.3f}] | {verdict} |")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    main()
