"""Completions per second: both modes of the inference engine in this process, and both modes of transformers itself.

    python benchmarks/generate.py                   # CPU, one thread: CPU seconds, which other programs hardly affect
    python benchmarks/generate.py --device cuda

The model is a Llama with random weights, with prompts of 8 to 64 tokens. The vocabulary has so many EOS tokens that
answers end after 64 tokens on average, with the same probability at each token, so that their lengths vary as in
sampling. In the second column every answer has 64 tokens.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import seconds, write

from prefopt.generation.base import Sampling
from prefopt.generation.transformers_engine import TransformersEngine

MEAN, LONGEST, VOCABULARY = 64, 512, 4096
MODELS = {"cpu": (128, 2), "cuda": (2048, 16)}  # hidden, layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--prompts", default=32, type=int)
    parser.add_argument("--n", default=4, type=int, help="completions per prompt")
    parser.add_argument("--batch", default=32, type=int, help="completions per forward pass")
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--output", default=None, type=Path, help="folder; benchmarks/results by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    ragged, even = measure(args, ragged=True), measure(args, ragged=False)
    rows = [
        {
            "way": way,
            "ragged: tokens/s": round(ragged[way][0]),
            "ragged: seconds": round(ragged[way][1], 2),
            "all of 64: tokens/s": round(even[way][0]),
            "all of 64: seconds": round(even[way][1], 2),
        }
        for way in ragged
    ]
    note = (
        f"{args.prompts} prompts with {args.n} completions each, {args.batch} at a time, {args.repeats} turns, the "
        f"median; {'CPU' if args.device == 'cpu' else 'wall'} seconds. Draws differ between ways, so the numbers of "
        "tokens differ by a little."
    )
    write("generate", args.device, rows, [note], **({"folder": args.output} if args.output else {}))


def measure(args: argparse.Namespace, *, ragged: bool) -> dict[str, tuple[float, float]]:
    """Mode -> median (tokens per second, seconds)."""
    hidden, layers = MODELS[args.device]
    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=max(2, hidden // 64), **shape)
    lm = LlamaForCausalLM(config).to(args.device).eval()
    if args.device == "cuda":
        lm = lm.bfloat16()
    ends = list(range(2, 2 + VOCABULARY // MEAN)) if ragged else None
    limit = LONGEST if ragged else MEAN
    lm.generation_config.eos_token_id = ends
    rng = np.random.default_rng(0)
    prompts = [rng.integers(100, VOCABULARY, size=size).tolist() for size in rng.integers(8, 65, size=args.prompts)]
    counts: dict[str, int] = {}

    def ours(continuous: bool) -> None:
        tokenizer = SimpleNamespace(eos_token_id=None, added_tokens_decoder={}, decode=lambda ids, **_: "")
        engine = TransformersEngine(lm, tokenizer, batch=args.batch, continuous=continuous)
        seeds = [args.n * p for p in range(len(prompts))]
        groups = engine.generate(prompts, Sampling(n=args.n, max_tokens=limit), seeds)
        way = f"prefopt, {'continuous' if continuous else 'batches'}"
        counts[way] = sum(len(c.token_ids) for group in groups for c in group)

    common: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": limit, "pad_token_id": 0}
    common |= {"eos_token_id": -1 if ends is None else ends}
    asked = sorted((prompt for prompt in prompts for _ in range(args.n)), key=len)

    def static() -> None:
        total = 0
        for begin in range(0, len(asked), args.batch):
            part = asked[begin : begin + args.batch]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in part], device=args.device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=args.device)
            out = lm.generate(ids, attention_mask=mask, generation_config=GenerationConfig(**common))[:, width:]
            stops = torch.isin(out, torch.tensor(ends or [-1], device=args.device))
            total += int((stops.cumsum(-1) - stops.int() == 0).sum())
        counts["transformers, generate"] = total

    def continuous() -> None:
        settings = ContinuousBatchingConfig(max_requests_per_batch=args.batch)
        if args.device == "cpu":
            settings.num_blocks, settings.max_batch_tokens = 256, 512
        answers = lm.generate_batch(
            asked, generation_config=GenerationConfig(**common), continuous_batching_config=settings
        )
        counts["transformers, generate_batch"] = sum(len(a.generated_tokens) for a in answers.values())

    ways: dict[str, Callable[[], Any]] = {
        "prefopt, batches": lambda: ours(False),
        "prefopt, continuous": lambda: ours(True),
        "transformers, generate": static,
        "transformers, generate_batch": continuous,
    }
    if args.device == "cpu":
        ways = {way: functools.partial(cpu_seconds, run) for way, run in ways.items()}
    times = seconds(ways, args.device, args.repeats)
    return {way: (counts[way] / float(np.median(taken)), float(np.median(taken))) for way, taken in times.items()}


def cpu_seconds(run: Callable[[], None]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


if __name__ == "__main__":
    main()
