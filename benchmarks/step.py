"""Whole training steps: prefopt's layouts and methods against TRL's DPOTrainer, on the same model and pairs.

    python benchmarks/step.py --data.train pairs.jsonl --data.on_bad_row skip
    python benchmarks/step.py --tables lengths              # pairs of fixed lengths alone; needs no file
    python benchmarks/step.py --tables methods --rows 24    # whole steps of each method against dpo

Implementations run in turn (A B A B), a turn is one pass over the same pairs, collation included; times are medians of
5, ratios medians of the turns' ratios. All have a live reference, no gradient checkpointing, and the same token ids,
dtype, attention, optimizer, threads and batch. Without --data.train the pairs are random ids with lengths like HH.

MFU: (6 for the policy, 4 with an adapter, + 2 for the reference) operations per weight of backbone and head, and those
of attention, over tokens that are neither padding nor a repeated prompt, divided by time x the GPU's dense bf16 peak.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import peak_bytes, ratio, seconds, write

from prefopt import registry
from prefopt.data.loader import FileBatches
from prefopt.data.unpaired import Mismatched, encoded_as_two
from prefopt.method import Method
from prefopt.methods.dpo import DPO
from prefopt.settings import LoraConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from prefopt.training import adapter_loading, model_sources, signals
from prefopt.training import runtime as rt
from prefopt.training.forward import PolicyWithReference
from prefopt.training.models import quiet_transformers
from prefopt.training.run import TrainingRun
from prefopt.training.trainer import Trainer
from prefopt.types import EncodedPair


class Shape(NamedTuple):
    """The shape of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool


SHAPES = {
    "6M": Shape(256, 640, 4, 4, 4, 6016, False),
    "1B": Shape(2048, 8192, 16, 32, 8, 128256, True),
    "3B": Shape(3072, 8192, 28, 24, 8, 128256, True),
    "8B": Shape(4096, 14336, 32, 32, 8, 128256, False),
}
LENGTHS = {  # (prompt, response)
    "cpu": [(128, 128), (256, 128), (512, 128), (512, 512)],
    "cuda": [(1024, 1024), (2048, 2048), (1600, 400), (3200, 800), (6400, 1600)],
}
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16 operations per second
TRL = "TRL DPOTrainer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", choices=list(SHAPES), help="6M on a CPU, 1B on a GPU by default")
    parser.add_argument("--lora", type=int, help="rank of an adapter instead of training all weights")
    parser.add_argument("--tables", nargs="+", default=["rows", "lengths"], choices=["rows", "lengths", "methods"])
    parser.add_argument("--data.train", dest="train", type=Path, help="pairs for the table of rows")
    parser.add_argument("--data.on_bad_row", dest="on_bad_row", default="error", choices=["error", "skip"])
    parser.add_argument("--rows", default=96, type=int, help="pairs in one pass")
    parser.add_argument("--batch", default=4, type=int, help="pairs per step")
    parser.add_argument("--max_length", default=512, type=int)
    parser.add_argument("--repeats", default=5, type=int)
    parser.add_argument("--output", default=None, type=Path, help="folder; benchmarks/results by default")
    args = parser.parse_args()
    shape = args.shape or ("6M" if args.device == "cpu" else "1B")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.device, shape, args.lora, args.batch)
        for table in args.tables:
            rows = getattr(bench, f"{table}_table")(args)
            name = f"step-{table}-{shape}" + (f"-lora{args.lora}" if args.lora else "")
            notes = [f"{shape} Llama, {args.batch} pairs per step, medians of {args.repeats} turns."]
            notes += ["Peak memory is what a pass takes beyond weights, references and optimizer states."]
            stem = write(name, args.device, rows, notes, **({"folder": args.output} if args.output else {}))
            if table != "methods":
                plot(rows, stem.with_suffix(".png"))


def unpaired(pairs: Sequence[EncodedPair]) -> Mismatched:
    """The two sides of each pair as examples with a label, and a mismatched completion each."""
    examples = [replace(one, prompt_key=f"{i:x}") for i, pair in enumerate(pairs) for one in encoded_as_two(pair)]
    return Mismatched(examples, 10**6)


class Bench:
    """One model on one device, and every implementation's pass over some pairs with it."""

    def __init__(self, folder: Path, device: str, shape: str, lora: int | None, batch: int) -> None:
        self.folder, self.device, self.batch, self.lora = folder, device, batch, lora
        self.mixed = "bf16" if device == "cuda" else "no"
        self.runtime = rt.start(
            signals.Stop(),
            seed=0,
            mixed_precision=self.mixed,
            deterministic=False,
            trackers=(),
            output=folder,
            rendezvous_timeout=60,
        )
        self.shape = SHAPES[shape]
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=self.shape.vocabulary,
            hidden_size=self.shape.hidden,
            intermediate_size=self.shape.intermediate,
            num_hidden_layers=self.shape.layers,
            num_attention_heads=self.shape.heads,
            num_key_value_heads=self.shape.kv_heads,
            max_position_embeddings=16384,
            tie_word_embeddings=self.shape.tied,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
        )
        torch.manual_seed(0)
        dtype = torch.bfloat16 if lora else torch.float32
        with torch.device(device), quiet_transformers():
            LlamaForCausalLM(config).to(dtype).save_pretrained(folder / "model")
        self.dtype = "bfloat16" if lora else "float32"

    def ours(self, pairs: Sequence[EncodedPair], method: str | Method = "dpo", **train: Any) -> Callable[[], float]:
        """A pass of prefopt's trainer over the pairs."""
        one = registry.get(method)() if isinstance(method, str) else method
        examples, batch = (pairs, self.batch) if one.needs.rows != "unpaired" else (unpaired(pairs), 2 * self.batch)
        config = RunConfig(
            method=one,
            method_name="measured",
            model=ModelConfig(path=str(self.folder / "model"), dtype=self.dtype),
            lora=LoraConfig(r=self.lora),
            optim=OptimConfig(clip=1.0),
            train=TrainConfig(
                **{"global_batch": batch, "micro_batch": batch, "mixed_precision": self.mixed, "max_steps": 10**6}
                | train
            ),
        )
        start = model_sources.ModelSource(config.model.path, config.model.path)
        lm = adapter_loading.load_policy(config, start, model_sources.choose_reference(config, start))
        reference: Any = model_sources.choose_reference(config, start)
        if isinstance(reference, model_sources.ModelSource):
            reference = adapter_loading.load_frozen(reference, config.model, "model.path")
        batches = FileBatches(examples, batch, 0, "rows", group_by_length=config.train.group_by_length)
        training = TrainingRun(
            config=config,
            runtime=self.runtime,
            policy=PolicyWithReference(lm, reference, config.kernel).to(self.device),
            tokenizer=SimpleNamespace(pad_token_id=1),
            train=batches,
            eval_pairs=[],
            output=self.folder,
        )
        trainer = Trainer(training)
        trainer.prepare()
        steps = iter(range(10**6))

        def run() -> float:
            began = time.perf_counter()
            lines = [trainer._step(next(steps)).line() for _ in range(batches.steps_per_epoch)]
            taken = time.perf_counter() - began
            fed = sum(line["tokens_processed"] for line in lines)
            run.padded = 1 - fed / sum(line["tokens_processed"] / (1 - line["padding_fraction"]) for line in lines)
            return taken

        return run

    def trl(self, pairs: Sequence[EncodedPair], grouped: bool) -> Callable[[], float]:
        """A pass of TRL's trainer over the pairs; grouped: sorted by length and taken in that order."""
        from datasets import Dataset, disable_progress_bars
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
        from trl import DPOConfig, DPOTrainer

        disable_progress_bars()
        warnings.simplefilter("ignore", FutureWarning)  # TRL's and transformers' of each other
        if grouped:
            pairs = sorted(pairs, key=lambda p: len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids or ())))
        args = DPOConfig(
            output_dir=str(self.folder / "trl"),
            use_cpu=self.device == "cpu",
            bf16=self.mixed == "bf16",
            report_to="none",
            save_strategy="no",
            logging_steps=10**6,
            disable_tqdm=True,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential" if grouped else "random",
            per_device_train_batch_size=self.batch,
            max_length=max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids or ())) for p in pairs),
            num_train_epochs=1,
            optim="adamw_torch_fused",
        )
        peft: Any = None
        if self.lora:
            from peft import LoraConfig as PeftLora

            peft = PeftLora(r=self.lora, lora_alpha=2 * self.lora, target_modules="all-linear")
        with quiet_transformers():
            model, reference = (
                AutoModelForCausalLM.from_pretrained(self.folder / "model", dtype=getattr(torch, self.dtype))
                for _ in range(2)
            )
        trainer = DPOTrainer(
            model,
            None if self.lora else reference,
            args,
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=_tokenizer(PreTrainedTokenizerFast),
            peft_config=peft,
        )
        # the same ids that prefopt gets, instead of TRL's own tokenisation
        keys = {"prompt_ids": "prompt_ids", "chosen_ids": "chosen_ids", "rejected_ids": "rejected_ids"}
        trainer.train_dataset = Dataset.from_list([{k: getattr(p, v) for k, v in keys.items()} for p in pairs])
        clock: dict[str, float] = {}

        class Clock(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                clock.setdefault("began", time.perf_counter())

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock["ended"] = time.perf_counter()

        trainer.add_callback(Clock())

        def run() -> float:
            clock.clear()
            trainer.train()
            return clock["ended"] - clock["began"]

        return run

    def measure(self, runs: dict[str, Callable[[], float]], pairs: Sequence[EncodedPair], args: Any) -> list[dict]:
        times = seconds(runs, self.device, args.repeats)
        tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids or ()) for p in pairs)
        rows = []
        for name, run in runs.items():
            median = statistics.median(times[name])
            row: dict[str, Any] = {"contestant": name, "pairs/s": len(pairs) / median, "tokens/s": tokens / median}
            row["padded share"] = getattr(run, "padded", "")
            row["peak MB"] = peak_bytes(run, self.device) / 2**20
            if self.device == "cuda":
                row["MFU"] = self.flops(pairs) / median / _peak()
            for other in runs:
                if other.startswith((TRL, "prefopt padded")) and not name.startswith(TRL):
                    row[f"faster than {other}"] = ratio(times, other, name)
            rows.append(row)
        return rows

    def rows_table(self, args: Any) -> list[dict]:
        """Pairs of varying length: layouts, methods and orders."""
        pairs = self._encoded(args) if args.train else _like_hh(args.rows, args.max_length, self.shape.vocabulary)
        runs = {
            "prefopt dpo, auto, grouped": self.ours(pairs, group_by_length=True),
            "prefopt padded dpo, grouped": self.ours(pairs, layout="padded", group_by_length=True),
            "prefopt dpo, auto, random order": self.ours(pairs),
            "prefopt tdpo, auto, grouped": self.ours(pairs, "tdpo", group_by_length=True),
            f"{TRL}, grouped": self.trl(pairs, grouped=True),
            f"{TRL}, its default order": self.trl(pairs, grouped=False),
        }
        return self.measure(runs, pairs, args)

    def methods_table(self, args: Any) -> list[dict]:
        """Whole steps of every method that trains a language model, against DPO's on the same pairs.

        Unpaired examples are the two sides of the pairs, so that a step has as many completions.
        """
        pairs = self._encoded(args) if args.train else _like_hh(args.rows, args.max_length, self.shape.vocabulary)
        names = {c.name: 0.5 for n in registry.names() for c in registry.get(n)().needs.columns}
        pairs = [replace(pair, columns=names) for pair in pairs]
        ways: dict[str, Method] = {"dpo": DPO()}
        ways |= {
            name: registry.get(name)() for name in registry.names() if registry.get(name)().needs.output != "scores"
        }
        ways |= {f"dpo {variant}": DPO(variant=variant) for variant in ("ipo_mean", "bco", "aot", "aot_unpaired")}
        runs = {name: self.ours(pairs, method) for name, method in ways.items()}
        half = {"micro_batch": self.batch // 2}
        runs |= {f"{name}, 2 micro-batches": self.ours(pairs, ways[name], **half) for name in ("dpo", "dpo bco")}
        times = seconds(runs, self.device, args.repeats)
        return [
            {
                "method": name,
                "pairs/s": len(pairs) / statistics.median(times[name]),
                "time of dpo": ratio(times, name, "dpo, 2 micro-batches" if name.endswith("micro-batches") else "dpo"),
            }
            for name in runs
        ]

    def lengths_table(self, args: Any) -> list[dict]:
        """Pairs of one length: the gain of prefix sharing."""
        table = []
        for prompt, response in LENGTHS[self.device]:
            pairs = fixed(2 * self.batch, prompt, response, self.shape.vocabulary)
            layouts = ("padded", "prefix_shared", "auto")
            runs = {f"prefopt {layout}": self.ours(pairs, layout=layout) for layout in layouts}
            if self.device == "cuda":
                runs[TRL] = self.trl(pairs, grouped=True)
            rows = self.measure(runs, pairs, args)
            table += [{"prompt": prompt, "response": response, **row} for row in rows]
            for row in table[-len(rows) :]:
                print(row, flush=True)
            del runs
            self.forget()
        return table

    def forget(self) -> None:
        """Release all models so far, to which accelerate holds references."""
        self.runtime.accelerator.free_memory()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def flops(self, pairs: Sequence[EncodedPair]) -> float:
        """Operations of one pass, by the definition of MFU above."""
        hidden, intermediate, layers, heads, kv_heads, vocabulary, _ = self.shape
        width = hidden * kv_heads // heads
        weights = layers * (2 * hidden * hidden + 2 * hidden * width + 3 * hidden * intermediate)
        total = 0.0
        for p in pairs:
            prompt, chosen, rejected = len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids or ())
            seen = (prompt + chosen) ** 2 / 2 + rejected * prompt + rejected**2 / 2
            total += weights * (prompt + chosen + rejected) + hidden * vocabulary * (chosen + rejected)
            total += 2 * layers * hidden * seen
        return (6 if self.lora else 8) * total  # frozen weights need no weight gradient

    def _encoded(self, args: Any) -> list[EncodedPair]:
        """Pairs of a file, tokenised by a byte-level BPE that is trained on it."""
        from hh import make_base
        from transformers import AutoTokenizer

        from prefopt.data.encode import encode_file

        base = make_base(
            args.train, self.folder / "tokenizer", vocabulary=self.shape.vocabulary if self.device == "cpu" else 8192
        )
        tokenizer = AutoTokenizer.from_pretrained(base)
        encoded = encode_file(
            str(args.train),
            tokenizer,
            max_length=args.max_length,
            need_rejected=True,
            extra=(),
            columns={},
            on_bad_row=args.on_bad_row,
            vocab_rows=self.shape.vocabulary,
            cache_dir=self.folder / "encoded",
        )
        order = torch.randperm(len(encoded.pairs), generator=torch.Generator().manual_seed(0)).tolist()
        return [encoded.pairs[i] for i in order[: args.rows]]


def plot(rows: list[dict], path: Path) -> None:
    """Pairs per second and peak memory of each implementation, grouped by length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [f"{r['prompt']}/{r['response']} {r['contestant']}" if "prompt" in r else r["contestant"] for r in rows]
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row["contestant"] for row in rows))}
    figure, planes = plt.subplots(1, 2, figsize=(10, 0.6 + 0.35 * len(rows)), sharey=True, layout="constrained")
    for plane, quantity in zip(planes, ("pairs/s", "peak MB"), strict=True):
        values = [row[quantity] for row in rows]
        bars = plane.barh(labels, values, color=[colours[row["contestant"]] for row in rows])
        plane.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
        plane.set(xlabel=quantity, xlim=(0, 1.15 * max(values)))
    planes[0].invert_yaxis()
    figure.savefig(path, dpi=130)
    print(f"written: {path}")


def _tokenizer(cls: Any) -> Any:
    """The smallest tokenizer that TRL's trainer accepts."""
    from tokenizers import Tokenizer, models

    return cls(
        tokenizer_object=Tokenizer(models.WordLevel({"</s>": 0, "<pad>": 1, "a": 2, "b": 3, "c": 4}, "a")),
        eos_token="</s>",
        pad_token="<pad>",
    )


def _pair(draw: np.random.Generator, prompt: int, chosen: int, rejected: int, vocabulary: int) -> EncodedPair:
    ids = [draw.integers(5, vocabulary, n).tolist() for n in (prompt, chosen, rejected)]
    return EncodedPair(*ids, [True] * chosen, [True] * rejected)


def _like_hh(rows: int, max_length: int, vocabulary: int) -> list[EncodedPair]:
    """Random ids with lengths like those of HH: medians of 100 and 45 tokens, long tails."""
    draw = np.random.default_rng(0)
    pairs = []
    for prompt, chosen, rejected in draw.lognormal(np.log([100, 45, 45]), [0.8, 0.9, 0.9], (rows, 3)):
        response = [int(np.clip(n, 2, max_length // 2)) for n in (chosen, rejected)]
        pairs.append(_pair(draw, int(np.clip(prompt, 4, max_length - max(response))), *response, vocabulary))
    return pairs


def fixed(rows: int, prompt: int, response: int, vocabulary: int) -> list[EncodedPair]:
    """Random ids, all pairs of one length."""
    draw = np.random.default_rng(0)
    return [_pair(draw, prompt, response, response, vocabulary) for _ in range(rows)]


def _peak() -> float:
    name = torch.cuda.get_device_name()
    return next((peak for card, peak in PEAK.items() if card in name), float("nan"))


if __name__ == "__main__":
    main()
