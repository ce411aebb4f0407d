"""Layouts: the constants of the cost model, and the choices of `auto`, against every layout on a grid of lengths.

    python benchmarks/layouts.py                    # CPU, one thread: CPU seconds, which other programs hardly affect
    python benchmarks/layouts.py --device cuda

The first table has the speed-up over padded rows of a forward and backward pass of backbone and head (no reference) in
each layout, collation included, as the median over turns, and the layout that `auto` selects. The second table has the
values of `prefopt.training.layout_choice.SPEEDS`, fitted to these times together with the time of the head.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import ratio, seconds, synchronize, write

from prefopt.data.collate import collate
from prefopt.data.layouts import LAYOUTS, PADDED
from prefopt.settings import KernelConfig
from prefopt.training.forward import PolicyWithReference, to_device, token_stats_of
from prefopt.training.layout_choice import SPEEDS, Layouts, Work, shape_of, work
from prefopt.types import EncodedPair

GRID = {
    "cpu": [(64, 64), (256, 128), (512, 128), (256, 256), (512, 512), (64, 512), (16, 256)],
    "cuda": [(256, 256), (1024, 1024), (2048, 2048), (1600, 400), (6400, 1600), (256, 2048)],
}
MODELS = {  # hidden, intermediate, layers, heads, vocabulary
    "cpu": (256, 640, 4, 4, 6016),
    "cuda": (2048, 8192, 16, 32, 32000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--pairs", default=2, type=int, help="pairs per pass")
    parser.add_argument("--repeats", default=5, type=int)
    parser.add_argument("--output", default=None, type=Path, help="folder; benchmarks/results by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = {"folder": args.output} if args.output else {}
    bench = Bench(args.device, args.repeats)
    rows = bench.grid(args.pairs)
    note = f"{args.pairs} pairs per pass unless stated otherwise; x: speed-up over padded rows, {args.repeats} turns."
    write("layouts", args.device, rows, [note], **folder)
    note = "Fitted to the passes of the other table, in the units of `prefopt.training.layout_choice.Work` per second."
    write("layouts-constants", args.device, bench.constants(), [note], **folder)


class Bench:
    """A Llama without dropout, wrapped as in training."""

    def __init__(self, device: str, repeats: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        hidden, intermediate, layers, heads, vocabulary = MODELS[device]
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=16384,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
        )
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.device, self.repeats, self.vocabulary = torch.device(device), repeats, vocabulary
        self.policy = PolicyWithReference(LlamaForCausalLM(config).to(self.device, dtype), None, KernelConfig())
        self.shape = shape_of(self.policy.lm)
        self.seen: list[tuple[np.ndarray, float]] = []

    def clock(self, run: Callable[[], Any]) -> Callable[[], float]:
        """Seconds of `run`; on the CPU, CPU seconds."""
        now = time.process_time if self.device.type == "cpu" else time.perf_counter

        def timed() -> float:
            began = now()
            run()
            synchronize(self.device.type)
            return now() - began

        return timed

    def step(self, pairs: list[EncodedPair], layouts: Layouts) -> Callable[[], float]:
        """A forward and backward pass over these pairs, starting from lists of ids."""

        def run() -> None:
            how = layouts.settings(layouts.of(pairs, need_rejected=True))
            batch = to_device(collate(pairs, pad_id=1, **how), self.device)
            token_stats_of(self.policy, batch, ()).logp.sum().backward()
            self.policy.zero_grad(set_to_none=True)

        return self.clock(run)

    def layouts(self, *allowed: str) -> Layouts:
        return Layouts(allowed, self.policy.attention, self.shape, self.device.type)

    def pair(self, prompt: int, chosen: int, rejected: int) -> EncodedPair:
        draw = np.random.default_rng(prompt)
        ids = [draw.integers(5, self.vocabulary, n).tolist() for n in (prompt, chosen, rejected)]
        return EncodedPair(*ids, [True] * chosen, [True] * rejected)

    def ragged(self, pairs: int, median: int, seed: int) -> list[EncodedPair]:
        """Pairs with lengths like those of conversations, which have a long tail."""
        draw = np.random.default_rng(seed).lognormal(np.log([2 * median, median, median]), 0.8, (pairs, 3))
        return [self.pair(*(int(n) for n in sizes)) for sizes in draw.clip(2, 8 * median)]

    def grid(self, pairs: int) -> list[dict[str, Any]]:
        scale = 1 if self.device.type == "cpu" else 8
        cases = {f"{p}/{r}": [self.pair(p, r, r)] * pairs for p, r in GRID[self.device.type]}
        cases["one pair, 256/128"] = [self.pair(256, 128, 128)]
        cases["1/128, nothing to share"] = [self.pair(1, 128, 128)] * pairs
        cases["64 pairs of 3/4"] = [self.pair(3, 4, 4)] * 64
        cases |= {f"ragged, {n} pairs": self.ragged(n, 45 * scale, seed=n) for n in (2, 4, 8)}
        table = []
        for name, batch in cases.items():
            auto = self.layouts(*LAYOUTS)
            runs = {layout: self.step(batch, self.layouts(layout)) for layout in LAYOUTS}
            runs |= {"auto": self.step(batch, auto)}
            if self.policy.attention == "per_segment":
                runs |= {"prefix_shared, dense mask": self.dense(batch)}
            times = seconds(runs, self.device.type, self.repeats)
            self.observe(batch, times)
            row: dict[str, Any] = {"prompt/response": name, "padded, ms": 1e3 * statistics.median(times[PADDED])}
            row |= {f"{run}, x": ratio(times, PADDED, run) for run in runs if run != PADDED}
            table.append(row | {"auto takes": auto.of(batch, need_rejected=True)})
            print(table[-1], flush=True)
        return table

    def observe(self, pairs: list[EncodedPair], times: Mapping[str, Sequence[float]]) -> None:
        """Record the operations and the seconds of each pass."""
        sides = [(len(p.prompt_ids), len(p.chosen_ids)) for p in pairs]
        sides += [(len(p.prompt_ids), len(p.rejected_ids or ())) for p in pairs]
        parts = np.array(sides, np.int64)
        head = parts[:, 1].sum() * self.policy.lm.get_output_embeddings().weight.numel()
        for run, taken in times.items():
            if run != "auto":
                layout, _, dense = run.partition(", ")
                kind = "dense" if dense else self.policy.attention
                did = work(parts, layout, kind, self.shape, self.device.type)
                self.seen.append((np.array([*did, head]), statistics.median(taken)))

    def constants(self) -> list[dict[str, Any]]:
        """Speeds that minimise the squared relative errors of the predicted times."""
        rows, taken = (np.array(column) for column in zip(*self.seen, strict=True))
        scale = rows.max(0)
        costs, *_ = np.linalg.lstsq(rows / scale / taken[:, None], np.ones(len(taken)), rcond=None)
        held = (*SPEEDS[self.device.type], "")
        names = (*Work._fields, "head")
        return [
            {"constant": name, "fitted": float(top / cost) if cost > 0 else "too small to see", "in the code": value}
            for name, top, cost, value in zip(names, scale, costs, held, strict=True)
        ]

    def dense(self, pairs: list[EncodedPair]) -> Callable[[], float]:
        """The pass with a dense T x T mask instead of SDPA segment by segment."""
        run = self.step(pairs, replace(self.layouts("prefix_shared"), kind="dense"))

        def timed() -> float:
            attention = self.policy.attention
            self.policy.attention = "dense"
            self.policy.lm.set_attn_implementation("sdpa")
            try:
                return run()
            finally:
                self.policy.lm.set_attn_implementation("prefopt_sdpa")
                self.policy.attention = attention

        return timed


if __name__ == "__main__":
    main()
