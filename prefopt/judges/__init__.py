"""Judges, behind one interface; `make` opens the one that the settings name. A judge never sees a thought.

Each kind is one file of this folder that holds one subclass of `JudgeKind`; nothing else names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt import registry, storage
from prefopt.errors import ConfigError
from prefopt.settings import JudgeConfig

if TYPE_CHECKING:
    import torch

    from prefopt.data.encoder import Encoder
    from prefopt.data.rows import Messages
    from prefopt.generation.base import Engine
    from prefopt.judges.base import Judge, JudgeKind
    from prefopt.types import Judgement, Question


def kind_of(name: str) -> type[JudgeKind]:
    """The class of a kind: a file of this folder, or a dotted path. Raises: ConfigError."""
    from prefopt.judges.base import JudgeKind

    return registry.JUDGES.load(name, JudgeKind)


def _kind(settings: JudgeConfig) -> type[JudgeKind]:
    from prefopt.judges.base import JudgeKind

    return JudgeKind if settings.kind in (None, "none") else kind_of(str(settings.kind))


def check(settings: JudgeConfig) -> None:
    """Refuse what can be seen to be wrong before any model is loaded.

    Raises: ConfigError or TrainError naming the setting.
    """
    kind, defaults = _kind(settings), JudgeConfig()
    for name in (f.name for f in dataclasses.fields(JudgeConfig) if f.name not in ("kind", "args")):
        given = getattr(settings, name)
        if name not in kind.reads and given != getattr(defaults, name):
            readers = [each for each in registry.JUDGES.names() if name in kind_of(each).reads]
            raise ConfigError(
                f"judge.{name}: found {given!r}, which judge '{settings.kind}' does not read; it belongs to "
                f"{', '.join(readers)}"
            )
    scale = settings.reward_scale
    if scale != "std" and not 0 < scale < float("inf"):
        raise ConfigError(f"judge.reward_scale: found {scale!r}, expected a finite number above 0, or std")
    if settings.mode in kind.verdicts and scale != 1:
        raise ConfigError(
            f"judge.reward_scale: found {scale!r}, but mode '{settings.mode}' gives verdicts, which are probabilities; "
            "leave it out (or --judge.mode score)"
        )
    kind.own_settings(settings)
    kind.check(settings)


def check_prompts(settings: JudgeConfig, prompts: Iterable[str | Messages]) -> None:
    """Refuse prompts that the judge cannot read, before any model is loaded.

    Raises: DataError for conversations without a chat template; TrainError when the judge's tokenizer is not there.
    """
    _kind(settings).check_prompts(settings, prompts)


def check_weights(settings: JudgeConfig) -> None:
    """Refuse a judge whose weights are not whole, by their names and shapes, before completions are sampled for it.

    Raises: TrainError naming the weight.
    """
    _kind(settings).check_weights(settings)


def identity(settings: JudgeConfig) -> str:
    """A hash of what the settings name by a path: weights, a function's source, a template. Cheap enough for each run.

    Raises: ConfigError when it cannot be read.
    """
    kind = _kind(settings)
    parts = [settings.kind, settings.path, *kind.content(settings)]
    if "." in str(settings.kind):  # a user's own file
        from prefopt.judges.source_hash import source_hash

        parts.append(source_hash(str(settings.kind), [kind.__module__]))
    if settings.template is not None:
        parts.append(Path(settings.template).read_text())
    return storage.text_hash(repr(parts))[:16]


def make(
    settings: JudgeConfig,
    *,
    device: torch.device,
    policy: Callable[[], tuple[Engine, Encoder]] | None = None,
    world: Judge | None = None,
    cache: Path | None = None,
) -> Judge:
    """The judge that the settings name.

    Args: as those of `JudgeContext`.
    Raises: ConfigError, DataError or TrainError when it cannot be opened; RoundError when a server does not answer.
    """
    from prefopt.judges.base import JudgeContext

    check(settings)
    if settings.kind in (None, "none"):
        raise ConfigError(f"judge.kind: found {settings.kind!r}, expected one of {', '.join(registry.JUDGES.names())}")
    judge = _kind(settings).open(settings, JudgeContext(device, policy, world, cache))
    # the spread of a round is known once the round is judged
    return judge if settings.reward_scale in (1, "std") else Scaled(judge, float(settings.reward_scale))


class Scaled:
    """A judge whose judgements name the factor on their scores. Args: judge: gives them. scale: the factor."""

    def __init__(self, judge: Judge, scale: float) -> None:
        self._judge, self._scale = judge, scale

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """See `Judge`."""
        return [dataclasses.replace(one, scale=self._scale) for one in self._judge.judge(questions)]

    def describe(self) -> dict[str, Any]:
        """See `Judge`."""
        return self._judge.describe()

    def close(self) -> None:
        """See `Judge`."""
        self._judge.close()
