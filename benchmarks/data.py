"""The data pipeline at scale: seconds and memory from a file to batches, for 1,000 to 1,000,000 synthetic pairs.

    python benchmarks/data.py                                  # writes benchmarks/results/<date>-cpu-data.{csv,md}
    python benchmarks/data.py --pairs 1000 10000 --output DIR

The pairs are JSONL of random words with lengths like those of HH (exponential; see `write_pairs`), with a byte-level
BPE tokenizer of 2,000 tokens trained on them. Each phase runs in its own process:

- cold: read, tokenise, truncate and write the cache;
- warm, file untouched: the same call again, with the cached hash of the file; and without the cached hash;
- plan: hold out prompts by their hash, and the plan of one epoch, in random order, grouped by length and with a token
  budget; first batch: from the end of the imports to the pairs of step 1, as in training;
- random access: `FileBatches.global_batch` of 64 pairs at random steps, in pairs per second;
- two ranks: both call `encode_file` on a cold cache at the same time; one encodes, the other waits.

Memory. `anonymous` is the peak memory of a process without file mappings (RssAnon of /proc/self/status, read every
5 ms), which the machine must hold. `above imports` is the same minus its value after the imports. `mapped` is RssFile
at the end: pages of the cache file and of libraries, which the kernel can reclaim.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MAX_LENGTH, BATCH = 512, 64


def write_pairs(path: Path, pairs: int) -> None:
    """Random words: prompts of 5 to 200 (mean 30), completions of 2 to 100 (mean 14); every tenth repeats a prompt."""
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(draw.randint(2, 9))) for _ in range(3000)]

    def text(mean: float, low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=min(low + int(draw.expovariate(1 / mean)), high)))

    prompt = ""
    with path.open("w") as file:
        for i in range(pairs):
            prompt = prompt if i % 10 == 9 else f"{i} {text(25, 5, 200)}:"
            row = {"prompt": prompt, "chosen": " " + text(12, 2, 100), "rejected": " " + text(12, 2, 100)}
            file.write(json.dumps(row) + "\n")


def write_tokenizer(folder: Path, source: Path) -> None:
    """A byte-level BPE tokenizer of 2,000 tokens, trained on the first examples of a file."""
    from itertools import islice

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with source.open() as file:
        tokenizer.train_from_iterator(islice(file, 1000), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)


# One phase, in its own process ----------------------------------------------------------------------------------------


class Memory:
    """The largest RssAnon of this process within the context."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, resident("RssAnon"))

    def __enter__(self) -> Memory:
        self.before = resident("RssAnon")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, resident("RssAnon"))


def resident(kind: str) -> int:
    """Bytes of this process's memory of one kind, by the names of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {kind}")


def phase(name: str, source: Path, cache: Path, tokenizer_folder: Path) -> dict[str, float]:
    """Seconds of the parts of a phase, and its memory in MB."""
    from transformers import AutoTokenizer

    from prefopt.data.encode import encode_file
    from prefopt.data.loader import FileBatches
    from prefopt.data.split import split_by_prompt

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer(["a"])  # initialisation of the first call is not part of the data pipeline
    out: dict[str, float] = {}

    def timed(key: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        out[key] = time.perf_counter() - began
        return result

    with Memory() as memory:
        encoded = timed("open", lambda: encode_file(str(source), tokenizer, max_length=MAX_LENGTH, cache_dir=cache))
        if name == "steps":
            began = time.perf_counter()
            pairs, held_out = timed("split", lambda: split_by_prompt(encoded.pairs, 0.05))
            batches = FileBatches(pairs, BATCH, 0, encoded.fingerprint)
            timed("plan", lambda: batches.plan(0))
            batches.global_batch(0)
            out["first batch"] = out["open"] + time.perf_counter() - began
            timed("order hash", lambda: batches.order_hash)
            draw = random.Random(1)
            steps = [draw.randrange(batches.steps_per_epoch) for _ in range(200)]
            timed("access", lambda: [batches.global_batch(step) for step in steps])
            out["pairs per second"] = len(steps) * BATCH / out["access"]
            budget = 64 * 1024
            for key, grouped, tokens in (("grouped", True, None), ("tokens", False, budget), ("both", True, budget)):
                timed(
                    f"plan {key}",
                    lambda g=grouped, t=tokens: FileBatches(pairs, BATCH, 0, "x", g, t).plan(0),
                )
            out["held out"] = len(held_out)
    out |= {"anonymous MB": memory.peak / 1e6, "above imports MB": (memory.peak - memory.before) / 1e6}
    return out | {"mapped MB": resident("RssFile") / 1e6, "pairs": len(encoded.pairs)}


def alone(*args: object) -> dict[str, float]:
    """`phase` in its own process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--phase", *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _rank(args: tuple[object, ...], queue: Any) -> None:
    queue.put(alone(*args))


def two_ranks(*args: object) -> float:
    """Seconds until both of two processes have opened a file that is not cached."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_rank, args=(args, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    return max(one["open"] for one in found)


# All phases -----------------------------------------------------------------------------------------------------------


def measured(pairs: int, work: Path, ranks: bool) -> dict[str, Any]:
    """`measure`, or its cached result in this folder."""
    note = work / f"{pairs}.json"
    if not note.exists():
        note.write_text(json.dumps(measure(pairs, work, ranks)))
    row: dict[str, Any] = json.loads(note.read_text())
    return row


def measure(pairs: int, work: Path, ranks: bool) -> dict[str, Any]:
    """One row of the table."""
    source, cache, tokenizer = work / f"{pairs}.jsonl", work / "cache", work / "tokenizer"
    if not source.exists():
        write_pairs(source, pairs)
    if not tokenizer.exists():
        write_tokenizer(tokenizer, source)
    shutil.rmtree(cache, ignore_errors=True)
    time.sleep(3)  # the file's times must be older than the hash, see `prefopt.data.content`
    cold = alone("cold", source, cache, tokenizer)
    shutil.rmtree(cache / "hashes")
    forgotten = alone("warm", source, cache, tokenizer)
    warm = alone("warm", source, cache, tokenizer)
    steps = alone("steps", source, cache, tokenizer)
    row: dict[str, Any] = {
        "pairs": pairs,
        "file MB": source.stat().st_size / 1e6,
        "cache MB": sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) / 1e6,
        "cold s": cold["open"],
        "cold pairs/s": pairs / cold["open"],
        "cold anonymous MB": cold["anonymous MB"],
        "warm s": warm["open"],
        "warm, hash forgotten s": forgotten["open"],
        "first batch s": steps["first batch"],
        "split s": steps["split"],
        "plan s": steps["plan"],
        "plan grouped s": steps["plan grouped"],
        "plan tokens s": steps["plan tokens"],
        "plan both s": steps["plan both"],
        "order hash s": steps["order hash"],
        "access pairs/s": steps["pairs per second"],
        "steps anonymous MB": steps["anonymous MB"],
        "steps above imports MB": steps["above imports MB"],
        "steps mapped MB": steps["mapped MB"],
    }
    if ranks:
        shutil.rmtree(cache)
        row["two ranks, cold s"] = two_ranks("cold", source, cache, tokenizer)
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", type=int, default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument(
        "--ranks", type=int, default=100_000, help="two ranks up to so many pairs; they cost a cold start"
    )
    parser.add_argument(
        "--work", type=Path, help="folder that keeps files, cache and what was measured; a temporary one by default"
    )
    parser.add_argument("--output", type=Path, help="folder; benchmarks/results by default")
    parser.add_argument("--phase", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        print(json.dumps(phase(args.phase[0], *map(Path, args.phase[1:]))))
        return
    sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
    from measure import write

    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        rows = [measured(pairs, work, pairs <= args.ranks) for pairs in args.pairs]
    by_pairs = {row["pairs"]: row for row in rows}
    notes = [
        f"Synthetic pairs as `benchmarks/data.py` describes them, max_length {MAX_LENGTH}, {BATCH} pairs per step, "
        "token budget 65,536; one process, tokenisers' own threads. MB are 10^6 bytes.",
        "anonymous: largest RssAnon (memory that is no file's), sampled every 5 ms; mapped: RssFile, which holds the "
        "libraries too and which the kernel may take back.",
    ]
    if {10_000, 1_000_000} <= by_pairs.keys():
        for kind in ("cold anonymous MB", "steps anonymous MB"):
            ratio = by_pairs[1_000_000][kind] / by_pairs[10_000][kind]
            notes.append(f"{kind}: at 1,000,000 pairs {ratio:.3f} times that at 10,000.")
    write("data", "cpu", rows, notes, **({"folder": args.output} if args.output else {}))


if __name__ == "__main__":
    main()
