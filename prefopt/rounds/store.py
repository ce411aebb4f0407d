"""Stages on disk: shards that are whole or absent, and a manifest that says what they were made from.

A stage is skipped when its manifest is there and its files are as it says; else it goes on at the first missing shard.
Knows nothing of models, prompts or judges.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.config import RunConfig
from prefopt.errors import RoundError
from prefopt.storage import finite, write_whole

Row = dict[str, Any]


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
    say: Callable[[str], None] = field(default=lambda line: None)

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
            there = path.is_file()  # asked once: another process may be about to write it
            wrong = self._damage(path, number, promised.get(path.name)) if there else "is missing" if promised else None
            if wrong:
                self.say(f"{path}: {wrong}; it is made again")
                if there:
                    path.unlink(missing_ok=True)
        if manifest is None:
            unfinished = {"stage": self.name, "finished": False, "inputs": dict(self.inputs), "about": {}}
            write_manifest(self.manifest_path, unfinished, only_new=True)
        return manifest is not None and manifest["finished"] and not self.missing()

    def _same_inputs(self, before: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(dict(self.inputs)))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                raise RoundError(
                    f"{self.manifest_path}: this stage was made from another {key} ({_short(before.get(key))} -> "
                    f"{_short(now.get(key))}); choose another --output, or delete this file and "
                    f"{self.folder / self.name} to make the stage again"
                )

    def _damage(self, path: Path, number: int, promised: Mapping[str, Any] | None) -> str | None:
        """What is wrong with a shard: against its manifest where there is one, else against the prompts it is for."""
        if promised is not None:
            return None if sha256(path) == promised["sha256"] else "does not match its hash in the manifest"
        try:
            rows = read_rows(path)
        except ValueError as error:
            return f"cannot be read ({error})"
        if [row.get("key") for row in rows] != list(self.keys[number]):
            return f"holds {len(rows)} rows, not those of its {len(self.keys[number])} prompts"
        return None

    def missing(self) -> list[int]:
        """The numbers of the shards that are not there yet."""
        return [number for number in range(len(self.keys)) if not self.shard_path(number).exists()]

    def write(self, number: int, rows: Iterable[Row]) -> None:
        """Write a shard, whole or not at all. Raises: RoundError when the rows are not those of its prompts."""
        rows = list(rows)
        if [row["key"] for row in rows] != list(self.keys[number]):
            raise RoundError(f"{self.shard_path(number)}: {len(rows)} rows for {len(self.keys[number])} prompts")
        write_rows(self.shard_path(number), rows)

    def read(self, number: int) -> list[Row]:
        return read_rows(self.shard_path(number))

    def rows(self) -> list[Row]:
        """All rows, in the order of the prompts."""
        return [row for number in range(len(self.keys)) for row in self.read(number)]

    def note(self, about: Mapping[str, Any]) -> None:
        """Keep what to know of how the shards are made: engine, judge, versions."""
        manifest = read_manifest(self.manifest_path)
        if manifest is not None and not manifest["finished"]:
            write_manifest(self.manifest_path, manifest | {"about": dict(about)})

    def finish(self, counts: Mapping[str, Any]) -> None:
        """Write the manifest of a stage whose shards are all there.

        Args: counts: what was kept and dropped, and why.
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

    def hash(self) -> str:
        """A hash of everything the finished stage holds."""
        manifest = read_manifest(self.manifest_path)
        assert manifest is not None
        assert manifest["finished"], f"{self.manifest_path} is not finished"
        return digest(manifest["shards"])


def finished(folder: Path, name: str) -> bool:
    """Whether a stage is done and its files are as its manifest says; what it was made from is not asked."""
    manifest = read_manifest(folder / f"{name}.json")
    if manifest is None or not manifest["finished"]:
        return False
    return all(
        (path := folder / name / shard).is_file() and sha256(path) == entry["sha256"]
        for shard, entry in manifest.get("shards", {}).items()
    )


def done(config: RunConfig, folder: Path, stage: str) -> bool:
    """Whether a stage of the round in `folder` has left all that it should. A trained round is not looked into."""
    trained = (folder / "train" / "model" / "manifest.json").is_file()
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
        return manifest is not None and all(
            (folder / name).is_file() and sha256(folder / name) == digest for name, digest in manifest["files"].items()
        )
    if stage == "judge" and config.judge.kind == "none":
        return True
    return finished(folder, {"generate": "candidates", "judge": "scores"}[stage])


def write_manifest(path: Path, manifest: Mapping[str, Any], only_new: bool = False) -> None:
    """Seal a manifest with its own hash. Args: only_new: leave the one that another process has written meanwhile."""
    plain = json.loads(json.dumps(dict(manifest)))
    _write(path, [json.dumps(plain | {"sha256": digest(plain)}, indent=1)], only_new)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """A manifest, or None where there is none. Raises: RoundError when it is not as it was written."""
    try:
        manifest = json.loads(path.read_text())
        seal = manifest.pop("sha256")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, KeyError, TypeError):
        manifest, seal = None, ""
    if manifest is None or digest(manifest) != seal:
        raise RoundError(
            f"{path}: does not match its own hash: it was edited or damaged; "
            "delete it and run again: shards that are whole are kept"
        )
    return manifest


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """A JSONL file, whole or not at all. NaN and infinities become null, which every reader of JSON takes."""
    _write(path, (json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file. Raises: ValueError when a line is cut or broken."""
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        raise ValueError("its last line is cut off")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def _write(path: Path, lines: Iterable[str], only_new: bool = False) -> None:
    try:
        write_whole(path, lines, only_new=only_new)
    except OSError as error:
        raise RoundError(
            f"{path}: cannot be written: {error.strerror}; all shards that were finished are kept: "
            "free space and run the same command again"
        ) from error


def sweep(folder: Path) -> None:
    """Remove what killed processes have left half-written."""
    for left in folder.rglob(".*.tmp"):
        left.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
