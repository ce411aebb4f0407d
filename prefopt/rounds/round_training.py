"""The stages of a round between its candidates and its evaluation: judge them, make pairs of them, train on these."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt import storage
from prefopt.errors import RoundError
from prefopt.figures import readable
from prefopt.generation.base import Engine, Sampling, seeds_of
from prefopt.generation.transformers_engine import TransformersEngine
from prefopt.judges.base import Judge
from prefopt.rounds import stages, store
from prefopt.rounds.candidates import CandidateStages, require
from prefopt.rounds.judging import RoundJudge
from prefopt.rounds.policies import RoundPolicies, free_gpu_memory
from prefopt.rounds.round_selection import CHOSEN_BY, Chooser
from prefopt.rounds.shards import ShardProgress, Workers, do_shards
from prefopt.rounds.store import Stage
from prefopt.rounds_method import in_rounds
from prefopt.settings import GenerateConfig, JudgeConfig, RoundsConfig, RunConfig
from prefopt.thoughts import NO_MARKER
from prefopt.training.metrics import Evaluator
from prefopt.types import Prompt


@dataclass
class RoundTraining:
    """Generates, judges, pairs and trains, one method for each stage, in this order.

    Args:
        config: of the whole run.
        prompts: of each round.
        choosing: held-out prompts by whose answers a round chooses among the policies that it passes through.
        policies, candidates, judge: of the run.
        tokenizer_hash: of the policy's tokenizer.
        train_once: trains one round: (its config, evaluators beside those of the run) -> exit status.
    """

    config: RunConfig
    prompts: Sequence[Sequence[Prompt]]
    choosing: Sequence[Prompt]
    policies: RoundPolicies
    candidates: CandidateStages
    judge: RoundJudge
    tokenizer_hash: str
    train_once: Callable[[RunConfig, Sequence[Evaluator]], int]

    @property
    def workers(self) -> Workers:
        """The processes that share the work."""
        return self.candidates.workers

    # generate and judge -----------------------------------------------------------------------------------------------

    def generate(self, number: int) -> bool:
        """Sample the candidates of a round. Returns whether all are there."""
        prompts = self.prompts[number - 1]
        return self.candidates.sample(number, self._generated(number), prompts, number, number - 1)

    def _generated(self, number: int) -> Stage:
        prompts, sampling = self.prompts[number - 1], self.candidates.sampling
        return self.candidates.stage(number, "candidates", prompts, sampling, number, number - 1)

    def judge_candidates(self, number: int) -> bool:
        """Judge the candidates of a round. Returns whether all are judged."""
        if self.judge.is_none:
            return True
        generated, prompts = self._generated(number), self.prompts[number - 1]
        require(generated, "generate", number)
        stage = self._judged(number, generated)
        if self.candidates.begin(stage):
            return True
        shards = stages.shards_of(prompts, self.config.rounds.shard)

        def make() -> Callable[[int], list[store.Row]]:
            judge = self.judge.open(number - 1)
            opened.append(judge)
            with self.judge.precision():
                stage.note(judge.describe())

            def rows_of(shard: int) -> list[store.Row]:
                with self.judge.precision():
                    return stages.judge_rows(judge, self.candidates.view, shards[shard], generated.read(shard))

            return rows_of

        opened: list[Judge] = []
        samples = [len(shard) * self.config.generate.n for shard in shards]
        progress = ShardProgress(
            f"round {number}/{self.config.rounds.count} judge", samples, self.workers.first, stages.row_scores
        )
        try:
            complete = do_shards(stage, self.workers, make, progress)
        finally:
            for judge in opened:
                judge.close()
            free_gpu_memory()
        if complete:
            self.workers.first_alone(lambda: stage.finish(_problems(stage.rows())))
        return complete

    def _judged(self, number: int, generated: Stage) -> Stage:
        inputs = {"candidates": generated.hash(), **self.judge.inputs()}
        if self.judge.is_policy:
            inputs["policy"] = generated.inputs["policy"]
        return Stage(self.policies.folder(number), "scores", inputs, generated.keys, generated.log)

    # pair -------------------------------------------------------------------------------------------------------------

    def pair(self, number: int) -> bool:
        """Make the pairs of a round from its candidates and judgements."""
        generated, prompts = self._generated(number), self.prompts[number - 1]
        require(generated, "generate", number)
        judged = None if self.judge.is_none else self._judged(number, generated)
        if judged is not None:
            require(judged, "judge", number)
        self.workers.first_alone(lambda: self.write_pairs(number, generated, judged, prompts))
        return True

    def write_pairs(self, number: int, generated: Stage, judged: Stage | None, prompts: Sequence[Prompt]) -> None:
        """Write `pairs.jsonl`, `candidates.jsonl` and `prompts.jsonl` of a round, and their manifest `pairs.json`."""
        config, folder, log = self.config, self.policies.folder(number), self.candidates.log
        inputs = {
            "candidates": generated.hash(),
            "scores": None if judged is None else judged.hash(),
            "method": config.to_dict()["method"],
            "rounds": {"pairs": config.rounds.pairs, "max_similarity": config.rounds.max_similarity},
        } | self.judge.scale_inputs()
        path, manifest = folder / "pairs.json", store.read_manifest(folder / "pairs.json")
        files = [folder / "pairs.jsonl", folder / "candidates.jsonl", folder / "prompts.jsonl"]
        if manifest is not None and manifest["inputs"] == json.loads(json.dumps(inputs)):
            if all(store.is_as_written(file, manifest["files"][file.name]) for file in files):
                return
            log(f"{folder}: pairs.jsonl or candidates.jsonl is not as it was written; they are made again")
        paired = stages.pair_rows(
            config,
            prompts,
            generated.rows(),
            None if judged is None else judged.rows(),
            view=self.candidates.view,
            tokenizer_hash=self.tokenizer_hash,
            about=self._about(number),
        )
        counts = paired.counts
        log(f"round {number}: {counts['pairs']:,} pairs of {counts['prompts']:,} prompts{_reasons(counts)}")
        if not paired.pairs:
            raise RoundError(
                f"{folder}: none of {counts['prompts']:,} prompts gave a pair{_reasons(counts)}; "
                f"the candidates and their judgements are in {generated.folder}"
            )
        for note in paired.notes:
            log(note)
        for name, value in paired.figures.items():
            log(f"  {name.replace('_', ' ')} {readable(value)}")
        for file, rows in zip(files, (paired.pairs, paired.table, map(_prompt_row, prompts)), strict=True):
            store.write_rows(file, rows)
        entries = {file.name: storage.sha256(file) for file in files}
        made = {"stage": "pair", "inputs": inputs, "files": entries, "counts": counts, "figures": paired.figures}
        store.write_manifest(path, made)

    def _about(self, number: int) -> dict[str, Any]:
        """The columns of the candidates' table that are the same for every candidate of a round."""
        settings, judge = self.config.generate, self.config.judge
        sampling = {name: getattr(settings, name) for name in ("temperature", "top_p", "top_k", "max_tokens")}
        model = self.policies.model(number - 1)
        return {
            "round": number,
            "policy": str(model.relative_to(self.policies.output)) if number > 1 else self.policies.start.path,
            "engine": settings.engine,
            **sampling,
            "judge": judge.kind if judge.path is None else f"{judge.kind} {judge.path}",
        }

    # train ------------------------------------------------------------------------------------------------------------

    def train(self, number: int) -> int:
        """Train the round's policy on its pairs, against the policy that the round began with. Returns exit status."""
        folder = self.policies.folder(number)
        if not store.done(self.config, folder, "pair"):
            raise RoundError(
                f"round {number}: its pairs are not made yet, or are not as they were made ({folder / 'pairs.jsonl'}); "
                "run the pair stage"
            )
        self.policies.unload()
        self.workers.first_alone(lambda: self.policies.weights(number - 1) and None)
        status = self.train_once(self.config_of(number), [self._chooser(number)] if self.choosing else [])
        if status == 0 and self.workers.first:
            self.policies.drop_scratch(number)
        free_gpu_memory()
        return status

    def config_of(self, number: int) -> RunConfig:
        """The settings of a round's training."""
        config, folder = self.config, self.policies.folder(number)
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, path=str(self.policies.model(number - 1))),
            data=dataclasses.replace(
                config.data, train=str(folder / "pairs.jsonl"), eval=None, eval_fraction=0.0, columns={}
            ),
            eval=dataclasses.replace(config.eval, select=CHOSEN_BY if self.choosing else None),
            lora=dataclasses.replace(config.lora, merge=False),  # the next round continues with the adapter
            rounds=RoundsConfig(),
            generate=GenerateConfig(stop=config.generate.stop),
            judge=JudgeConfig(),
            seed=storage.text_number(f"train:{config.seed}:{number}", 4) % 2**31,
            output=str(folder / "train"),
        )

    def _chooser(self, number: int) -> Evaluator:
        """Scores the policy in training by its answers to the prompts of rounds.select_prompts."""

        def engine_of(lm: Any) -> Engine:
            return TransformersEngine(lm, self.policies.tokenizer, batch=self.config.generate.batch)

        return Chooser(
            prompts=self.choosing,
            seeds=seeds_of(self.config.seed, "choosing", number, len(self.choosing), 1),
            sampling=Sampling.of(self.config.generate, n=1, logprobs=False),
            method=in_rounds(self.config.method),
            engine_of=engine_of,
            judge_of=lambda lm: self.judge.open_with(lambda: engine_of(lm)),
            start=lambda: self.policies.open(number - 1),
            generating=self.policies.autocast,
            judging=self.judge.precision,
        )


def _prompt_row(prompt: Prompt) -> store.Row:
    return {"key": prompt.key, "where": prompt.where, "prompt": prompt.prompt, "tokens": len(prompt.ids)}


def _problems(rows: Sequence[store.Row]) -> dict[str, Any]:
    """What was not judged and why, summed over a stage."""
    out: dict[str, Any] = {"prompts": len(rows), "judged": sum(len(row["judged"]) for row in rows)}
    for group in ("unseen", "problems"):
        totals: dict[str, int] = {}
        for row in rows:
            for name, count in row[group].items():
                totals[name] = totals.get(name, 0) + count
        out[group] = totals
    return out


def _reasons(counts: Mapping[str, Any]) -> str:
    """What gave no pair and why, as the end of a line."""
    completions, prompts = counts["candidates"], counts["prompts"]
    parts = [
        f"{count:,} of {completions:,} completions "
        + ("lack the response marker" if reason == NO_MARKER else f"not judged: {reason}")
        for reason, count in counts["not_judged"].items()
    ]
    parts += [f"{count:,} of {prompts:,} prompts skipped: {reason}" for reason, count in counts["dropped"].items()]
    parts += [f"judge: {count:,} {reason}" for reason, count in counts["judge_problems"].items()]
    return f" ({'; '.join(parts)})" if parts else ""
