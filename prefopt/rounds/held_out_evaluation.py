"""The evaluation of a round: its policy against the first one, the one before and another run's, on held-out prompts.

The answers of each policy are a stage with files of its own; the numbers are in `evaluate.json` of the round, and in
`rounds.jsonl`, `rounds.md` and `rounds.png` of the run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt import storage
from prefopt.errors import RoundError
from prefopt.evaluate.rounds_report import RoundFigures, evaluate_round, write_report
from prefopt.evaluate.samples import SampleFigures, score_samples
from prefopt.rounds import stages, store
from prefopt.rounds.candidates import HELD_OUT, CandidateStages, require
from prefopt.rounds.judging import RoundJudge
from prefopt.rounds.policies import RoundPolicies, free_gpu_memory
from prefopt.rounds.store import Stage
from prefopt.rounds_method import RoundsMethod, in_rounds
from prefopt.settings import RunConfig
from prefopt.training.metrics import Evaluation, Evaluator
from prefopt.types import Completion, Prompt


@dataclass(frozen=True)
class OtherRun:
    """Another run of rounds, whose answers to the same held-out prompts are compared with.

    Args: folder: its output. method: its method, which decides what of its answers a judge may see.
    """

    folder: Path
    method: RoundsMethod

    def held_out(self, number: int) -> Path:
        """The folder of its round, which holds its answers to held-out prompts."""
        return self.folder / f"round_{number:02d}"


@dataclass
class HeldOutEvaluation:
    """Evaluates the policy after each round.

    Args:
        config: of the whole run.
        output: its folder.
        held_out: the prompts; none: nothing is evaluated.
        policies, candidates, judge: of the run.
        evaluators: functions of a policy, such as a testbed's exact figures.
        other: another run to compare policies with.
        track: gives the figures of a round to the trackers: (figures, round).
    """

    config: RunConfig
    output: Path
    held_out: Sequence[Prompt]
    policies: RoundPolicies
    candidates: CandidateStages
    judge: RoundJudge
    evaluators: Sequence[Evaluator]
    other: OtherRun | None
    track: Callable[[Mapping[str, float], int], None]

    def evaluate(self, number: int) -> bool:
        """Compare the policy after a round with the first one and the one before. Returns whether all is there."""
        if not self.held_out:
            return True
        if not self.policies.is_trained(number):
            raise RoundError(f"round {number}: it has not trained its policy yet ({self.policies.model(number)})")
        for k in {*self._compared(number).values()} - {number}:
            require(self._stage(k), "evaluate", k)
        if not self.candidates.sample(number, self._stage(number), self.held_out, HELD_OUT, number):
            return False
        self.candidates.workers.first_alone(lambda: self.write_figures(number))
        return True

    def figures(self) -> list[RoundFigures]:
        """The figures of the rounds that are evaluated, in order."""
        found = []
        for number in range(self.config.rounds.count + 1):
            manifest = store.read_manifest(self.policies.folder(number) / "evaluate.json")
            if manifest is None:
                break
            found.append(RoundFigures.from_dict(manifest["figures"]))
        return found

    def _stage(self, number: int) -> Stage:
        """The answers of the policy after a round, one per prompt."""
        sampling = dataclasses.replace(self.candidates.sampling, n=1, logprobs=False)
        stage = self.candidates.stage(number, "held_out", self.held_out, sampling, HELD_OUT, number)
        more = {"resample": self.config.rounds.resample, "card": dict(in_rounds(self.config.method).card())}
        return dataclasses.replace(stage, inputs={**stage.inputs, **more})

    def _compared(self, number: int) -> dict[str, int]:
        """The policies that are compared, by their place in the comparison."""
        return {"now": number} | ({"previous": number - 1, "first": 0} if number else {})

    def write_figures(self, number: int) -> None:
        """Write `evaluate.json` of a round, unless it was made from the same answers and settings, and the report."""
        path = self.policies.folder(number) / "evaluate.json"
        inputs: dict[str, Any] = {name: self._stage(k).hash() for name, k in self._compared(number).items()}
        inputs |= json.loads(json.dumps(self.judge.inputs() | self.judge.scale_inputs()))
        if self._other_answers(number) is not None:
            assert self.other is not None
            inputs["other"] = storage.sha256(self.other.held_out(number) / "held_out.json")
        manifest = store.read_manifest(path)
        if manifest is None or manifest["inputs"] != inputs:
            figures = self.compute(number)
            self.track(figures.metrics(), number)
            store.write_manifest(path, {"stage": "evaluate", "inputs": inputs, "figures": figures.to_dict()})
        self.write_report(number)

    def write_report(self, number: int) -> None:
        """rounds.jsonl, rounds.md and rounds.png of all rounds so far."""
        figures = self.figures()
        store.write_rows(self.output / "rounds.jsonl", ({"round": f.round} | f.metrics() for f in figures))
        title = f"{self.config.method_name}, {self.config.rounds.count} rounds"
        write_report(self.output, figures, title, plot=number == self.config.rounds.count)

    def compute(self, number: int) -> RoundFigures:
        """The figures of a round from the answers on disk: win rates, KL, lengths, and what evaluators add."""
        answers: dict[int, list[list[Completion]]] = {}
        for k in {*self._compared(number).values()}:
            answers[k] = [list(stages.completions_of(row)) for row in self._stage(k).rows()]
        completions = {name: answers[k] for name, k in self._compared(number).items()}
        others = self._other_answers(number)
        if others is not None:
            completions["other"] = [others.get(prompt.key, []) for prompt in self.held_out]
        samples = [(p, c) for p, group in zip(self.held_out, completions["now"], strict=True) for c in group]
        more: dict[str, float] = {}
        lm = self.policies.load(number)
        for evaluator in self.evaluators:
            found = evaluator(lm)
            more |= dict(found.figures if isinstance(found, Evaluation) else found)
        more |= self._method_figures(number, completions["now"])
        kl = self._divergences(number, lm, samples)
        judge = None if self.judge.is_none else self.judge.open(number)
        try:
            with self.judge.precision():
                return evaluate_round(
                    number,
                    self.held_out,
                    completions,
                    judge,
                    in_rounds(self.config.method),
                    kl,
                    more,
                    other=None if self.other is None else self.other.method,
                )
        finally:
            if judge is not None:
                judge.close()
            free_gpu_memory()

    def _divergences(
        self, number: int, lm: Any, samples: Sequence[tuple[Prompt, Completion]]
    ) -> dict[str, SampleFigures]:
        """KL of the policy to the one that its round began with, and to the first one, on its own answers."""
        kl: dict[str, SampleFigures] = {}
        if number:
            for name, k in {"to_round_start": number - 1, "to_first": 0}.items():
                if name == "to_first" and number == 1:
                    kl[name] = kl["to_round_start"]
                    continue
                with self.policies.autocast():
                    kl[name] = score_samples(
                        lm, self.policies.open(k), samples, batch=self.config.eval.batch, kernel=self.config.kernel
                    )
        return kl

    def _method_figures(self, number: int, now: Sequence[Sequence[Completion]]) -> dict[str, float]:
        """The method's own figures of the held-out answers, and of the pairs that the round was trained on."""
        figures = dict(in_rounds(self.config.method).text_figures([c.text for group in now for c in group]))
        if "parsed" in figures:  # of the first attempts: these were sampled again where they could not be read
            rows, view = self._stage(number).rows(), self.candidates.view
            lost = [bool(row.get("again") or view.of(stages.completions_of(row)).unparsed) for row in rows]
            figures["parsed"] = 1 - sum(lost) / len(lost)
        pairs = store.read_manifest(self.policies.folder(number) / "pairs.json") if number else None
        return figures | {f"pairs/{name}": value for name, value in (pairs or {}).get("figures", {}).items()}

    def _other_answers(self, number: int) -> dict[str, list[Completion]] | None:
        """The answers of the compared run after the same round, by prompt; None where it is not so far.

        Raises: RoundError when none of its held-out prompts is one of this run's.
        """
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
