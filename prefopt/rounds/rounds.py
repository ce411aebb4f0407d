"""Rounds: generate, judge, pair, train, evaluate, each from files to files. A killed run resumes where it was.

A round trains by calling the same entry as any other run, on its own `pairs.jsonl`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prefopt import storage
from prefopt.data.encode import tokenizer_content
from prefopt.data.round_prompts import hold_out, slices
from prefopt.data.structure import Structure
from prefopt.data.templates import Rendering
from prefopt.errors import DataError, RoundError
from prefopt.judges.base import Judge
from prefopt.rounds.candidates import CandidateStages, hash_of
from prefopt.rounds.held_out_evaluation import HeldOutEvaluation, OtherRun
from prefopt.rounds.judging import RoundJudge
from prefopt.rounds.policies import RoundPolicies
from prefopt.rounds.round_training import RoundTraining
from prefopt.rounds.shards import Workers
from prefopt.rounds.stages import JudgedView
from prefopt.rounds.store import stages_of
from prefopt.rounds_method import in_rounds
from prefopt.settings import RunConfig
from prefopt.training import model_card, model_sources
from prefopt.training.metrics import Evaluator
from prefopt.training.signals import Stop
from prefopt.types import Prompt


@dataclass
class Rounds:
    """All rounds of a run.

    Args:
        config: of the whole run.
        output: its folder.
        tokenizer: of the policy.
        start: the first policy.
        start_hash: of its weights.
        prompts: all, held-out ones too where `held_out` is None.
        held_out: prompts to compare policies on; None: taken from `prompts`.
        workers: the processes that share the work.
        device: where models run.
        train: trains one round: (its config, evaluators beside those here) -> exit status.
        stop: notified when there is nothing to save but files.
        log: prints a line on rank 0.
        track: gives the figures of a round to the trackers: (figures, round).
        world_judge: of the testbed.
        evaluators: functions of a policy, such as a testbed's exact figures.
        other: another run to compare policies with.
    """

    config: RunConfig
    output: Path
    tokenizer: Any
    start: model_sources.ModelSource
    start_hash: str
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt] | None
    workers: Workers
    device: torch.device
    train: Callable[[RunConfig, Sequence[Evaluator]], int]
    stop: Stop
    log: Callable[[str], None]
    track: Callable[[Mapping[str, float], int], None]
    world_judge: Judge | None = None
    evaluators: Sequence[Evaluator] = field(default_factory=tuple)
    other: OtherRun | None = None

    def __post_init__(self) -> None:
        config = self.config
        of_rounds, held_out, choosing = self._split_prompts()
        rendering = Rendering.of(config.data, self.tokenizer)
        view = JudgedView(in_rounds(config.method), Structure(self.tokenizer, rendering))
        self.policies = RoundPolicies(
            config, self.output, self.tokenizer, self.start, self.start_hash, device=self.device
        )
        self.judge = RoundJudge(config, self.policies, rendering, self.world_judge)
        candidates = CandidateStages(config, self.policies, view, self.workers, self.log)
        self.training = RoundTraining(
            config=config,
            prompts=of_rounds,
            choosing=choosing,
            policies=self.policies,
            candidates=candidates,
            judge=self.judge,
            tokenizer_hash=tokenizer_content(self.tokenizer),
            train_once=self.train,
        )
        self.evaluation = HeldOutEvaluation(
            config=config,
            output=self.output,
            held_out=held_out,
            policies=self.policies,
            candidates=candidates,
            judge=self.judge,
            evaluators=self.evaluators,
            other=self.other,
            track=self.track,
        )

    def _split_prompts(self) -> tuple[list[list[Prompt]], Sequence[Prompt], Sequence[Prompt]]:
        """The prompts of each round, those to evaluate on, and those to choose among policies by."""
        rounds = self.config.rounds
        rest, taken = self.prompts, self.held_out is None
        others, held_out = hold_out(self.prompts if self.held_out is None else self.held_out, rounds.eval_prompts)
        others, choosing = hold_out(others, rounds.select_prompts)
        if len(choosing) < rounds.select_prompts:
            raise DataError(
                f"rounds.select_prompts: found {rounds.select_prompts:,}, but beside {len(held_out):,} of "
                f"rounds.eval_prompts there are {len(choosing):,} prompts (lower either, or name more data)"
            )
        rest = others if taken else rest
        held = len(held_out) + len(choosing) if taken else 0
        return slices(rest, rounds.count, rounds.prompts, self.config.seed, held), held_out, choosing

    def run(self) -> int:
        """Every stage of every round that is not done yet. Returns 0, or 75 when a signal requested a stop."""
        self.clean()
        for number in range(self.config.rounds.count + 1):
            for name in stages_of(number):
                if name in ("generate", "judge", "pair") and self.policies.is_trained(number):
                    continue
                status = self.stage(name, number)
                if status != 0:
                    return status
        self.finish()
        return 0

    def stage(self, name: str, number: int) -> int:
        """One stage of one round. Returns 0 when it is done, or this process's part of it; 75 after a signal."""
        if number > 1 and not self.policies.is_trained(number - 1):
            raise RoundError(
                f"round {number}: round {number - 1} has not trained its policy yet ({self.policies.model(number - 1)})"
            )
        if name == "train":
            return self.training.train(number)
        bodies = {
            "generate": self.training.generate,
            "judge": self.training.judge_candidates,
            "pair": self.training.pair,
            "evaluate": self.evaluation.evaluate,
        }
        self.stop.exit_at_once()
        try:
            if not bodies[name](number):
                self.log(f"round {number}: this part of the {name} stage is done, others are not yet")
            return 0
        finally:
            self.stop.coordinate_exit()

    def finish(self) -> None:
        """Export the last policy."""
        self.workers.first_alone(lambda: self.policies.export(self._model_card, self.log))

    def clean(self) -> None:
        """Remove what killed processes have left, where no other process works on the same run."""
        if self.workers.first:
            storage.sweep(self.output)
            for number in range(1, self.config.rounds.count + 1):
                if self.policies.is_trained(number):
                    self.policies.drop_scratch(number)

    def prompts_of_rounds(self) -> list[int]:
        """How many prompts each round has."""
        return [len(part) for part in self.training.prompts]

    def data_hashes(self) -> dict[str, str]:
        """Hashes of the prompts, of the rounds in which they are used, and of those that are held out."""
        parts = self.training.prompts
        return {
            "train": hash_of(sorted((p for part in parts for p in part), key=lambda p: p.key)),
            "order": storage.digest([[p.key for p in part] for part in parts]),
            "eval": hash_of([*self.evaluation.held_out, *self.training.choosing]),
        }

    def _model_card(self, adapter: bool) -> str:
        """The model card of all rounds, in the place of the last round's own."""
        figures = [found.metrics() for found in self.evaluation.figures()]
        train = self.data_hashes()["train"]
        return model_card.page(
            model_card.contents_of_rounds(self.config, self.tokenizer, figures, train, adapter=adapter)
        )
