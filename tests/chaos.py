"""SIGKILLs at random moments over training, a reference's pass, rounds and sweeps, and what is left when all is done.

    python -m tests.chaos [--kills 100] [--damages 30] [--seed 0]

Each scenario is run once undisturbed. Then it is started again and again in fresh folders and killed after a time drawn
from its undisturbed length, a few times in a row, and let end. Its weights must be those of the undisturbed run, bit by
bit; no file that it names may be damaged, and no attempt may take longer than ten times the undisturbed run.
Then files are damaged, see `damages`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prefopt.training import checkpoint
from tests import damages
from tests.fork_server import ROOT, ForkServer
from tests.helpers import byte_bpe_tokenizer, tiny_llama

MOST_IN_A_ROW = 4


@dataclass(frozen=True)
class Scenario:
    """One kind of work. Args: start: (a folder, kill after so many seconds or never) -> (exit status, seconds)."""

    name: str
    start: Callable[[Path, float | None], tuple[int, float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", default=100, type=int)
    parser.add_argument("--damages", default=30, type=int)
    parser.add_argument("--seed", default=0, type=int)
    args = parser.parse_args()
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.kills:
            (Path(folder) / "kills").mkdir()
            found["kills"] = chaos(Path(folder) / "kills", args.kills, args.seed)
        if args.damages:
            (Path(folder) / "damages").mkdir()
            found["damages"] = damage(Path(folder) / "damages", args.damages, args.seed)
    print(json.dumps(found))
    wrong = ("differing", "damaged", "hangs", "failed", *damages.WRONG)
    return 1 if any(counts.get(key, 0) for counts in found.values() for key in wrong) else 0


def damage(root: Path, count: int, seed: int) -> dict[str, int]:
    """Counts: files that were damaged or unreadable, what came of it, and what was wrong; see `damages`."""
    server = ForkServer(root)
    try:
        return damages.damages(server, _base(root), root, count, seed)
    finally:
        server.close()


def chaos(root: Path, kills: int, seed: int) -> dict[str, int]:
    """Counts: kills that hit, runs that were ended after them, and what was wrong with these."""
    draw = random.Random(seed)
    server = ForkServer(root)
    counts = dict.fromkeys(("kills", "runs", "differing", "damaged", "hangs", "failed"), 0)
    try:
        scenarios = _scenarios(root, server)
        straight: dict[str, tuple[dict[str, bytes], float]] = {}
        for scenario in scenarios:
            status, seconds = scenario.start(root / f"straight-{scenario.name}", None)
            assert status == 0, f"{scenario.name} fails when nobody disturbs it"
            straight[scenario.name] = _weights(root / f"straight-{scenario.name}"), seconds
        while counts["kills"] < kills:
            scenario = draw.choice(scenarios)
            expected, length = straight[scenario.name]
            folder = root / f"run-{counts['runs']}"
            hit = 0
            for _ in range(draw.randint(1, min(MOST_IN_A_ROW, kills - counts["kills"]))):
                status, _ = scenario.start(folder, draw.uniform(0, length))
                hit += status == -signal.SIGKILL
            for _ in range(3):
                status, seconds = scenario.start(folder, None)
                counts["hangs"] += seconds > 10 * max(length, 3.0)
                if status != 75:
                    break
            counts["kills"] += hit
            counts["runs"] += 1
            counts["failed"] += status != 0
            found = _weights(folder)
            counts["differing"] += sum(found.get(name) != content for name, content in expected.items())
            counts["damaged"] += sum(checkpoint.damage(one.parent) is not None for one in folder.rglob("manifest.json"))
            print(f"{scenario.name}: {hit} kills, then status {status}; so far {counts}", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        server.close()
    return counts


def _weights(folder: Path) -> dict[str, bytes]:
    """Every exported model's weights, by its place."""
    found = [path for path in folder.rglob("*.safetensors") if path.parent.name == "model"]
    assert found, f"{folder} holds no model"
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def _base(root: Path) -> dict[str, object]:
    """Pairs and a model, and the settings of a short run with them."""
    rows = [{"prompt": f"say {i}:", "chosen": f" it is {i}", "rejected": f" no {i * 7 % 11}"} for i in range(60)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_bpe_tokenizer([row["prompt"] + row["chosen"] for row in rows], vocab_size=300)
    tiny_llama(len(tokenizer), hidden=16, layers=1).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    base = {"model.path": root / "model", "data.train": root / "pairs.jsonl", "data.max_length": 64, "optim.lr": 1e-2}
    return base | {"train.global_batch": 4, "train.micro_batch": 2}


def _scenarios(root: Path, server: ForkServer) -> list[Scenario]:
    base = _base(root)
    steps = {"train.max_steps": 24, "train.save_every": 3, "eval.every": 6}
    rounds = {"rounds.count": 2, "rounds.prompts": 16, "rounds.shard": 4, "rounds.eval_prompts": 8}
    rounds |= {"judge.kind": "length", "generate.n": 3, "generate.max_tokens": 8, "train.save_every": 2}

    def forked(method: str, more: dict[str, object], cache: bool = False) -> Callable[..., tuple[int, float]]:
        def start(folder: Path, kill_after: float | None) -> tuple[int, float]:
            own = {"reference.cache_dir": folder / "cache"} if cache else {}
            settings = {"method": method, **base, **more, **own, "output": folder / "run"}
            argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
            ended = server.train(argv, kill_after=kill_after)
            return ended.status, ended.seconds

        return start

    return [
        Scenario("training", forked("tdpo", steps)),
        Scenario("adapter", forked("dpo", {**steps, "lora.r": 4, "lora.dropout": 0.2})),
        Scenario("precompute", forked("dpo", {**steps, "reference.cache": "logps"}, cache=True)),
        Scenario("rounds", forked("sppo", rounds)),
        Scenario("sweep", _sweep(root, base | {"train.max_steps": 6, "train.save_every": 2, "eval.every": 6})),
    ]


def _sweep(root: Path, settings: dict[str, object]) -> Callable[[Path, float | None], tuple[int, float]]:
    """Two runs in two slots; the kill is the sweep's, whose runs save and leave when they see it gone."""

    def start(folder: Path, kill_after: float | None) -> tuple[int, float]:
        folder.mkdir(exist_ok=True)
        fixed = {"method": "dpo"} | {
            key: str(value) if isinstance(value, Path) else value for key, value in settings.items()
        }
        text = json.dumps({"output": str(folder / "sweep"), "fixed": fixed, "grid": {"seed": [0, 1]}})
        (folder / "sweep.yaml").write_text(text)
        began = time.monotonic()
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PREFOPT_CACHE": str(root / "cache")}
        process = subprocess.Popen(
            [sys.executable, "-m", "prefopt", "sweep", str(folder / "sweep.yaml"), "--slots", "2"],
            cwd=ROOT,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            status = process.wait(kill_after)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        return status, time.monotonic() - began

    return start


if __name__ == "__main__":
    sys.exit(main())
