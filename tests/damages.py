"""Damaged and unreadable files, of every kind that the program writes; a part of `python -m tests.chaos`.

Work of each kind is killed at a fixed place. Then, again and again, what it has left is put back, one of its files is
damaged (a bit, the end, a page of zeros) or cannot be read (EIO), and the same command is typed again. Either it ends
as undisturbed work does, to the last bit, or it refuses in one line with exit status 2. What could not be read once is
read the next time. No file of a user is gone afterwards.
"""

from __future__ import annotations

import errno
import itertools
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fork_server import Ended, ForkServer

KINDS = ("bit", "end", "page", "unreadable")
WRONG = ("differing", "traceback", "deleted", "unread_later")
THEIRS = ("notes.txt", "checkpoints/step_00000004_mine/notes.txt", "model/notes.txt", "best/notes.txt")
_STEP = "prefopt.training.trainer:Trainer._step"


@dataclass(frozen=True)
class Work:
    """Work that was killed.

    Args:
        name: of the kind of work.
        place: the folder that it writes to.
        files: patterns of its files, each a kind, in that folder or in the cache (`cache/...`).
        run: the same command again, with what cannot be read.
        result: what comes of it, by name; the same for undisturbed work.
    """

    name: str
    place: Path
    files: tuple[str, ...]
    run: Callable[[tuple[str, int] | None], Ended]
    result: Callable[[Path], dict[str, bytes]]


Start = Callable[..., Ended]  # (settings of a command, a fault, what is unreadable)


def works(server: ForkServer, base: dict[str, object], root: Path) -> Iterator[Callable[[], Work]]:
    """What there is to damage; each is made when it is called. Args: base: settings of a short run."""

    def weights(place: Path) -> dict[str, bytes]:
        found = [path for path in place.rglob("*.safetensors") if path.parent.name == "model"]
        return {str(path.relative_to(place)): path.read_bytes() for path in found}

    def work(
        name: str,
        settings: dict[str, object],
        fault: dict[str, object] | None,
        files: tuple[str, ...],
        command: str = "train",
        result: Callable[[Path], dict[str, bytes]] = weights,
    ) -> Callable[[], Work]:
        def make() -> Work:
            place = root / name
            argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))]

            def run(unreadable: tuple[str, int] | None = None, killed: dict[str, object] | None = None) -> Ended:
                return server.train(argv, killed, command=command, unreadable=unreadable)

            ended = run(None, fault)
            assert (ended.status == 0) == (fault is None), (name, ended)
            return Work(name, place, files, run, result)

        return make

    steps = {"train.max_steps": 12, "train.save_every": 3, "eval.every": 4, "data.eval_fraction": 0.25}
    training = {"method": "dpo", **base, **steps, "eval.select": "loss"}
    yield work(
        "training",
        {**training, "output": root / "training"},
        {"at": _STEP, "count": 9, "do": "SIGKILL"},
        (
            *("checkpoints/step_00000006/model.safetensors", "checkpoints/step_00000006/optimizer.safetensors"),
            *("checkpoints/step_00000006/state.json", "checkpoints/step_00000006/manifest.json", "metrics.jsonl"),
            *("run_card.json", "best/*/model.safetensors", "best/*/manifest.json", "config.yaml", "eval_pairs.jsonl"),
            *("cache/encoded/*/rows.arrow", "cache/encoded/*/report.json", "cache/encoded/hashes/*.json"),
        ),
    )
    yield work(
        "finished",
        {**training, "output": root / "finished"},
        None,
        ("model/model.safetensors", "model/manifest.json", "model/config.json"),
    )
    cached = {"method": "dpo", **base, "train.max_steps": 6, "reference.cache": "logps"}
    for name, at in (
        ("passing", {"at": "prefopt.training.reference:complete"}),
        ("passed", {"at": _STEP, "count": 4}),
    ):
        of = ("reference/*/pairs_*.safetensors",) + (
            ("reference/*/cache.json", "reference/*/index.safetensors", "reference/tokens/*.json")
            if name == "passed"
            else ()
        )
        own = {"reference.cache_dir": root / name / "reference", "output": root / name}
        yield work(name, {**cached, **own}, {**at, "do": "SIGKILL"}, of)
    rounds = {"method": "sppo", **base, "rounds.count": 2, "rounds.prompts": 16, "rounds.shard": 4}
    rounds |= {"rounds.eval_prompts": 4, "judge.kind": "length", "generate.n": 3, "generate.max_tokens": 8}
    yield work(
        "sampling",
        {**rounds, "output": root / "sampling"},
        {"at": "prefopt.rounds.store:Stage.write", "when": "after", "count": 4, "do": "SIGKILL"},
        ("round_01/candidates/00000.jsonl", "round_01/.candidates/00000.json", "round_01/candidates.json"),
    )
    yield work(
        "second_round",
        {**rounds, "output": root / "second_round"},
        {"at": _STEP, "count": 6, "do": "SIGKILL"},
        (
            *("round_01/train/model/model.safetensors", "round_02/pairs.jsonl", "round_02/pairs.json", "run_card.json"),
            *("round_01/scores/*.jsonl", "round_01/scores.json", "round_01/evaluate.json", "round_01/held_out/*.jsonl"),
        ),
    )
    answers = {"model": base["model.path"], "prompts": base["data.train"], "limit": 6, "generate.max_tokens": 6}
    yield work(
        "answers",
        {**answers, "output": root / "answers"},
        None,
        ("answers/*/*.json", "infer.json"),
        command="infer",
        result=lambda place: {"answers.jsonl": (place / "answers.jsonl").read_bytes()},
    )
    testbed = {"method": "dpo", "testbed.pairs": 64, "testbed.eval_pairs": 16, "train.max_steps": 4}
    yield work(
        "testbed",
        {**testbed, "train.save_every": 2, "output": root / "testbed"},
        {"at": _STEP, "count": 4, "do": "SIGKILL"},
        ("cache/bandit-*/model.safetensors", "cache/bandit-*/manifest.json", "cache/bandit-*/config.json"),
    )


def damages(
    server: ForkServer, base: dict[str, object], root: Path, count: int, seed: int, kinds_of_work: int | None = None
) -> dict[str, int]:
    """Damage `count` files, each kind of file before any is damaged twice. Returns: counts, and of what was wrong.

    Args: kinds_of_work: so many of them, from the first; None: all.
    """
    draw = random.Random(f"damages {seed}")
    counts = dict.fromkeys(("damages", "same", "refused", *WRONG), 0)
    made = [make() for make in itertools.islice(works(server, base, root), kinds_of_work)]
    kinds = [(work, pattern) for work in made for pattern in work.files]
    draw.shuffle(kinds)
    expected = {work.name: undisturbed(work, root) for work in made}
    for number in range(count):
        work, pattern = kinds[number % len(kinds)]
        how = KINDS[(number + number // len(kinds)) % len(KINDS)]
        found = once(work, pattern, how, expected[work.name], root, server.folder / "cache", draw)
        counts["damages"] += 1
        for word in found:
            counts[word] += 1
        print(f"{work.name}: {pattern}: {how}: {' '.join(found)}; so far {counts}", file=sys.stderr, flush=True)
    return counts


def undisturbed(work: Work, root: Path) -> dict[str, bytes]:
    """What comes of the work when nothing is damaged; what was killed is as it was afterwards."""
    kept = root / "kept" / work.name
    shutil.copytree(work.place, kept, symlinks=True)
    ended = work.run(None)
    assert ended.status == 0, (work.name, ended)
    found = work.result(work.place)
    assert found, work.name
    return found


def once(
    work: Work, pattern: str, how: str, expected: dict[str, bytes], root: Path, cache: Path, draw: random.Random
) -> list[str]:
    """Damage one file and type the command again. Returns: words of `damages`."""
    shutil.rmtree(work.place)
    shutil.copytree(root / "kept" / work.name, work.place, symlinks=True)
    theirs = [work.place / name for name in THEIRS if (work.place / name).parent.parent.is_dir()]
    theirs = [path for path in theirs if path.parent.is_dir() or "_mine" in str(path)]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(path))
    place, rest = (cache, pattern.removeprefix("cache/")) if pattern.startswith("cache/") else (work.place, pattern)
    path = draw.choice(sorted(place.glob(rest)))
    whole = path.read_bytes()
    unreadable = (f"{path.parent.name}/{path.name}", errno.EIO) if how == "unreadable" else None
    if unreadable is None:
        path.write_bytes(damaged(whole, how, draw))
    ended = work.run(unreadable)
    words = judged(ended, work, expected)
    if unreadable is not None and ended.status == 2:
        again = judged(work.run(None), work, expected)
        words += ["unread_later"] if again != ["same"] else []
    there = {found.read_text() for found in work.place.rglob("notes.txt")}
    words += ["deleted"] if any(str(one) not in there for one in theirs) else []
    if place == cache:  # others need it
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(whole)
    if {*words} & {*WRONG}:
        print(f"{work.name}: {path}: {how}: {words}, status {ended.status}\n{ended.err[-2000:]}", flush=True)
    return words


def damaged(content: bytes, how: str, draw: random.Random) -> bytes:
    """The content of a file with a bit flipped, its end cut off, or a page of zeros."""
    changed = bytearray(content)
    if how == "bit":
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    elif how == "end":
        del changed[draw.randrange(len(changed)) :]
    else:
        size = min(4096, max(1, len(changed) // 2))
        begin = draw.randrange(len(changed) - size + 1)
        changed[begin : begin + size] = bytes(size)
    return bytes(changed)


def judged(ended: Ended, work: Work, expected: dict[str, bytes]) -> list[str]:
    if ended.status == 0:
        found = work.result(work.place)
        return ["same" if all(found.get(name) == content for name, content in expected.items()) else "differing"]
    lines = [line for line in ended.err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    return ["refused" if ended.status == 2 and len(lines) == 1 and "Traceback" not in ended.err else "traceback"]
