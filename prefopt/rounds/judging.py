"""The judge of a run of rounds: what its judgements depend on, how it is opened, and in which precision it computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from prefopt import judges
from prefopt.data.encoder import Encoder
from prefopt.data.templates import Rendering
from prefopt.generation.base import Engine
from prefopt.judges.base import Judge
from prefopt.rounds.policies import RoundPolicies
from prefopt.settings import FREE_TO_CHANGE, RunConfig

POLICY = "policy"  # the judge's path where the policy judges itself


@dataclass
class RoundJudge:
    """The judge that `judge` names.

    Args:
        config: of the whole run.
        policies: of the run, for a policy that judges itself.
        rendering: how the policy's prompts are written.
        world_judge: of the testbed.
    """

    config: RunConfig
    policies: RoundPolicies
    rendering: Rendering
    world_judge: Judge | None = None

    def __post_init__(self) -> None:
        self.hash = judges.identity(self.config.judge)

    @property
    def is_none(self) -> bool:
        """Whether the run has no judge."""
        return self.config.judge.kind == "none"

    @property
    def is_policy(self) -> bool:
        """Whether the policy judges itself."""
        return self.config.judge.path == POLICY

    def open(self, number: int) -> Judge:
        """The judge; where it is the policy itself, the one after round `number`."""
        return self.open_with(lambda: self.policies.engine(number))

    def open_with(self, policy: Callable[[], Engine]) -> Judge:
        """The judge; where it is the policy itself, the one that this inference engine has."""
        encoder = Encoder(self.policies.tokenizer, 2**31, rendering=self.rendering)
        return judges.make(
            self.config.judge,
            device=self.policies.device,
            policy=lambda: (policy(), encoder),
            world=self.world_judge,
        )

    def precision(self) -> AbstractContextManager[Any]:
        """The precision of the judge: the policy's own where it is the policy."""
        return self.policies.autocast() if self.is_policy else nullcontext()

    def inputs(self) -> dict[str, Any]:
        """What decides the judgements, for manifests."""
        free = [key.partition(".")[2] for key in FREE_TO_CHANGE if key.startswith("judge.")]
        free.append("reward_scale")  # it decides the win probabilities that are made of judgements
        settings = {k: v for k, v in dataclasses.asdict(self.config.judge).items() if k not in free}
        if not settings["args"]:
            del settings["args"]  # as in manifests of older versions
        return {"judge": settings, "judge_hash": self.hash}

    def scale_inputs(self) -> dict[str, Any]:
        """What decides the win probabilities made of judgements; nothing for the default, as in older manifests."""
        scale = self.config.judge.reward_scale
        return {} if scale == 1 else {"reward_scale": scale}
