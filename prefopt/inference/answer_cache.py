"""Answers and scores on disk: one small file each, whole or absent, so that a killed run asks nothing twice.

Inference engine and judge are wrapped behind their own interfaces. A file is named by a hash of the question, and holds
the answer, with a checksum over both: one that was edited, damaged or renamed is computed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt import storage
from prefopt.errors import RoundError
from prefopt.generation.base import Done, Engine, Sampling
from prefopt.judges.base import Judge
from prefopt.storage import Damaged, digest, finite, read_sealed, write_sealed, write_whole
from prefopt.types import Completion, Judgement, Question

_RESPONSES = 64  # responses that a judge receives at a time: the most that a kill can lose


def write_text(path: Path, text: str, *, flush: bool = True) -> None:
    """Write a file, whole or not at all, see `write_whole`. Raises: RoundError when there is no room."""
    with writing(path):
        write_whole(path, [text], flush=flush)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """While it lasts, an error of the disk is one line. Raises: RoundError."""
    try:
        yield
    except OSError as error:
        raise RoundError(
            f"{path}: cannot be written: {error.strerror}; finished answers are not lost: free space and run the same "
            "command again"
        ) from error


class AnswerCache:
    """Small JSON files in a folder, named by content. Threads and processes may write at the same time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, content: Mapping[str, Any]) -> Path:
        """Where the file of this content is, or will be."""
        name = digest(content)[:40]
        return self.folder / name[:2] / f"{name}.json"

    def read(self, path: Path) -> Any:
        """What was written; None where nothing was, and, with a warning, where it is not what was written.

        Raises: Unreadable.
        """
        try:
            found = read_sealed(path)
        except Damaged:
            found = {"of": None}
        if found is None:
            return None
        if found.get("of") != path.stem:
            print(f"warning: {path}: was edited or damaged; it is asked for again", file=sys.stderr, flush=True)
            return None
        return found

    def write(self, path: Path, value: Mapping[str, Any]) -> None:
        """Write it, whole or not at all. Raises: RoundError when there is no room."""
        with writing(path):  # after a power cut an empty file is asked for again
            write_sealed(path, {**value, "of": path.stem}, flush=False)

    def sweep(self) -> None:
        """Remove what killed processes have left half-written."""
        storage.sweep(self.folder)


class CachedEngine:
    """An inference engine with a cache. Only questions that are not in the cache go to the engine itself.

    Args:
        engine: the engine.
        cache: its answers.
        identity: of the policy: weights, and whatever else decides its answers beside prompt, sampling and seed.
    """

    def __init__(self, engine: Engine, cache: AnswerCache, identity: Mapping[str, Any]) -> None:
        self.engine, self.cache, self.identity = engine, cache, dict(identity)
        self.context = engine.context

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        done: Done | None = None,
    ) -> list[list[Completion]]:
        """See `Engine`."""
        paths = [
            self.cache.path(
                {
                    "policy": self.identity,
                    "prompt": list(prompt),
                    "sampling": dataclasses.asdict(sampling),
                    "seed": seed,
                }
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        found = [_completions(self.cache.read(path), sampling.n) for path in paths]
        missing = [number for number, group in enumerate(found) if group is None]
        if done is not None:
            for number, group in enumerate(found):
                if group is not None:
                    done(number, group)

        def store(which: int, completions: list[Completion]) -> None:
            number = missing[which]
            rows = [dataclasses.asdict(completion) for completion in completions]
            self.cache.write(paths[number], {"seed": seeds[number], "completions": rows})
            found[number] = completions
            if done is not None:
                done(number, completions)

        if missing:
            self.engine.generate([prompts[i] for i in missing], sampling, [seeds[i] for i in missing], store)
        return [group for group in found if group is not None]

    def describe(self) -> dict[str, Any]:
        """See `Engine`."""
        return self.engine.describe()

    def close(self) -> None:
        """See `Engine`."""
        self.engine.close()


class CachedJudge:
    """A judge with a cache of judgements, each of one question.

    Args: judge: the judge. cache: its judgements. identity: of the judge.
    """

    def __init__(self, judge: Judge, cache: AnswerCache, identity: Mapping[str, Any]) -> None:
        self.inner, self.cache, self.identity = judge, cache, dict(identity)

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """See `Judge`. They go to the judge some at a time, and are written as they come."""
        paths = [
            self.cache.path({"judge": self.identity, "question": dataclasses.asdict(question)})
            for question in questions
        ]
        found = [_judgement(self.cache.read(path)) for path in paths]
        missing = [number for number, judgement in enumerate(found) if judgement is None]
        while missing:
            some: list[int] = []
            while missing and sum(len(questions[i].responses) for i in some) < _RESPONSES:
                some.append(missing.pop(0))
            for number, judgement in zip(some, self.inner.judge([questions[i] for i in some]), strict=True):
                self.cache.write(paths[number], finite(dataclasses.asdict(judgement)))
                found[number] = judgement
        return [judgement for judgement in found if judgement is not None]

    def describe(self) -> dict[str, Any]:
        """See `Judge`."""
        return self.inner.describe()

    def close(self) -> None:
        """See `Judge`."""
        self.inner.close()


def _completions(value: Any, n: int) -> list[Completion] | None:
    try:
        found = [
            Completion(
                token_ids=tuple(int(token) for token in one["token_ids"]),
                text=one["text"],
                finish_reason=one["finish_reason"],
                logps=None if one["logps"] is None else tuple(one["logps"]),
            )
            for one in value["completions"]
        ]
    except (TypeError, KeyError, ValueError):
        return None
    return found if len(found) == n else None


def _judgement(value: Any) -> Judgement | None:
    try:
        return Judgement(
            scores=_numbers(value["scores"]),
            logits=_table(value["logits"]),
            probs=_table(value["probs"]),
            problems=value["problems"],
            scale=float(value.get("scale", 1.0)),
        )
    except (TypeError, KeyError, ValueError, AttributeError):
        return None


def _numbers(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(math.nan if value is None else float(value) for value in values)


def _table(rows: Any) -> tuple[tuple[float, ...], ...] | None:
    return None if rows is None else tuple(_numbers(row) or () for row in rows)
