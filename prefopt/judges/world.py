"""The exact preferences of the testbed's world."""

from __future__ import annotations

from typing import ClassVar

from prefopt.errors import ConfigError
from prefopt.judges.base import Judge, JudgeContext, JudgeKind
from prefopt.settings import JudgeConfig


class TestbedJudge(JudgeKind):
    """Opens the judge of the world that a run on the testbed has."""

    __test__ = False  # not a test class, whatever pytest makes of its name
    testbed: ClassVar[bool] = True
    verdicts: ClassVar[tuple[str, ...]] = ("pairwise",)

    @classmethod
    def open(cls, settings: JudgeConfig, context: JudgeContext) -> Judge:
        """See `JudgeKind`."""
        if context.world is None:
            raise ConfigError(f"judge.kind: found {settings.kind!r}, the testbed's own judge, expected another one")
        return context.world
