"""Stands before `-m prefopt train ...` as a launcher does, and leaves as the file `plan` in its folder says.

`{"RUN ID": [75, 2, 0]}`: the exit status of each attempt, "wait" to run until SIGTERM, which saves and gives 75,
"vanish" for SIGKILL, "meet" to wait until another one runs too. What it was started with goes to `started.jsonl`;
status 0 leaves a model and metrics, 75 a checkpoint, 74 (seen as 75) nothing.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

output = Path(next(word for word in sys.argv if word.startswith("--output=")).removeprefix("--output="))
plan = json.loads(Path("plan").read_text()) if Path("plan").exists() else {}
output.mkdir(parents=True, exist_ok=True)
attempts = output / "attempts"
attempts.touch()
number = len(attempts.read_text())
attempts.write_text("x" * (number + 1))
names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PREFOPT_FOLLOW_PARENT")
said = {"id": output.name, "argv": sys.argv[1:], "cores": sorted(os.sched_getaffinity(0)), "began": time.time()}
said |= {name: os.environ.get(name) for name in names}


def note(**more):
    with Path("started.jsonl").open("a") as file:
        file.write(json.dumps(said | more) + "\n")


def leave(status):
    note(status=status, ended=time.time())
    if status == 75:
        (output / "checkpoints" / f"step_{number:08d}").mkdir(parents=True)
    if status == 0:
        argv = dict(word[2:].split("=", 1) for word in sys.argv if word.startswith("--"))
        score = -((math.log10(float(argv.get("optim.lr", "1e-4"))) + 4) ** 2)  # best at 1e-4
        line = {"step": 4, "split": "eval", "loss": -score, "score": score, "seconds": 0.1}
        (output / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (output / "model").mkdir()
        (output / "model" / "manifest.json").write_text("{}")
    if status == 2:
        print("error: there is poison in the pairs", file=sys.stderr)
    sys.exit(75 if status == 74 else status)


signal.signal(signal.SIGTERM, lambda *_: leave(75))
wanted = plan.get(output.name, [0])
what = wanted[min(number, len(wanted) - 1)]
if what == "vanish":
    note(status=what)
    os.kill(os.getpid(), signal.SIGKILL)
if what == "wait":
    (output / "waiting").touch()
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.05)
    sys.exit(75)
if what == "meet":
    Path("met").mkdir(exist_ok=True)
    (Path("met") / output.name).touch()
    while len(list(Path("met").iterdir())) < 2:
        time.sleep(0.02)
    what = 0
leave(what)
