"""What every judge promises, and what a file of this folder declares to be one. Knows no model."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from prefopt.errors import ConfigError, did_you_mean
from prefopt.settings import JudgeConfig, coerce
from prefopt.types import Judgement, Question

if TYPE_CHECKING:
    import torch

    from prefopt.data.encoder import Encoder
    from prefopt.data.rows import Messages
    from prefopt.generation.base import Engine


class Judge(Protocol):
    """Scores or compares responses."""

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """One judgement per question, of as many responses as it has, in order.

        What fails for one response is NaN and counted in the judgement's `problems`.
        Raises: RoundError when the judge as a whole cannot answer (a server that is gone, a function that raises).
        """

    def describe(self) -> dict[str, Any]:
        """What decides its judgements: kind, model and its hash, template, settings."""

    def close(self) -> None:
        """Free what it holds."""


@dataclass(frozen=True)
class JudgeContext:
    """What a run has that a judge may be made of.

    Args:
        device: where a model is to be.
        policy: gives the policy as an inference engine, and how it reads prompts; None where a run has none.
        world: the testbed's own judge, on the testbed.
        cache: folder in which a server's answers are cached; None: one in the cache of the user.
    """

    device: torch.device
    policy: Callable[[], tuple[Engine, Encoder]] | None = None
    world: Judge | None = None
    cache: Path | None = None


class JudgeKind:
    """A judge that `judge.kind` can name: one file of this folder with one subclass; the file's name is the kind.

    A subclass defines `judge`. Where it is a dataclass, its fields are settings of its own (`--judge.args.NAME`);
    settings of the group `judge` that it reads beside them stand in `reads`.
    """

    reads: ClassVar[tuple[str, ...]] = ()  # settings of the group `judge`; any other must have its default
    testbed: ClassVar[bool] = False  # whether it is the testbed's own, and needs no name there
    verdicts: ClassVar[tuple[str, ...]] = ()  # values of judge.mode with which it gives win probabilities, no scores

    @classmethod
    def check(cls, settings: JudgeConfig) -> None:
        """Refuse what can be seen to be wrong before any model is loaded. Raises: ConfigError naming the setting."""

    @classmethod
    def check_prompts(cls, settings: JudgeConfig, prompts: Iterable[str | Messages]) -> None:
        """Refuse prompts that it cannot read, before any model is loaded. Raises: DataError, TrainError."""

    @classmethod
    def check_weights(cls, settings: JudgeConfig) -> None:
        """Refuse weights that are not whole, before completions are sampled for it. Raises: TrainError."""

    @classmethod
    def content(cls, settings: JudgeConfig) -> list[Any]:
        """Hashes of what `judge.path` names, such as weights or a function's source. Cheap enough for each run."""
        return []

    @classmethod
    def open(cls, settings: JudgeConfig, context: JudgeContext) -> Judge:
        """The judge, ready to judge. Raises: ConfigError, DataError or TrainError when it cannot be opened."""
        return cls(**cls.own_settings(settings))

    @classmethod
    def own_settings(cls, settings: JudgeConfig) -> dict[str, Any]:
        """The settings of its own that `judge.args` gives, as the types of its fields. Raises: ConfigError."""
        hints: dict[str, Any] = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
        known: list[str] = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
        for name in settings.args:
            if name not in known:
                raise ConfigError(
                    f"judge.args.{name}: judge '{settings.kind}' has no such setting{did_you_mean(name, known)}; "
                    f"it has {', '.join(known) or 'none'}"
                )
        return {name: coerce(value, hints[name], f"judge.args.{name}") for name, value in settings.args.items()}

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """See `Judge`."""
        raise NotImplementedError(f"{type(self).__name__} must define judge(questions)")

    def describe(self) -> dict[str, Any]:
        """See `Judge`. Its class and its own settings."""
        own: dict[str, Any] = dataclasses.asdict(self) if dataclasses.is_dataclass(self) else {}
        return {"kind": type(self).__module__.rpartition(".")[2], **own}

    def close(self) -> None:
        """Free what it holds: nothing."""
