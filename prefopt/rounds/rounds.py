"""Rounds: generate, judge, pair, train, evaluate, each from files to files. A killed run continues where it was.

A round trains by calling the same entry as any other run, on its own `pairs.jsonl`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prefopt import generation, judges, storage
from prefopt.data.encode import tokenizer_content
from prefopt.data.encoder import Encoder
from prefopt.data.round_prompts import hold_out, slices
from prefopt.data.structure import Structure
from prefopt.data.templates import Rendering
from prefopt.errors import DataError, RoundError
from prefopt.evaluate.rounds_report import RoundFigures, evaluate_round, write_report
from prefopt.evaluate.samples import SampleFigures, score_samples
from prefopt.figures import readable
from prefopt.generation.base import Engine, Sampling, seeds_of
from prefopt.judges.base import Judge
from prefopt.method import Method
from prefopt.rounds import stages, store
from prefopt.rounds.round_selection import CHOSEN_BY, Chooser
from prefopt.rounds.shards import ShardProgress, Workers, do_shards
from prefopt.rounds.stages import JudgedView
from prefopt.rounds.store import Stage
from prefopt.settings import FREE_TO_CHANGE, GenerateConfig, JudgeConfig, RoundsConfig, RunConfig
from prefopt.training import (
    adapter_loading,
    adapter_saving,
    checkpoint,
    model_card,
    model_hashes,
    model_sources,
)
from prefopt.training.export import describe_answers
from prefopt.training.metrics import Evaluation, Evaluator
from prefopt.training.signals import Stop
from prefopt.types import Completion, Prompt

STAGES = ("generate", "judge", "pair", "train", "evaluate")
POLICY = "policy"  # the judge's path where the policy judges itself
HELD_OUT = 0  # in the place of a round's number in seeds: held-out prompts are answered with the same ones every time


@dataclass(frozen=True)
class OtherRun:
    """Another run of rounds, whose answers to the same held-out prompts are compared with.

    Args: folder: its output. method: its method, which says what of its answers a judge may see.
    """

    folder: Path
    method: Method

    def held_out(self, number: int) -> Path:
        """The folder of its round, which holds its answers to held-out prompts."""
        return self.folder / f"round_{number:02d}"


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
        stop: told when there is nothing to save but files.
        track: gives the figures of a round to the trackers: (figures, round).
        world_judge: of the testbed.
        evaluators: functions of a policy, such as a testbed's exact figures.
        other: another run to compare policies with.
        say: prints a line on the first process.
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
    say: Callable[[str], None]
    track: Callable[[Mapping[str, float], int], None]
    world_judge: Judge | None = None
    evaluators: Sequence[Evaluator] = field(default_factory=tuple)
    other: OtherRun | None = None
    _loaded: tuple[int, Any] | None = None  # a policy, by the number of its round
    _verified: set[int] = field(default_factory=set)  # rounds whose policy is as its training left it

    def __post_init__(self) -> None:
        rounds = self.config.rounds
        rest, taken = self.prompts, self.held_out is None
        others, self.held_out = hold_out(self.prompts if self.held_out is None else self.held_out, rounds.eval_prompts)
        others, self._choosing = hold_out(others, rounds.select_prompts)
        if len(self._choosing) < rounds.select_prompts:
            raise DataError(
                f"rounds.select_prompts: found {rounds.select_prompts:,}, but beside {len(self.held_out):,} of "
                f"rounds.eval_prompts there are {len(self._choosing):,} prompts (lower either, or name more data)"
            )
        rest = others if taken else rest
        held = len(self.held_out) + len(self._choosing) if taken else 0
        self._slices = slices(rest, rounds.count, rounds.prompts, self.config.seed, held)
        self.judge_hash = judges.identity(self.config.judge)
        self._start_generation = model_hashes.generation_config_hash(
            self.start.path
        ) or model_hashes.generation_config_hash(self.start.base)
        self._tokenizer_hash = tokenizer_content(self.tokenizer)
        self._rendering = Rendering.of(self.config.data, self.tokenizer)
        self._view = JudgedView(self.config.method, Structure(self.tokenizer, self._rendering))

    # The conductor ----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Every stage of every round that is not done yet. Returns 0, or 75 when a signal asked to leave."""
        self.clean()
        for number in range(self.config.rounds.count + 1):
            for name in STAGES if number else ("evaluate",):
                if name in ("generate", "judge", "pair") and self.policy_is_there(number):
                    continue
                status = self.stage(name, number)
                if status != 0:
                    return status
        self.finish()
        return 0

    def prompts_of_rounds(self) -> list[int]:
        """How many prompts each round has."""
        return [len(part) for part in self._slices]

    def data_hashes(self) -> dict[str, str]:
        """What the prompts are, in which rounds they are used, and which are held out."""
        assert self.held_out is not None
        order = [[p.key for p in part] for part in self._slices]
        return {
            "train": _hash_of(sorted((p for part in self._slices for p in part), key=lambda p: p.key)),
            "order": storage.digest(order),
            "eval": _hash_of([*self.held_out, *self._choosing]),
        }

    def stage(self, name: str, number: int) -> int:
        """One stage of one round. Returns 0 when it is done, or this process's part of it; 75 after a signal."""
        if number and number > 1 and not self.policy_is_there(number - 1):
            raise RoundError(
                f"round {number}: round {number - 1} has not trained its policy yet ({self.model(number - 1)})"
            )
        if name == "train":
            return self._train(number)
        self.stop.exit_at_once()
        try:
            if not getattr(self, f"_{name}")(number):
                self.say(f"round {number}: this part of the {name} stage is done, others are not yet")
            return 0
        finally:
            self.stop.coordinate_exit()

    def finish(self) -> None:
        """Export the last policy."""
        self.workers.first_alone(self._export)

    def clean(self) -> None:
        """Remove what kills have left, where no other process works on the same run."""
        if self.workers.first:
            storage.sweep(self.output)
            for number in range(1, self.config.rounds.count + 1):
                if self.policy_is_there(number):
                    self._drop_scratch(number)

    # Places -----------------------------------------------------------------------------------------------------------

    def folder(self, number: int) -> Path:
        return self.output / f"round_{number:02d}"

    def model(self, number: int) -> Path:
        """The policy after a round; after round 0 the one that the run began with."""
        return self.folder(number) / "train" / "model" if number else Path(self.start.path)

    def policy_is_there(self, number: int) -> bool:
        return number == 0 or storage.is_there(self.model(number) / storage.MANIFEST)

    def _policy_hash(self, number: int) -> str:
        return self.start_hash if number == 0 else storage.sha256(self.model(number) / storage.MANIFEST)

    def _weights(self, number: int) -> model_sources.ModelSource:
        """Where the policy after a round is. Raises: RoundError where it is not as its training left it."""
        if number == 0:
            return self.start
        if number not in self._verified:
            wrong = storage.damage(self.model(number))
            if wrong is not None:
                train = self.folder(number) / "train"
                raise RoundError(
                    f"{self.model(number)}: {wrong}: the policy of round {number} is damaged; put it back from a copy, "
                    f"or delete {train} and run again: the round is trained again"
                )
            self._verified.add(number)
        return model_sources.find(str(self.model(number)), self.config.model)

    # Stages -----------------------------------------------------------------------------------------------------------

    def _generate(self, number: int) -> bool:
        return self._candidates(number, self._generate_stage(number), self._slices[number - 1], number, number - 1)

    def _generate_stage(self, number: int) -> Stage:
        return self._stage(number, "candidates", self._slices[number - 1], self._sampling, number, number - 1)

    def _stage(
        self, number: int, name: str, prompts: Sequence[Prompt], sampling: Sampling, seed: int, policy: int
    ) -> Stage:
        settings, shards = self.config.generate, stages.shards_of(prompts, self.config.rounds.shard)
        inputs = {
            "policy": self._policy_hash(policy),
            # of the policy that the run begins with; a later one's is in its manifest
            "generation_config": self._start_generation if policy == 0 else None,
            "prompts": _hash_of(prompts),
            "sampling": dataclasses.asdict(sampling),
            "seed": [self.config.seed, seed],
            "engine": settings.engine,
            "batch": [settings.batch, settings.continuous] if settings.engine == "transformers" else None,
        }
        keys = [[p.key for p in shard] for shard in shards]
        return Stage(self.folder(number), name, inputs, keys, self.say if self.workers.first else lambda line: None)

    @property
    def _sampling(self) -> Sampling:
        return Sampling.of(self.config.generate)

    def _candidates(self, number: int, stage: Stage, prompts: Sequence[Prompt], seed: int, policy: int) -> bool:
        """Sample the candidates of a stage's prompts. Returns whether all are there."""
        if self._begin(stage):
            return True
        sampling = Sampling(**stage.inputs["sampling"])
        shards = stages.shards_of(prompts, self.config.rounds.shard)

        def make() -> Callable[[int], list[store.Row]]:
            engine = self._engine(policy)
            opened.append(engine)
            with self._autocast():
                stage.note(engine.describe())

            def sample(shard: int, again: int, which: Sequence[int]) -> list[store.Row]:
                where = f"{seed}" if again == 0 else f"{seed}, again {again}"
                seeds = seeds_of(self.config.seed, where, shard, len(shards[shard]), sampling.n)
                with self._autocast():
                    return stages.generate_rows(
                        engine, [shards[shard][i] for i in which], sampling, [seeds[i] for i in which]
                    )

            def rows_of(shard: int) -> list[store.Row]:
                rows = sample(shard, 0, range(len(shards[shard])))
                for again in range(1, stage.inputs.get("resample", 0) + 1):
                    lost = [i for i, row in enumerate(rows) if self._view.of(stages.completions_of(row)).unparsed]
                    for i, row in zip(lost, sample(shard, again, lost) if lost else (), strict=True):
                        rows[i] = row | {"again": again}
                return rows

            return rows_of

        opened: list[Engine] = []
        title = f"round {number}/{self.config.rounds.count} {'generate' if seed else 'held-out'}"
        samples = [len(shard) * sampling.n for shard in shards]
        try:
            there = do_shards(stage, self.workers, make, ShardProgress(title, samples, self.workers.first))
        finally:
            for engine in opened:
                engine.close()
        if there:
            self.workers.first_alone(lambda: stage.finish({"prompts": len(prompts), "samples": sum(samples)}))
        return there

    def _judge(self, number: int) -> bool:
        if self.config.judge.kind == "none":
            return True
        generated, prompts = self._generate_stage(number), self._slices[number - 1]
        self._require(generated, "generate", number)
        stage = self._judge_stage(number, generated)
        if self._begin(stage):
            return True
        shards = stages.shards_of(prompts, self.config.rounds.shard)

        def make() -> Callable[[int], list[store.Row]]:
            judge = self._judge_of(number - 1)
            opened.append(judge)
            with self._judging():
                stage.note(judge.describe())

            def rows_of(shard: int) -> list[store.Row]:
                with self._judging():
                    return stages.judge_rows(judge, self._view, shards[shard], generated.read(shard))

            return rows_of

        opened: list[Judge] = []
        samples = [len(shard) * self.config.generate.n for shard in shards]
        progress = ShardProgress(
            f"round {number}/{self.config.rounds.count} judge", samples, self.workers.first, stages.row_scores
        )
        try:
            there = do_shards(stage, self.workers, make, progress)
        finally:
            for judge in opened:
                judge.close()
            _free()
        if there:
            self.workers.first_alone(lambda: stage.finish(_problems(stage.rows())))
        return there

    def _judge_stage(self, number: int, generated: Stage) -> Stage:
        inputs = {"candidates": generated.hash(), **self._judge_inputs()}
        if self.config.judge.path == POLICY:
            inputs["policy"] = generated.inputs["policy"]
        return Stage(self.folder(number), "scores", inputs, generated.keys, generated.say)

    def _judge_inputs(self) -> dict[str, Any]:
        """What decides the judgements."""
        free = [key.partition(".")[2] for key in FREE_TO_CHANGE if key.startswith("judge.")]
        free.append("reward_scale")  # of what is made of them
        settings = {k: v for k, v in dataclasses.asdict(self.config.judge).items() if k not in free}
        return {"judge": settings, "judge_hash": self.judge_hash}

    def _scale_inputs(self) -> dict[str, Any]:
        """What decides the win probabilities made of judgements, where it is not what it always was."""
        scale = self.config.judge.reward_scale
        return {} if scale == 1 else {"reward_scale": scale}

    def _pair(self, number: int) -> bool:
        generated, prompts = self._generate_stage(number), self._slices[number - 1]
        self._require(generated, "generate", number)
        judged = None if self.config.judge.kind == "none" else self._judge_stage(number, generated)
        if judged is not None:
            self._require(judged, "judge", number)
        self.workers.first_alone(lambda: self._write_pairs(number, generated, judged, prompts))
        return True

    def _write_pairs(self, number: int, generated: Stage, judged: Stage | None, prompts: Sequence[Prompt]) -> None:
        config, folder = self.config, self.folder(number)
        inputs = {
            "candidates": generated.hash(),
            "scores": None if judged is None else judged.hash(),
            "method": config.to_dict()["method"],
            "rounds": {"pairs": config.rounds.pairs, "max_similarity": config.rounds.max_similarity},
        } | self._scale_inputs()
        path, manifest = folder / "pairs.json", store.read_manifest(folder / "pairs.json")
        files = [folder / "pairs.jsonl", folder / "candidates.jsonl", folder / "prompts.jsonl"]
        if manifest is not None and manifest["inputs"] == json.loads(json.dumps(inputs)):
            if all(store.is_as_written(file, manifest["files"][file.name]) for file in files):
                return
            self.say(f"{folder}: pairs.jsonl or candidates.jsonl is not as it was written; they are made again")
        paired = stages.pair_rows(
            config,
            prompts,
            generated.rows(),
            None if judged is None else judged.rows(),
            view=self._view,
            tokenizer_hash=self._tokenizer_hash,
            about=self._about(number),
        )
        counts = paired.counts
        self.say(f"round {number}: {counts['pairs']:,} pairs of {counts['prompts']:,} prompts{_reasons(counts)}")
        if not paired.pairs:
            raise RoundError(
                f"{folder}: none of {counts['prompts']:,} prompts gave a pair{_reasons(counts)}; "
                f"the candidates and what the judge said are in {generated.folder}"
            )
        for note in paired.notes:
            self.say(note)
        for name, value in paired.figures.items():
            self.say(f"  {name.replace('_', ' ')} {readable(value)}")
        for file, rows in zip(files, (paired.pairs, paired.table, map(_prompt_row, prompts)), strict=True):
            store.write_rows(file, rows)
        entries = {file.name: storage.sha256(file) for file in files}
        made = {"stage": "pair", "inputs": inputs, "files": entries, "counts": counts, "figures": paired.figures}
        store.write_manifest(path, made)

    def _about(self, number: int) -> dict[str, Any]:
        """What is the same for every candidate of a round, for its table."""
        settings, judge = self.config.generate, self.config.judge
        sampling = {name: getattr(settings, name) for name in ("temperature", "top_p", "top_k", "max_tokens")}
        return {
            "round": number,
            "policy": self.start.path if number == 1 else str(self.model(number - 1).relative_to(self.output)),
            "engine": settings.engine,
            **sampling,
            "judge": judge.kind if judge.path is None else f"{judge.kind} {judge.path}",
        }

    def _train(self, number: int) -> int:
        """Train the round's policy on its pairs, against the policy that the round began with."""
        folder = self.folder(number)
        if not store.done(self.config, folder, "pair"):
            raise RoundError(
                f"round {number}: its pairs are not made yet, or are not as they were made ({folder / 'pairs.jsonl'}); "
                "run the pair stage"
            )
        self._forget()
        self.workers.first_alone(lambda: self._weights(number - 1) and None)
        status = self.train(self.config_of(number), [self._chooser(number)] if self._choosing else [])
        if status == 0 and self.workers.first:
            self._drop_scratch(number)
        _free()
        return status

    def _drop_scratch(self, number: int) -> None:
        """What a round's training needs no more once its model is exported."""
        for name in ("checkpoints", "best"):
            checkpoint.drop_all(self.folder(number) / "train" / name)

    def _chooser(self, number: int) -> Evaluator:
        """Says of the policy in training how good its answers to the prompts of rounds.select_prompts are."""
        from prefopt.generation.transformers_engine import TransformersEngine

        def engine_of(lm: Any) -> Engine:
            return TransformersEngine(lm, self.tokenizer, batch=self.config.generate.batch)

        return Chooser(
            prompts=self._choosing,
            seeds=seeds_of(self.config.seed, "choosing", number, len(self._choosing), 1),
            sampling=Sampling.of(self.config.generate, n=1, logprobs=False),
            method=self.config.method,
            engine_of=engine_of,
            judge_of=lambda lm: self._judge_with(lambda: engine_of(lm)),
            start=lambda: self._open(number - 1),
            generating=self._autocast,
            judging=self._judging,
        )

    def config_of(self, number: int) -> RunConfig:
        """The settings of a round's training."""
        config, folder = self.config, self.folder(number)
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, path=str(self.model(number - 1))),
            data=dataclasses.replace(
                config.data, train=str(folder / "pairs.jsonl"), eval=None, eval_fraction=0.0, columns={}
            ),
            eval=dataclasses.replace(config.eval, select=CHOSEN_BY if self._choosing else None),
            lora=dataclasses.replace(config.lora, merge=False),  # the next round goes on with the adapter
            rounds=RoundsConfig(),
            generate=GenerateConfig(stop=config.generate.stop),
            judge=JudgeConfig(),
            seed=storage.text_number(f"train:{config.seed}:{number}", 4) % 2**31,
            output=str(folder / "train"),
        )

    def _require(self, stage: Stage, name: str, number: int) -> None:
        if not store.finished(stage.folder, stage.name) or stage.missing():
            raise RoundError(
                f"round {number}: its {name} stage is not finished, or its files are not as it left them "
                f"({stage.manifest_path}); run it first"
            )

    def _begin(self, stage: Stage) -> bool:
        """Whether a stage is done already; all processes hear the same."""
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
            if stage.folder == self.folder(1) and stage.name == "candidates":
                raise RoundError(f"rounds.candidates: {error}; expected the settings of that run") from None
            self.say(f"{stage.folder.name}: {stage.name} are made anew: {error}")
            return False
        self.say(f"{stage.folder.name}: {stage.name} of {samples:,} prompts are taken over from {folder}")
        return True

    # Evaluation -------------------------------------------------------------------------------------------------------

    def _evaluate(self, number: int) -> bool:
        """Compare the policy after a round with the first one and the one before, on held-out prompts."""
        assert self.held_out is not None
        if not self.held_out:
            return True
        if not self.policy_is_there(number):
            raise RoundError(f"round {number}: it has not trained its policy yet ({self.model(number)})")
        for k in {*self._compared(number).values()} - {number}:
            self._require(self._held_out_stage(k), "evaluate", k)
        stage = self._held_out_stage(number)
        if not self._candidates(number, stage, self.held_out, HELD_OUT, number):
            return False
        self.workers.first_alone(lambda: self._write_figures(number))
        return True

    def _held_out_stage(self, number: int) -> Stage:
        assert self.held_out is not None
        sampling = dataclasses.replace(self._sampling, n=1, logprobs=False)
        stage = self._stage(number, "held_out", self.held_out, sampling, HELD_OUT, number)
        asked = {"resample": self.config.rounds.resample, "card": dict(self.config.method.card())}
        return dataclasses.replace(stage, inputs={**stage.inputs, **asked})

    def _write_figures(self, number: int) -> None:
        path = self.folder(number) / "evaluate.json"
        inputs: dict[str, Any] = {name: self._held_out_stage(k).hash() for name, k in self._compared(number).items()}
        inputs |= json.loads(json.dumps(self._judge_inputs() | self._scale_inputs()))
        if self._other_answers(number) is not None:
            assert self.other is not None
            inputs["other"] = storage.sha256(self.other.held_out(number) / "held_out.json")
        manifest = store.read_manifest(path)
        if manifest is None or manifest["inputs"] != inputs:
            figures = self._figures(number)
            self.track(figures.metrics(), number)
            store.write_manifest(path, {"stage": "evaluate", "inputs": inputs, "figures": figures.to_dict()})
        self._report(number)

    def _compared(self, number: int) -> dict[str, int]:
        return {"now": number} | ({"previous": number - 1, "first": 0} if number else {})

    def _figures(self, number: int) -> RoundFigures:
        assert self.held_out is not None
        said: dict[int, list[list[Completion]]] = {}
        for k in {*self._compared(number).values()}:
            said[k] = [list(stages.completions_of(row)) for row in self._held_out_stage(k).rows()]
        completions = {name: said[k] for name, k in self._compared(number).items()}
        others = self._other_answers(number)
        if others is not None:
            completions["other"] = [others.get(prompt.key, []) for prompt in self.held_out]
        samples = [(p, c) for p, group in zip(self.held_out, completions["now"], strict=True) for c in group]
        kl: dict[str, SampleFigures] = {}
        more: dict[str, float] = {}
        lm = self._load(number)
        for evaluator in self.evaluators:
            found = evaluator(lm)
            more |= dict(found.figures if isinstance(found, Evaluation) else found)
        more |= self._method_figures(number, completions["now"])
        if number:
            for name, k in {"to_round_start": number - 1, "to_first": 0}.items():
                if name == "to_first" and number == 1:
                    kl[name] = kl["to_round_start"]
                    continue
                with self._autocast():
                    kl[name] = score_samples(
                        lm, self._open(k), samples, batch=self.config.eval.batch, kernel=self.config.kernel
                    )
        judge = None if self.config.judge.kind == "none" else self._judge_of(number)
        try:
            with self._judging():
                return evaluate_round(
                    number,
                    self.held_out,
                    completions,
                    judge,
                    self.config.method,
                    kl,
                    more,
                    other=None if self.other is None else self.other.method,
                )
        finally:
            if judge is not None:
                judge.close()
            _free()

    def _method_figures(self, number: int, now: Sequence[Sequence[Completion]]) -> dict[str, float]:
        """What the method has to say of the held-out answers, and of the pairs that the round was trained on."""
        figures = dict(self.config.method.text_figures([c.text for group in now for c in group]))
        if "parsed" in figures:  # of the first attempts: these were sampled again where they could not be read
            rows = self._held_out_stage(number).rows()
            lost = [bool(row.get("again") or self._view.of(stages.completions_of(row)).unparsed) for row in rows]
            figures["parsed"] = 1 - sum(lost) / len(lost)
        pairs = store.read_manifest(self.folder(number) / "pairs.json") if number else None
        return figures | {f"pairs/{name}": value for name, value in (pairs or {}).get("figures", {}).items()}

    def _other_answers(self, number: int) -> dict[str, list[Completion]] | None:
        """What the run that is compared with has answered after the same round, by prompt; None where it is not so far.

        Raises: RoundError when none of its held-out prompts is one of this run's.
        """
        assert self.held_out is not None
        if self.other is None or not store.finished(folder := self.other.held_out(number), "held_out"):
            return None
        rows = [row for path in sorted((folder / "held_out").glob("*.jsonl")) for row in store.read_rows(path)]
        answers = {row["key"]: list(stages.completions_of(row)) for row in rows}
        if not any(prompt.key in answers for prompt in self.held_out):
            raise RoundError(
                f"rounds.compare: {folder / 'held_out'} answers none of this run's {len(self.held_out)} held-out "
                "prompts, expected a run on the same data"
            )
        return answers

    def figures(self) -> list[RoundFigures]:
        """Of the rounds that are evaluated, in order."""
        found = []
        for number in range(self.config.rounds.count + 1):
            manifest = store.read_manifest(self.folder(number) / "evaluate.json")
            if manifest is None:
                break
            found.append(RoundFigures.from_dict(manifest["figures"]))
        return found

    def _report(self, number: int) -> None:
        """rounds.jsonl, rounds.md and rounds.png of all rounds so far."""
        figures = self.figures()
        store.write_rows(self.output / "rounds.jsonl", ({"round": f.round} | f.metrics() for f in figures))
        title = f"{self.config.method_name}, {self.config.rounds.count} rounds"
        write_report(self.output, figures, title, plot=number == self.config.rounds.count)

    # Models -----------------------------------------------------------------------------------------------------------

    def _load(self, number: int) -> Any:
        """The policy after a round, kept until another one is asked for or a round trains."""
        if self._loaded is None or self._loaded[0] != number:
            self._forget()
            self._loaded = (number, self._open(number))
        return self._loaded[1]

    def _forget(self) -> None:
        self._loaded = None
        _free()

    def _open(self, number: int) -> Any:
        """The policy after a round, on its device."""
        key = "model.path"
        lm: Any = adapter_loading.load_frozen(self._weights(number), self.config.model, key)
        return lm.to(self.device).eval()

    def _autocast(self) -> AbstractContextManager[Any]:
        """The precision that the policy is trained in."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.config.train.mixed_precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _judging(self) -> AbstractContextManager[Any]:
        """The precision of the judge: the policy's own where it is the policy."""
        return self._autocast() if self.config.judge.path == POLICY else nullcontext()

    def _engine(self, number: int) -> Engine:
        self._weights(number)  # verified, for engines that read the folder themselves
        return generation.make(
            self.config.generate,
            path=str(self.model(number)),
            load=lambda: self._load(number),
            model=self.config.model,
            tokenizer=self.tokenizer,
        )

    def _judge_of(self, number: int) -> Judge:
        """The judge; where it is the policy itself, the one after round `number`."""
        return self._judge_with(lambda: self._engine(number))

    def _judge_with(self, policy: Callable[[], Engine]) -> Judge:
        encoder = Encoder(self.tokenizer, 2**31, rendering=self._rendering)
        return judges.make(
            self.config.judge,
            device=self.device,
            policy=lambda: (policy(), encoder),
            world=self.world_judge,
        )

    def _export(self) -> None:
        if storage.damage(self.output / "model") is None:
            return
        number = self.config.rounds.count
        adapted = self._weights(number).adapter is not None

        def write(folder: Path) -> None:
            checkpoint.copy(self.model(number), folder)
            self._write_card(folder, adapter=adapted)

        def write_merged(folder: Path) -> None:
            adapter_saving.save_merged(lm, folder)
            self.tokenizer.save_pretrained(folder)
            describe_answers(folder, self.tokenizer, self.config.method.card(), self.config.generate.stop)
            self._write_card(folder, adapter=False)

        if not (self.config.lora.merge and adapted):
            checkpoint.export(self.output / "model", write)
            return
        checkpoint.export(self.output / "adapter", write)
        lm = adapter_loading.load_frozen(self._weights(number), self.config.model, "model.path")
        adapter_saving.merge(lm, self.output / "adapter", self.config.model)
        checkpoint.export(self.output / "model", write_merged)
        self.say(f"merged: the adapter itself is in {self.output / 'adapter'}")

    def _write_card(self, folder: Path, adapter: bool) -> None:
        """The card of all rounds, in the place of the last round's own."""
        figures = [found.metrics() for found in self.figures()]
        hashes = self.data_hashes()
        known = model_card.facts_of_rounds(self.config, self.tokenizer, figures, hashes["train"], adapter=adapter)
        (folder / model_card.FILE).write_text(model_card.page(known), encoding="utf-8")


def _hash_of(prompts: Sequence[Prompt]) -> str:
    """Of all that is read of them, answers included: those are judged by, and paired."""
    return storage.digest([[p.key, list(p.ids), p.answer, p.answer_ids and list(p.answer_ids)] for p in prompts])


def _prompt_row(prompt: Prompt) -> store.Row:
    return {"key": prompt.key, "where": prompt.where, "prompt": prompt.prompt, "tokens": len(prompt.ids)}


def _problems(rows: Sequence[store.Row]) -> dict[str, Any]:
    """What the judge could not say, summed over a stage."""
    out: dict[str, Any] = {"prompts": len(rows), "judged": sum(len(row["judged"]) for row in rows)}
    for group in ("unseen", "problems"):
        totals: dict[str, int] = {}
        for row in rows:
            for name, count in row[group].items():
                totals[name] = totals.get(name, 0) + count
        out[group] = totals
    return out


def _reasons(counts: Mapping[str, Any]) -> str:
    """What was left out and why, as the end of a line."""
    parts = [f"{count:,} {reason}" for reason, count in counts["dropped"].items()]
    parts += [f"{count:,} candidates not judged: {reason}" for reason, count in counts["not_judged"].items()]
    parts += [f"judge: {count:,} {reason}" for reason, count in counts["judge_problems"].items()]
    return f" ({', '.join(parts)})" if parts else ""


def _free() -> None:
    """Give a GPU's memory back before the next model is loaded."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
