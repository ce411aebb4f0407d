"""The effect of each memory and speed option on a step: time and peak memory, measured in turn on one model.

Whole steps of the trainer (including collation, clipping and optimizer), DPO with a live reference, a small Llama,
pairs of realistic length. On a CPU, host memory is device memory, so offloading shows its cost only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import peak_bytes, ratio, seconds, write

from prefopt import registry
from prefopt.data.loader import FileBatches
from prefopt.settings import LoraConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from prefopt.training import adapter_loading, model_sources, signals
from prefopt.training import runtime as rt
from prefopt.training.forward import PolicyWithReference
from prefopt.training.trainer import Trainer
from prefopt.types import EncodedPair

LORA = {"lora": {"r": 16}}
CONTESTANTS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "gradient checkpointing": {"model": {"gradient_checkpointing": True}},
    "offloaded activations": {"model": {"offload_activations": True}},
    "both": {"model": {"gradient_checkpointing": True, "offload_activations": True}},
    "compiled": {"train": {"compile": True}},
    "adamw_8bit": {"optim": {"name": "adamw_8bit"}},
    "adafactor": {"optim": {"name": "adafactor"}},
    "lora": LORA,
    "lora, compiled": {**LORA, "train": {"compile": True}},
    "qlora nf4": {**LORA, "model": {"quantize": "nf4"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    runtime = rt.start(
        signals.Stop(),
        seed=0,
        mixed_precision="no",
        deterministic=False,
        trackers=(),
        output=Path(),
        rendezvous_timeout=60,
    )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", args.hidden, args.layers)
        pairs = make_pairs(args.pairs)
        steps = {}
        for name, settings in CONTESTANTS.items():
            trainer = make_trainer(runtime, model, pairs, settings)
            steps[name] = lambda trainer=trainer: float(trainer._step(0)["seconds"])
        times = seconds(steps, args.device, args.repeats)
        rows = [
            {
                "option": name,
                "median s": statistics.median(times[name]),
                "times as fast as all weights": ratio(times, "all weights", name),
                "peak MiB of a step": peak_bytes(steps[name], args.device) / 2**20,
            }
            for name in CONTESTANTS
        ]
    notes = [
        f"Seconds of a step of {args.pairs} pairs (256 + 128 tokens), {args.layers} layers of width {args.hidden}, one "
        f"micro-batch; {args.repeats} turns after one that compiles. Peak: tensor bytes beyond weights and optimizer."
    ]
    write("options", args.device, rows, notes)


def make_model(folder: Path, hidden: int, layers: int) -> Path:
    """A small Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    LlamaForCausalLM(LlamaConfig(vocab_size=8192, num_attention_heads=4, **sizes)).save_pretrained(folder)
    return folder


def make_pairs(pairs: int) -> list[EncodedPair]:
    """Pairs of random tokens, of nearly the same length."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(5, 8192, (length,), generator=generator).tolist()

    return [
        EncodedPair(ids(256 - i), ids(128 - 2 * i), ids(128 - i), [True] * (128 - 2 * i), [True] * (128 - i))
        for i in range(pairs)
    ]


def make_trainer(runtime: rt.Runtime, path: Path, pairs: list[EncodedPair], settings: dict[str, Any]) -> Trainer:
    """A trainer that is ready for steps on these pairs."""
    method = registry.get("dpo")()
    train = {"global_batch": len(pairs), "micro_batch": len(pairs), "max_steps": 1}
    config = RunConfig(
        method=method,
        method_name="dpo",
        model=ModelConfig(**({"path": str(path)} | settings.get("model", {}))),
        lora=LoraConfig(**settings.get("lora", {})),
        optim=OptimConfig(**({"lr": 1e-6, "warmup_ratio": 0.0} | settings.get("optim", {}))),
        train=TrainConfig(**(train | settings.get("train", {}))),
    )
    start = model_sources.find(str(path), config.model)
    reference: Any = model_sources.choose_reference(config, start)
    lm = adapter_loading.load_policy(config, start, reference)
    if isinstance(reference, model_sources.ModelSource):
        reference = adapter_loading.load_frozen(reference, config.model, "model.path")
    trainer = Trainer(
        config=config,
        runtime=runtime,
        policy=PolicyWithReference(lm, reference, config.kernel),
        tokenizer=type("Padding", (), {"pad_token_id": 0})(),
        train=FileBatches(pairs, len(pairs), 0, "random"),
        eval_pairs=[],
        output=Path(),
    )
    trainer.prepare()
    known = runtime.accelerator._optimizers
    known.clear()  # the optimizer whose gradients a scaler would unscale
    return trainer


if __name__ == "__main__":
    main()
