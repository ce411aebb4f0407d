"""Layouts: the constants of the cost model, and what `auto` makes of them, against every layout on a grid of lengths.

    python benchmarks/layouts.py                    # CPU, one thread: CPU seconds, which other programs hardly move
    python benchmarks/layouts.py --device cuda

The first table is what `prefopt.engine.layouts.SPEEDS` holds: forward and backward, in the units of `Speeds`. The
second has a forward and backward pass of backbone and head (no reference) in each layout, collation included: how many
times faster than padded rows, in the median of the turns, and the one that `auto` takes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import ratio, seconds, synchronize, write

from prefopt.config import KernelConfig
from prefopt.data.collate import collate
from prefopt.data.layouts import LAYOUTS, PADDED
from prefopt.engine.attention import Rows
from prefopt.engine.forward import PolicyWithReference, to_device, token_stats_of
from prefopt.engine.layouts import SPEEDS, Layouts, shape_of
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
    parser.add_argument("--pairs", default=4, type=int, help="pairs per pass")
    parser.add_argument("--repeats", default=5, type=int)
    parser.add_argument("--output", default=None, type=Path, help="folder; benchmarks/results by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = {"folder": args.output} if args.output else {}
    bench = Bench(args.device, args.repeats)
    constants = bench.constants()
    write("layouts-constants", args.device, constants, ["Forward and backward, one thread, CPU seconds."], **folder)
    rows = bench.grid(args.pairs)
    note = f"{args.pairs} pairs per pass unless said otherwise; x: times as fast as padded rows, medians of {args.repeats}."
    write("layouts", args.device, rows, [note], **folder)


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
        self.heads, self.head, self.dtype = heads, hidden // heads, dtype

    def clock(self, run: Callable[[], Any]) -> Callable[[], float]:
        """`run`, timed: on the CPU by the processor's clock."""
        now = time.process_time if self.device.type == "cpu" else time.perf_counter

        def timed() -> float:
            began = now()
            run()
            synchronize(self.device.type)
            return now() - began

        return timed

    def step(self, pairs: list[EncodedPair], layouts: Layouts) -> Callable[[], float]:
        """A forward and backward pass over these pairs, from lists of ids on."""

        def run() -> None:
            how = layouts.settings(layouts.of(pairs, need_rejected=True))
            batch = to_device(collate(pairs, pad_id=1, **how), self.device)
            token_stats_of(self.policy, batch, ()).logp.sum().backward()
            self.policy.zero_grad(set_to_none=True)

        return self.clock(run)

    def layouts(self, *allowed: str) -> Layouts:
        return Layouts(allowed, self.policy.attention, self.shape, SPEEDS[self.device.type])

    # Constants

    def constants(self) -> list[dict[str, Any]]:
        """Each member of Speeds by itself: attention bare, the rest from passes in which little else happens."""
        heads, head, length, rows = self.heads, self.head, 512, 4
        width = heads * head

        def attention(queries: int, keys: int, **how: Any) -> Callable[[], float]:
            q, k, v = (
                torch.randn(rows, heads, n, head, device=self.device, dtype=self.dtype, requires_grad=True)
                for n in (queries, keys, keys)
            )

            def run() -> None:
                sdpa(q, k, v, **how).sum().backward()
                q.grad = k.grad = v.grad = None

            return self.clock(run)

        second = torch.ones(1, 1, length // 2, length, dtype=torch.bool, device=self.device).tril(length // 2)
        short, many = [self.pair(16, 16, 16)] * 32, [self.pair(1, 1, 1)] * 128
        dense = collate([self.pair(256, 128, 128)] * 4, pad_id=1, layout="prefix_shared")
        rows_of = Rows(
            dense.input_ids.to(self.device), dense.attention_mask, dense.position_ids.to(self.device), dense.units
        )

        def mask() -> None:
            rows_of._made.clear()
            rows_of.arguments("dense", self.dtype)

        times = seconds(
            {
                "linear": self.step(short, self.layouts(PADDED)),
                "causal": attention(length, length, is_causal=True),
                "masked": attention(length // 2, length, attn_mask=second),
                "mask": self.clock(mask),
                "call": self.step(many, self.layouts("packed_prefix_shared")),
                "no call": self.step(many, self.layouts(PADDED)),
            },
            self.device.type,
            self.repeats,
        )
        median = {name: statistics.median(taken) for name, taken in times.items()}
        cells, masked = 64 * 32, rows * length // 2 * length
        extra = median["call"] - median["no call"] * (128 * 3) / (256 * 2)
        found = {
            "linear": cells * self.shape.weights / median["linear"],
            "causal": rows * length**2 / 2 * width / median["causal"],
            "masked": masked * width / median["masked"],
            "mask": 4 * 512**2 / median["mask"],
            "call": extra / (256 * self.shape.layers),
        }
        held = SPEEDS[self.device.type]
        return [{"constant": name, "measured": found[name], "in the code": getattr(held, name)} for name in found]

    # Grid

    def pair(self, prompt: int, chosen: int, rejected: int) -> EncodedPair:
        draw = np.random.default_rng(prompt)
        ids = [draw.integers(5, self.vocabulary, n).tolist() for n in (prompt, chosen, rejected)]
        return EncodedPair(*ids, [True] * chosen, [True] * rejected)

    def ragged(self, pairs: int, median: int, seed: int) -> list[EncodedPair]:
        """Lengths like those of conversations: a long tail."""
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
            if self.policy.attention == "by_unit":
                runs |= {"prefix_shared, dense mask": self.dense(batch)}
            times = seconds(runs, self.device.type, self.repeats)
            row: dict[str, Any] = {"prompt/response": name, "padded, ms": 1e3 * statistics.median(times[PADDED])}
            row |= {f"{run}, x": ratio(times, PADDED, run) for run in runs if run != PADDED}
            table.append(row | {"auto takes": auto.of(batch, need_rejected=True)})
            print(table[-1], flush=True)
        return table

    def dense(self, pairs: list[EncodedPair]) -> Callable[[], float]:
        """The pass with a mask of T x T in place of SDPA unit by unit."""
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
