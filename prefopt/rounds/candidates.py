"""Stages that sample completions: a round's candidates, and the answers of its policy to held-out prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefopt import generation, storage
from prefopt.errors import RoundError
from prefopt.generation.base import Engine, Sampling, seeds_of
from prefopt.rounds import stages, store
from prefopt.rounds.policies import RoundPolicies
from prefopt.rounds.shards import ShardProgress, Workers, do_shards
from prefopt.rounds.stages import JudgedView
from prefopt.rounds.store import Stage
from prefopt.settings import RunConfig
from prefopt.types import Prompt

HELD_OUT = 0  # in the place of a round's number in seeds: held-out prompts are answered with the same ones every time


@dataclass
class CandidateStages:
    """Samples completions in shards, or copies them from the run that `rounds.candidates` names.

    Args:
        config: of the whole run.
        policies: of the run.
        view: what of a completion a judge sees; an answer without a response is sampled again where a stage asks for
            it.
        workers: the processes that share the work.
        log: prints a line on rank 0.
    """

    config: RunConfig
    policies: RoundPolicies
    view: JudgedView
    workers: Workers
    log: Callable[[str], None]

    @property
    def sampling(self) -> Sampling:
        """How candidates are sampled."""
        return Sampling.of(self.config.generate)

    def stage(
        self, number: int, name: str, prompts: Sequence[Prompt], sampling: Sampling, seed: int, policy: int
    ) -> Stage:
        """A stage of round `number` as files. Args: policy: number of the policy that answers."""
        settings, shards = self.config.generate, stages.shards_of(prompts, self.config.rounds.shard)
        inputs = {
            "policy": self.policies.hash(policy),
            "generation_config": self.policies.generation_config(policy),
            "prompts": hash_of(prompts),
            "sampling": dataclasses.asdict(sampling),
            "seed": [self.config.seed, seed],
            "engine": settings.engine,
            "batch": generation.kind_of(settings.engine).inputs(settings),
        }
        keys = [[p.key for p in shard] for shard in shards]
        log = self.log if self.workers.first else lambda line: None
        return Stage(self.policies.folder(number), name, inputs, keys, log)

    def sample(self, number: int, stage: Stage, prompts: Sequence[Prompt], seed: int, policy: int) -> bool:
        """Sample what a stage lacks. Returns whether all of it is there."""
        if self.begin(stage):
            return True
        sampling = Sampling(**stage.inputs["sampling"])
        shards = stages.shards_of(prompts, self.config.rounds.shard)

        def make() -> Callable[[int], list[store.Row]]:
            engine = self.policies.engine(policy)
            opened.append(engine)
            with self.policies.autocast():
                stage.note(engine.describe())

            def sample(shard: int, again: int, which: Sequence[int]) -> list[store.Row]:
                where = f"{seed}" if again == 0 else f"{seed}, again {again}"
                seeds = seeds_of(self.config.seed, where, shard, len(shards[shard]), sampling.n)
                with self.policies.autocast():
                    return stages.generate_rows(
                        engine, [shards[shard][i] for i in which], sampling, [seeds[i] for i in which]
                    )

            def rows_of(shard: int) -> list[store.Row]:
                rows = sample(shard, 0, range(len(shards[shard])))
                for again in range(1, stage.inputs.get("resample", 0) + 1):
                    lost = [i for i, row in enumerate(rows) if self.view.of(stages.completions_of(row)).unparsed]
                    for i, row in zip(lost, sample(shard, again, lost) if lost else (), strict=True):
                        rows[i] = row | {"again": again}
                return rows

            return rows_of

        opened: list[Engine] = []
        title = f"round {number}/{self.config.rounds.count} {'generate' if seed else 'held-out'}"
        samples = [len(shard) * sampling.n for shard in shards]
        try:
            complete = do_shards(stage, self.workers, make, ShardProgress(title, samples, self.workers.first))
        finally:
            for engine in opened:
                engine.close()
        if complete:
            self.workers.first_alone(lambda: stage.finish({"prompts": len(prompts), "samples": sum(samples)}))
        return complete

    def begin(self, stage: Stage) -> bool:
        """Whether a stage is done already, the same on all ranks."""
        return bool(self.workers.first_alone(lambda: stage.begin() or self._taken_over(stage)))

    def _taken_over(self, stage: Stage) -> bool:
        """Whether the run that rounds.candidates names had this stage, made from the same; it is then copied.

        Raises: RoundError where not even the first round's candidates are there.
        """
        if self.config.rounds.candidates is None:
            return False
        folder = Path(self.config.rounds.candidates) / stage.folder.name
        try:
            samples = stage.take_over(folder)
        except RoundError as error:
            if stage.folder == self.policies.folder(1) and stage.name == "candidates":
                raise RoundError(f"rounds.candidates: {error}; expected the settings of that run") from None
            self.log(f"{stage.folder.name}: {stage.name} are made anew: {error}")
            return False
        self.log(f"{stage.folder.name}: {stage.name} of {samples:,} prompts are copied from {folder}")
        return True


def require(stage: Stage, name: str, number: int) -> None:
    """Raises: RoundError where a stage that another one reads is not finished."""
    if not store.finished(stage.folder, stage.name) or stage.missing():
        raise RoundError(
            f"round {number}: its {name} stage is not finished, or its files are not as it left them "
            f"({stage.manifest_path}); run it first"
        )


def hash_of(prompts: Sequence[Prompt]) -> str:
    """A hash of all that is read of prompts, answers included: those are judged by, and paired."""
    return storage.digest([[p.key, list(p.ids), p.answer, p.answer_ids and list(p.answer_ids)] for p in prompts])
