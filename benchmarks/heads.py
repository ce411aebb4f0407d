"""The statistics head against the plain formulas and TRL's chunked functions: time and memory, forward and backward.

    python benchmarks/heads.py                      # the grid for this device; CSV and table in benchmarks/results
    python benchmarks/heads.py --n 1024 --h 512 --v 32768 --only tdpo

Implementations run in turn (A B A B), times are medians of 5, ratios are medians of the turns' ratios. All of them get
the same hidden states and heads of a policy (with gradients to both) and of a frozen reference, and must return the
same numbers, which is checked before timing. Speed is at the default `cache_mb`, memory at 0; both columns are shown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import peak_bytes, ratio, seconds, write

from prefopt.kernels.token_stats import token_stats

GRID = {  # (N, H, V)
    "cpu": [(1024, 512, 32768), (512, 512, 65536), (512, 512, 131072), (256, 1024, 131072)],
    "cuda": [(8192, 4096, 128256), (4096, 2048, 128256), (8192, 2048, 32768), (16384, 4096, 128256)],
}


class Case:
    """Hidden states and heads of one size, and every implementation's computation from them to gradients."""

    def __init__(self, n: int, h: int, v: int, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        make: dict[str, Any] = {"device": device, "dtype": dtype}
        self.hidden = torch.randn(n, h, **make).requires_grad_()
        self.weight = (torch.randn(v, h, **make) * (2 / h**0.5)).requires_grad_()
        self.ref_hidden = (self.hidden + 0.1 * torch.randn(n, h, **make)).detach()
        self.ref_weight = self.weight.detach().clone()
        self.labels = torch.randint(v, (n,), device=device)
        self.g_logp, self.g_kl = torch.randn(2, n, device=device)  # gradients that a loss would pass back

    def step(self, statistics_of: Callable[..., Any]) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        def run() -> tuple[torch.Tensor, torch.Tensor]:
            logp, ref_logp, kl = statistics_of(self)
            loss = (logp * self.g_logp).sum() + (0 if kl is None else (kl * self.g_kl).sum())
            hidden_grad, weight_grad = torch.autograd.grad(loss, (self.hidden, self.weight))
            del weight_grad
            return torch.stack([loss.detach(), ref_logp.sum()]), hidden_grad

        return run


def ours(want: tuple[str, ...], **settings: int) -> Callable[[Case], Any]:
    def statistics_of(c: Case) -> Any:
        stats = token_stats(
            c.hidden, c.weight, c.labels, ref_hidden=c.ref_hidden, ref_weight=c.ref_weight, want=want, **settings
        )
        return stats.logp, stats.ref_logp, stats.kl

    return statistics_of


def formula_dpo(c: Case) -> Any:
    """The log-probabilities as DPO's code writes them: all logits in float32, log-softmax, gather."""
    return _formula(c.hidden, c.weight, c.ref_hidden, c.ref_weight, c.labels, False)


def formula_tdpo(c: Case) -> Any:
    """TDPO's formula over all logits, with log_softmax where the authors' softmax().log() may underflow."""
    return _formula(c.hidden, c.weight, c.ref_hidden, c.ref_weight, c.labels, True)


def _formula(hidden: Any, weight: Any, ref_hidden: Any, ref_weight: Any, labels: Any, kl: bool) -> Any:
    index = labels[:, None]
    logps = (hidden @ weight.T).float().log_softmax(-1)
    with torch.no_grad():
        ref_logps = (ref_hidden @ ref_weight.T).float().log_softmax(-1)
    divergence = (ref_logps.exp() * (ref_logps - logps)).sum(-1) if kl else None
    return logps.gather(1, index)[:, 0], ref_logps.gather(1, index)[:, 0], divergence


def compiled(kl: bool) -> Callable[[Case], Any]:
    function = torch.compile(_formula)
    return lambda c: function(c.hidden, c.weight, c.ref_hidden, c.ref_weight, c.labels, kl)


def trl_dpo(c: Case) -> Any:
    """TRL's chunked log-probability of policy and reference, without its optional outputs."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    logp = ChunkedLogProbFunction.apply(c.hidden, c.weight, None, c.labels, 1.0, CHUNK, None, 1.0, ())[0]
    with torch.no_grad():
        ref = ChunkedLogProbFunction.apply(c.ref_hidden, c.ref_weight, None, c.labels, 1.0, CHUNK, None, 1.0, ())[0]
    return logp, ref, None


def trl_tdpo(c: Case) -> Any:
    """TDPO's statistics from TRL's two functions: the log-probabilities, then the forward KL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    logp, ref, _ = trl_dpo(c)
    kl = ChunkedDivergenceFunction.apply(c.hidden, c.weight, None, c.ref_hidden, c.ref_weight, None, 0.0)[0]
    return logp, ref, kl


def check_agreement(c: Case, contestants: dict[str, Callable[[Case], Any]], tolerance: float) -> None:
    """Check that every implementation returns the numbers of the first one, gradients included."""
    first: Any = None
    for name, statistics_of in contestants.items():
        found = c.step(statistics_of)()
        first = first or found
        for a, b in zip(found, first, strict=True):
            gap = float((a.double() - b.double()).norm() / b.double().norm())
            if gap > tolerance:
                raise SystemExit(f"{name} differs from {next(iter(contestants))} by {gap:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--n", type=int, help="tokens; with --h and --v one size instead of the grid")
    parser.add_argument("--h", type=int, help="hidden width")
    parser.add_argument("--v", type=int, help="vocabulary")
    parser.add_argument("--only", choices=["dpo", "tdpo"], help="one of the two tables")
    parser.add_argument("--repeats", default=5, type=int)
    parser.add_argument("--compile", action="store_true", help="torch.compile of the formula as one more contestant")
    parser.add_argument("--no_memory", action="store_true", help="time only")
    parser.add_argument("--no_time", action="store_true", help="memory only")
    parser.add_argument("--token_tile", type=int)
    parser.add_argument("--vocab_tile", type=int)
    parser.add_argument("--output", default=None, type=Path, help="folder; benchmarks/results by default")
    args = parser.parse_args()
    device, dtype = args.device, torch.bfloat16 if args.device == "cuda" else torch.float32
    sizes = [(args.n, args.h, args.v)] if args.n else GRID[device]
    tiles = {k: v for k, v in (("token_tile", args.token_tile), ("vocab_tile", args.vocab_tile)) if v}
    tables = {
        "dpo": {
            "prefopt": ours(("ref_logp",), **tiles),
            "prefopt, cache 0": ours(("ref_logp",), cache_mb=0, **tiles),
            "formula": formula_dpo,
            "TRL log-prob": trl_dpo,
        },
        "tdpo": {
            "prefopt": ours(("ref_logp", "kl"), **tiles),
            "prefopt, cache 0": ours(("ref_logp", "kl"), cache_mb=0, **tiles),
            "formula": formula_tdpo,
            "TRL composed": trl_tdpo,
            "TRL log-prob (DPO)": trl_dpo,
        },
    }
    if args.compile:
        for name, table in tables.items():
            table["formula, compiled"] = compiled(name == "tdpo")
    rows: list[dict[str, Any]] = []
    for n, h, v in sizes:
        case = Case(n, h, v, device, dtype)
        for name, contestants in tables.items():
            if args.only not in (None, name):
                continue
            same = {k: f for k, f in contestants.items() if not k.endswith("(DPO)")}
            check_agreement(case, same, 0.02 if dtype is torch.bfloat16 else 1e-4)
            runs = {k: case.step(f) for k, f in contestants.items()}
            times = {} if args.no_time else seconds(runs, device, args.repeats)
            for k, run in runs.items():
                row: dict[str, Any] = {"statistics": name, "N": n, "H": h, "V": v, "contestant": k}
                if times:
                    row["ms"] = 1e3 * statistics.median(times[k])
                    row["prefopt is faster by"] = ratio(times, k, "prefopt")
                    row["cache 0 is faster by"] = ratio(times, k, "prefopt, cache 0")
                if not args.no_memory:
                    row["peak MB"] = peak_bytes(run, device) / 2**20
                rows.append(row)
                print(row, flush=True)
    write(
        "heads-memory" if args.no_time else "heads",
        device,
        rows,
        [],
        **({"folder": args.output} if args.output else {}),
    )


if __name__ == "__main__":
    main()
