"""Time and memory against tokens N, vocabulary V, row length T and batch B, with everything else held.

    python benchmarks/scaling.py           # CSV, table and plot in benchmarks/results

N and V: the head alone, forward and backward, against the plain formula and TRL's two functions. T and B: whole TDPO
steps of prefopt's trainer, by layout. Times are medians of 3 turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from heads import Case, formula_tdpo, ours, trl_tdpo
from measure import peak_bytes, seconds, write
from step import Bench, fixed

TDPO = ("ref_logp", "kl")
GRID = {
    "cpu": {
        "width": 256,
        "N": ([256, 512, 1024, 2048], 16384),  # tokens, at this vocabulary
        "V": ([4096, 16384, 65536], 512),  # vocabulary, at this many tokens
        "T": ([128, 256, 512, 1024], 2),  # prompt and response together (3 to 1), at this batch
        "B": ([1, 2, 4, 8], 256),  # pairs, at this length
    },
    "cuda": {
        "width": 4096,
        "N": ([2048, 4096, 8192, 16384], 128256),
        "V": ([32768, 65536, 131072, 262144], 8192),
        "T": ([1024, 2048, 4096, 8192], 4),
        "B": ([1, 2, 4, 8], 2048),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--axes", nargs="+", default=["N", "V", "T", "B"], choices=["N", "V", "T", "B"])
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--output", default=None, type=Path, help="folder; benchmarks/results by default")
    args = parser.parse_args()
    grid: Any = GRID[args.device]
    rows: list[dict[str, Any]] = []
    for axis in args.axes:
        values, held = grid[axis]
        for value in values:
            n, v = (value, held) if axis == "N" else (held, value)
            if axis in "NV":
                runs = head_runs(n, grid["width"], v, args.device)
            else:
                length, batch = (value, held) if axis == "T" else (held, value)
                runs = step_runs(length, batch, args.device)
            times = seconds(runs, args.device, args.repeats)
            for name, run in runs.items():
                row = {"axis": axis, "value": value, "contestant": name}
                row |= {"ms": 1e3 * statistics.median(times[name]), "peak MB": peak_bytes(run, args.device) / 2**20}
                rows.append(row)
                print(row, flush=True)
    stem = write("scaling", args.device, rows, [], **({"folder": args.output} if args.output else {}))
    plot(rows, stem.with_suffix(".png"))


def head_runs(n: int, h: int, v: int, device: str) -> dict[str, Callable[[], Any]]:
    case = Case(n, h, v, device, torch.bfloat16 if device == "cuda" else torch.float32)
    contestants = {"prefopt": ours(TDPO), "prefopt, cache 0": ours(TDPO, cache_mb=0)}
    contestants |= {"formula": formula_tdpo, "TRL composed": trl_tdpo}
    return {name: case.step(function) for name, function in contestants.items()}


def step_runs(length: int, batch: int, device: str) -> dict[str, Callable[[], Any]]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), device, "6M" if device == "cpu" else "1B", None, batch)
        pairs = fixed(batch, 3 * length // 4, length // 4, bench.shape.vocabulary)
        layouts = ("padded", "packed", "prefix_shared", "auto")
        return {layout: bench.ours(pairs, "tdpo", layout=layout) for layout in layouts}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """One column per axis; time above, memory below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = list(dict.fromkeys(row["axis"] for row in rows))
    titles = {
        "N": "scored tokens N (head)",
        "V": "vocabulary V (head)",
        "T": "row length T (step)",
        "B": "pairs B (step)",
    }
    figure, grid = plt.subplots(2, len(axes), figsize=(3.6 * len(axes), 6), squeeze=False, layout="constrained")
    for column, axis in enumerate(axes):
        here = [row for row in rows if row["axis"] == axis]
        for line, quantity in enumerate(("ms", "peak MB")):
            plane = grid[line][column]
            for name in dict.fromkeys(row["contestant"] for row in here):
                mine = [row for row in here if row["contestant"] == name]
                plane.plot([r["value"] for r in mine], [r[quantity] for r in mine], marker="o", label=name)
            plane.set(xscale="log", yscale="log", xlabel=titles[axis] if line else "", ylabel=quantity)
            ticks = sorted({row["value"] for row in here})
            plane.set_xticks(ticks, [f"{t // 1024}k" if t >= 4096 else str(t) for t in ticks])
            plane.minorticks_off()
            plane.grid(alpha=0.3)
            if not line:
                plane.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
