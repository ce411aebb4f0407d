"""Memory predicted by `prefopt plan` against measured memory: tensor bytes of a rank at the peak of a step, on a CPU.

    python benchmarks/plan.py                       # all cases, two gloo ranks with each backend: some minutes
    python benchmarks/plan.py --only zero3

A case is a Llama of some shape, with random weights, whose trainer takes two steps over pairs of one length; the peak
is that of both steps, from torch's record of its CPU allocator. Cases of kind `fit` were used to set the constants of
`prefopt.planner.memory` and the form of some terms; the others have kind `prediction`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]


class Case(NamedTuple):
    """A run. Shape: hidden, intermediate, layers, heads, vocabulary, whether the head is the embedding."""

    shape: tuple[int, int, int, int, int, bool]
    engine: str
    method: str = "dpo"
    micro: int = 2
    accumulation: int = 1
    prompt: int = 64
    response: int = 64
    checkpointing: bool = False
    lora: int | None = None
    fitted: bool = False

    @property
    def world(self) -> int:
        return 1 if self.engine == "single process" else 2

    def config(self, folder: str) -> Any:
        """The settings of this run."""
        from prefopt.settings import parse

        words = {
            "method": self.method,
            "model.path": folder,
            "data.train": "pairs.jsonl",
            "data.max_length": self.prompt + self.response,
            "train.micro_batch": self.micro,
            "train.global_batch": self.micro * self.world * self.accumulation,
            "train.layout": "padded",
            "model.gradient_checkpointing": str(self.checkpointing).lower(),
        }
        words |= {"lora.r": self.lora} if self.lora else {}
        return parse([part for key, value in words.items() for part in (f"--{key}", str(value))])


BUCKET = 1_000_000  # DeepSpeed's default is 500 times as large, more than these models hold


def save(case: Case, folder: Path) -> None:
    """The model of a case."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(llama(case.shape)).save_pretrained(folder)


def trainer_of(runtime: Any, case: Case, folder: str) -> Any:
    """A prepared trainer of the model that `save` wrote."""
    from step import fixed

    from prefopt.data.loader import FileBatches
    from prefopt.training import adapter_loading, model_sources
    from prefopt.training.forward import PolicyWithReference
    from prefopt.training.trainer import Trainer

    config = case.config(folder)
    if runtime.backend.startswith("zero"):
        hidden, zero = case.shape[0], runtime.deepspeed_settings["zero_optimization"]
        zero["reduce_bucket_size"] = hidden**2 if runtime.backend == "zero3" else BUCKET
        # as accelerate fills in the `auto` of configs/deepspeed/zero3.json
        zero |= {"stage3_prefetch_bucket_size": int(0.9 * hidden**2)}
        zero |= {"stage3_param_persistence_threshold": 10 * hidden}
    start = model_sources.ModelSource(folder, folder)
    of = model_sources.choose_reference(config, start)
    pairs = fixed(2 * config.train.global_batch, case.prompt, case.response, case.shape[4])
    batches = FileBatches(pairs, config.train.global_batch, 0, "rows", group_by_length=False)
    with runtime.sharded_loading():
        lm = adapter_loading.load_policy(config, start, of)
        reference: Any = (
            adapter_loading.load_frozen(of, config.model, "x") if isinstance(of, model_sources.ModelSource) else of
        )
    policy = PolicyWithReference(lm, reference, config.kernel)
    for parameter in policy.parameters():  # the allocator does not record pages of a memory-mapped file
        if not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.clone()
    tokenizer: Any = NoTokenizer()  # examples are token ids already
    trainer = Trainer(
        config=config,
        runtime=runtime,
        policy=policy,
        tokenizer=tokenizer,
        train=batches,
        eval_pairs=[],
        output=Path(folder),
    )
    trainer.prepare()
    return trainer


class NoTokenizer:
    """The members that a trainer over token ids needs."""

    pad_token_id = 1

    def save_pretrained(self, folder: Path) -> None:
        """Writes nothing."""


def measured(runtime: Any, case: Case, folder: str) -> dict[str, int]:
    """Bytes of this rank: at the peak, and between two steps. Runs on each rank."""
    import torch

    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        trainer = trainer_of(runtime, case, folder)
        for step in range(2):
            with torch.profiler.record_function(f"mark {step}"):
                pass
            trainer._step(step)
    marks: list[int] = []
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name().startswith("mark "):
            marks.append(held)
        elif event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held) if marks else 0
    return {"peak": peak, "quiet": marks[1], "prepared": marks[0]}


def run(case: Case) -> dict[str, int]:
    """The measurement of a case on rank 0."""
    from tests.dist.ranks import run_ranks

    with tempfile.TemporaryDirectory() as folder:
        save(case, Path(folder))
        if case.engine != "single process":
            return run_ranks(measured, case, folder, world=2, engine=case.engine)[0]
        import torch

        from prefopt.training import runtime as rt
        from prefopt.training import signals

        torch.set_num_threads(1)
        runtime = rt.start(
            signals.Stop(),
            seed=0,
            mixed_precision="no",
            deterministic=False,
            trackers=(),
            output=Path(folder),
            rendezvous_timeout=60,
        )
        found = measured(runtime, case, folder)
        runtime.accelerator.free_memory()
        return found


# hidden, intermediate, layers, heads, vocabulary, tied
SHAPES: dict[str, tuple[int, int, int, int, int, bool]] = {
    "1M": (128, 344, 4, 4, 2048, False),
    "9M": (256, 688, 6, 4, 8192, False),
    "14M": (384, 1024, 8, 6, 2048, False),
    "21M tied": (512, 1376, 4, 8, 16384, True),
    "36M": (512, 1376, 10, 8, 4096, False),
    "60M": (640, 1720, 8, 10, 16384, False),
}
TWO = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
CASES = [
    *(Case(SHAPES[shape], engine, fitted=True) for shape in ("9M", "14M") for engine in ("single process", *TWO)),
    # the plan's terms for tied heads and FSDP2's gradients were derived from these
    *(Case(SHAPES["21M tied"], engine, "tdpo", fitted=engine in TWO[3:]) for engine in ("single process", *TWO)),
    *(Case(SHAPES["14M"], engine, accumulation=2, fitted=engine == "fsdp2") for engine in TWO),
    # and the term for memory at the end of a backward pass from these
    *(Case(SHAPES["14M"], engine, checkpointing=True, micro=4, fitted=True) for engine in ("single process", *TWO)),
    *(Case(SHAPES["9M"], engine, lora=8) for engine in ("single process", "ddp", "zero2", "zero3", "fsdp2")),
    *(Case(SHAPES["1M"], engine, prompt=192) for engine in ("single process", *TWO)),
    # and the copy of gradients in ZeRO's step from these
    *(Case(SHAPES["60M"], engine, micro=1, fitted=engine in TWO[1:3]) for engine in ("single process", *TWO)),
    # measured after all constants were fixed
    *(
        Case(SHAPES["36M"], engine, "tdpo", micro=1, accumulation=2, prompt=96, response=160)
        for engine in ("single process", *TWO)
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases of this engine alone")
    parser.add_argument("--kept", type=Path, help="JSONL of measurements: those that it holds are not made again")
    parser.add_argument("--output", default=None, type=Path, help="folder; benchmarks/results by default")
    args = parser.parse_args()
    known: dict[str, Any] = {}
    if args.kept and args.kept.exists():
        known = {line["case"]: line for line in map(json.loads, args.kept.read_text().splitlines())}
    rows = []
    for case in CASES:
        if args.only and case.engine != args.only:
            continue
        name = json.dumps(case._replace(fitted=False))
        if name not in known:
            known[name] = {"case": name, **run(case)}
            if args.kept:
                with args.kept.open("a") as handle:
                    handle.write(json.dumps(known[name]) + "\n")
        rows.append(compared(case, known[name]["peak"]))
        print(rows[-1], flush=True)
    from measure import write

    others = sorted(abs(row["error"]) for row in rows if row["used"] == "prediction")
    fitted = sorted(abs(row["error"]) for row in rows if row["used"] == "fit")
    notes = [
        f"{len(others)} predictions: median error {others[len(others) // 2]:.1%}, largest {others[-1]:.1%}, "
        f"{sum(error <= 0.15 for error in others)} within 15%. {len(fitted)} cases of the fit: largest error "
        f"{fitted[-1]:.1%} (ZeRO-3 with recomputed activations holds less than what it gathers in the plan).",
        "Peak: tensor bytes that a rank holds at most in two steps, from torch's record of its CPU allocator; float32, "
        "AdamW, padded rows, two gloo ranks but for one process.",
        f"DeepSpeed's bucket is {BUCKET:,} entries here under zero1 and zero2 (its own would be 500 times as large).",
    ]
    write("plan", "cpu", rows, notes, **({"folder": args.output} if args.output else {}))


def compared(case: Case, peak: int) -> dict[str, Any]:
    """A row of the table."""
    from prefopt.kernels.token_stats import TILES
    from prefopt.planner.activations import largest_micro_batch
    from prefopt.planner.memory import Assumptions, memory_of
    from prefopt.planner.model_counts import read_model

    with tempfile.TemporaryDirectory() as folder:
        llama(case.shape).save_pretrained(folder)
        config = case.config(folder)
        batch = largest_micro_batch(config, case.response / (case.prompt + case.response))
        model = read_model(config, batch)
    assumed = Assumptions(reduce_bucket=BUCKET, overhead=0.0, tiles=TILES["cpu"], overlap=False)
    found = memory_of(config, model, batch, case.engine, case.world, assumed)
    return {
        "used": "fit" if case.fitted else "prediction",
        "weights": f"{model.parameters / 1e6:.1f}M",
        "engine": case.engine,
        "method": case.method,
        "micro_batch": case.micro,
        "accumulation": case.accumulation,
        "length": case.prompt + case.response,
        "checkpointing": case.checkpointing,
        "lora.r": case.lora or "",
        "peak MB": round(peak / 1e6, 1),
        "predicted MB": round(found.total / 1e6, 1),
        "error": found.total / peak - 1,
    }


def llama(shape: tuple[int, int, int, int, int, bool]) -> Any:
    """The config of a Llama."""
    from transformers import LlamaConfig

    hidden, intermediate, layers, heads, vocabulary, tied = shape
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    main()
