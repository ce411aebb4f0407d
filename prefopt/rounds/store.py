"""Stages on disk: shards that are whole or absent, and a manifest with what they were made from.

A stage is skipped when its manifest is there and its files match it; else it resumes at the first missing shard.
A shard's hash is written before it, into a hidden folder beside that of the shards; once the stage is finished, its
manifest has the hashes of all.
Knows nothing of models, prompts or judges.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt import storage
from prefopt.errors import RoundError
from prefopt.settings import RunConfig
from prefopt.storage import Damaged, digest, finite, read_sealed, sha256, write_sealed, write_whole

Row = dict[str, Any]
STAGES = ("generate", "judge", "pair", "train", "evaluate")
SHARDED = ("generate", "judge")  # stages whose shards several processes can share
_NEWER = ("generation_config",)  # inputs that manifests of older versions do not have


def stages_of(number: int) -> tuple[str, ...]:
    """The stages of a round, in order; before the first round the policy is evaluated only."""
    return STAGES if number else ("evaluate",)


@dataclass(frozen=True)
class Stage:
    """One stage of one round, as files.

    Args:
        folder: of the round.
        name: of the stage; its manifest is `NAME.json`, its shards stand in `NAME/`.
        inputs: all that decides what the shards hold, as JSON values: hashes and settings. No clock, no worker count.
        keys: of the rows of each shard: which prompts it is for, in order.
    """

    folder: Path
    name: str
    inputs: Mapping[str, Any]
    keys: Sequence[Sequence[str]]
    log: Callable[[str], None] = field(default=lambda line: None)

    @property
    def manifest_path(self) -> Path:
        return self.folder / f"{self.name}.json"

    def shard_path(self, number: int) -> Path:
        return self.folder / self.name / f"{number:05d}.jsonl"

    def begin(self) -> bool:
        """Whether all is done already. Otherwise note what the stage is made from, and drop shards that are damaged.

        Raises: RoundError when the folder holds this stage made from other inputs, or a manifest that was edited.
        """
        manifest = read_manifest(self.manifest_path)
        if manifest is not None:
            self._same_inputs(manifest["inputs"])
        promised = (manifest or {}).get("shards", {})
        for number in range(len(self.keys)):
            path = self.shard_path(number)
            there = storage.is_there(path)  # asked once: another process may be about to write it
            wrong = self._damage(path, promised.get(path.name)) if there else "is missing" if promised else None
            if wrong:
                self.log(f"{path}: {wrong}; it is made again")
                if there:
                    path.unlink(missing_ok=True)
        if manifest is None:
            unfinished = {"stage": self.name, "finished": False, "inputs": dict(self.inputs), "about": {}}
            write_manifest(self.manifest_path, unfinished, only_new=True)
        return manifest is not None and manifest["finished"] and not self.missing()

    def _same_inputs(self, before: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(dict(self.inputs)))
        for key in sorted(before.keys() | now.keys()):
            if key in _NEWER and key not in before:
                continue
            if before.get(key) != now.get(key):
                raise RoundError(
                    f"{self.manifest_path}: this stage was made from another {key} ({_short(before.get(key))} -> "
                    f"{_short(now.get(key))}); choose another --output, or delete this file and "
                    f"{self.folder / self.name} to make the stage again"
                )

    def _damage(self, path: Path, promised: Mapping[str, Any] | None) -> str | None:
        """What is wrong with a shard: against its manifest where there is one, else against the hash beside it."""
        found = sha256(path)
        if promised is not None:
            return None if found == promised["sha256"] else "does not match its hash in the manifest"
        with contextlib.suppress(Damaged):
            beside = read_sealed(_beside(path)) or {}
            return None if found == beside.get("shard") else "does not match the hash it was written with"
        return "has a hash beside it that was edited or damaged"

    def missing(self) -> list[int]:
        """The numbers of the shards that are not there yet."""
        return [number for number in range(len(self.keys)) if not storage.is_there(self.shard_path(number))]

    def write(self, number: int, rows: Iterable[Row]) -> None:
        """Write a shard, whole or not at all. Raises: RoundError when the rows are not those of its prompts."""
        rows = list(rows)
        if [row["key"] for row in rows] != list(self.keys[number]):
            raise RoundError(f"{self.shard_path(number)}: {len(rows)} rows for {len(self.keys[number])} prompts")
        path, lines = self.shard_path(number), [*_lines(rows)]
        with _writing(path):  # the hash first: a shard without one would be made again
            write_sealed(_beside(path), {"shard": sha256_of(lines)})
        _write(path, lines)

    def read(self, number: int) -> list[Row]:
        return read_rows(self.shard_path(number))

    def rows(self) -> list[Row]:
        """All rows, in the order of the prompts."""
        return [row for number in range(len(self.keys)) for row in self.read(number)]

    def note(self, about: Mapping[str, Any]) -> None:
        """Record how the shards are made: inference engine, judge, versions."""
        manifest = read_manifest(self.manifest_path)
        if manifest is not None and not manifest["finished"]:
            write_manifest(self.manifest_path, manifest | {"about": dict(about)})

    def finish(self, counts: Mapping[str, Any]) -> None:
        """Write the manifest of a stage whose shards are all there.

        Args: counts: what was written and dropped, and why.
        Raises: RoundError when a shard that was made again is not what the manifest promised.
        """
        before = read_manifest(self.manifest_path) or {}
        shards: dict[str, Any] = {}
        for number, keys in enumerate(self.keys):
            path = self.shard_path(number)
            shards[path.name] = {"rows": len(keys), "sha256": sha256(path)}
            promised = before.get("shards", {}).get(path.name)
            if promised is not None and promised != shards[path.name]:
                raise RoundError(
                    f"{path}: made again, it is not what it was; what was made from it no longer fits: "
                    f"delete {self.folder} to make the round again"
                )
        manifest = {"stage": self.name, "finished": True, "inputs": dict(self.inputs), "shards": shards}
        write_manifest(self.manifest_path, manifest | {"counts": dict(counts), "about": before.get("about", {})})

    def take_over(self, folder: Path) -> int:
        """Copy this stage from another run's round, where that was made from the same.

        Returns: how many prompts it holds.
        Raises: RoundError when it is not there, not finished, damaged, or made from something else, which is named.
        """
        manifest = read_manifest(folder / f"{self.name}.json")
        if manifest is None or not finished(folder, self.name):
            raise RoundError(f"{folder} holds no finished {self.name}")
        now, then = json.loads(json.dumps(dict(self.inputs))), manifest["inputs"]
        other = [key for key in sorted(now.keys() | then.keys()) if now.get(key) != then.get(key)]
        if other:
            raise RoundError(f"{folder / self.name} was made from another {' and '.join(other)}")
        rows = iter([row for name in sorted(manifest["shards"]) for row in read_rows(folder / self.name / name)])
        self.note(manifest["about"])
        for number, keys in enumerate(self.keys):  # shards of their own size
            self.write(number, [row for _, row in zip(keys, rows, strict=False)])
        self.finish(manifest["counts"])
        return sum(map(len, self.keys))

    def hash(self) -> str:
        """A hash of everything the finished stage holds."""
        manifest = read_manifest(self.manifest_path)
        assert manifest is not None
        assert manifest["finished"], f"{self.manifest_path} is not finished"
        return digest(manifest["shards"])


def finished(folder: Path, name: str) -> bool:
    """Whether a stage is done and its files match its manifest; what it was made from is not compared."""
    manifest = read_manifest(folder / f"{name}.json")
    if manifest is None or not manifest["finished"]:
        return False
    shards = manifest.get("shards", {})
    return all(is_as_written(folder / name / shard, entry["sha256"]) for shard, entry in shards.items())


def is_as_written(path: Path, sha: str) -> bool:
    """Whether a file is there and as it was written. Raises: Unreadable."""
    return storage.is_there(path) and sha256(path) == sha


def _beside(shard: Path) -> Path:
    """The file with a shard's hash, outside the folder of shards."""
    return shard.parent.with_name(f".{shard.parent.name}") / f"{shard.stem}.json"


def done(config: RunConfig, folder: Path, stage: str) -> bool:
    """Whether a stage of the round in `folder` has left all that it should. A trained round is not looked into."""
    trained = storage.is_there(folder / "train" / "model" / storage.MANIFEST)
    if stage == "evaluate":
        if config.rounds.eval_prompts == 0:
            return True
        manifest, other = read_manifest(folder / "evaluate.json"), config.rounds.compare
        compared = manifest is not None and manifest["inputs"].get("other") is not None
        # a comparison may be asked for later, and waits for the other run
        return manifest is not None and (
            compared or other is None or not finished(Path(other) / folder.name, "held_out")
        )
    if trained or stage == "train":
        return trained
    if stage == "pair":
        manifest = read_manifest(folder / "pairs.json")
        files = {} if manifest is None else manifest["files"]
        return bool(files) and all(is_as_written(folder / name, sha) for name, sha in files.items())
    if stage == "judge" and config.judge.kind == "none":
        return True
    return finished(folder, {"generate": "candidates", "judge": "scores"}[stage])


def stages_left(config: RunConfig) -> Iterator[tuple[int, str]]:
    """(round, stage) of each stage that is not done, in order; each is looked up when the iterator gets there."""
    output, count = Path(config.output), config.rounds.count
    for number in range(count + 1):
        for name in stages_of(number):
            unexported = (number, name) == (count, "evaluate") and not (output / "model").exists()
            if unexported or not done(config, output / f"round_{number:02d}", name):
                yield number, name


def write_manifest(path: Path, manifest: Mapping[str, Any], only_new: bool = False) -> None:
    """Seal a manifest with its own hash. Args: only_new: leave the one that another process has written meanwhile."""
    with _writing(path):
        write_sealed(path, manifest, only_new=only_new)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """A manifest, or None where there is none. Raises: RoundError when it is not as it was written; Unreadable."""
    try:
        return read_sealed(path)
    except Damaged:
        raise RoundError(
            f"{path}: does not match its own hash: it was edited or damaged; "
            "delete it and run again: intact shards are reused"
        ) from None


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """A JSONL file, whole or not at all. NaN and infinities become null, which every reader of JSON takes."""
    _write(path, _lines(rows))


def _lines(rows: Iterable[Row]) -> Iterator[str]:
    return (json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file, which was verified before. Raises: RoundError when a line is cut or broken."""
    content = storage.read_bytes(path)
    if content is None:
        raise RoundError(f"{path}: is missing; run again to have it made again")
    try:
        text = content.decode("utf-8")
        if text and not text.endswith("\n"):
            raise ValueError("its last line is cut off")
        return [json.loads(line) for line in text.split("\n")[:-1]]
    except ValueError as error:
        raise RoundError(f"{path}: was cut, edited or damaged ({error}); delete it to have it made again") from None


def _write(path: Path, lines: Iterable[str]) -> None:
    with _writing(path):
        write_whole(path, lines)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RoundError(
            f"{path}: cannot be written: {error.strerror}; finished shards are not lost: "
            "free space and run the same command again"
        ) from error


def sha256_of(lines: Iterable[str]) -> str:
    """SHA-256 of what `write_whole` makes of these texts."""
    whole = storage.running_hash()
    for line in lines:
        whole.update(line.encode("utf-8", "replace"))
    return whole.hexdigest()


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
