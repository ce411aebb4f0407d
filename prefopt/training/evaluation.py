"""Evaluation during training: the loss and metrics of the held-out pairs, and the figures of evaluators."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefopt.storage import write_whole
from prefopt.training import compiling
from prefopt.training.forward import Policy, pair_stats, statistics_to_evaluate, to_device
from prefopt.training.loss_state import LossStates, Values
from prefopt.training.metrics import Evaluation, Evaluator, loss_metrics, shared_metrics
from prefopt.training.normalizers import weighted
from prefopt.training.progress_bar import evaluation_bar
from prefopt.training.random_state import preserved_random_state
from prefopt.training.run import Interrupted, TrainingRun
from prefopt.types import LossState, PairBatch, PairStats


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation computed. Args: line: for metrics.jsonl. tables, texts: of evaluators, on rank 0 only."""

    line: dict[str, Any]
    tables: Mapping[str, Sequence[Mapping[str, Any]]]
    texts: Sequence[str]

    @property
    def empty(self) -> bool:
        """Whether there was nothing to evaluate: neither held-out pairs nor an evaluator."""
        return not self.line.keys() - {"step", "split", "seconds"}


class EvaluationLoop:
    """Evaluates the policy on the held-out pairs of a run, and calls its evaluators.

    Args: evaluators: functions of the policy. Rank 0 calls them alone, on the full policy; those with the attribute
        `inside` are called on all ranks where the weights are sharded.
    """

    def __init__(self, run: TrainingRun, evaluators: Sequence[Evaluator], loss_states: LossStates) -> None:
        self.run, self.evaluators, self.loss_states = run, evaluators, loss_states
        self._terms: list[tuple[str, float]] = []  # name and weight of each term of the loss

    @torch.no_grad()
    def evaluate(self, step: int) -> EvaluationResult:
        """Evaluate after `step` optimizer steps; eval_pairs.jsonl then has the values of each pair."""
        began, run = time.perf_counter(), self.run
        run.model.eval()
        line: dict[str, Any] = {"step": step, "split": "eval"}
        if run.eval_pairs:
            rows = self._score_pairs(statistics_to_evaluate(run.needs, run.config.reference.cache), step)
            line |= {"pairs": len(rows)} | self._means(rows)
            if run.is_main:
                write_whole(run.output / "eval_pairs.jsonl", (_pair_line(step, row) for row in rows))
        tables: dict[str, Sequence[Mapping[str, Any]]] = {}
        texts: list[str] = []
        if self.evaluators:
            figures, evaluations = self._call_evaluators()
            line |= figures
            for one in evaluations:
                tables |= dict(one.tables)
                texts += [one.shown] if one.shown else []
        line["seconds"] = time.perf_counter() - began
        run.model.train()
        return EvaluationResult(line, tables, texts)

    def _score_pairs(self, want: tuple[str, ...], step: int) -> list[dict[str, Any]]:
        """One record per held-out pair, in the order of the file, whatever the batch size and the number of ranks."""
        run = self.run
        mine: list[dict[str, Any]] = []
        for indices, batch, stats, state in self._scored_batches(want, step):
            output = weighted(run.method.loss_of(stats, batch, state), batch)
            values = loss_metrics(output) | shared_metrics(stats) | dict(output.metrics)
            table = {name: (v.double().cpu().tolist(), c.double().cpu().tolist()) for name, (v, c) in values.items()}
            for i, (index, where) in enumerate(zip(indices, batch.where, strict=True)):
                cells = {name: (v[i], c[i]) for name, (v, c) in table.items()}
                mine.append({"index": index, "where": where, "cells": cells})
            self._terms = [(term.name, term.weight) for term in output.terms]
        return sorted(run.runtime.gather_objects(mine), key=lambda row: row["index"])

    def _scored_batches(
        self, want: tuple[str, ...], step: int
    ) -> Iterator[tuple[list[int], PairBatch, PairStats, LossState]]:
        """This rank's batches of held-out pairs: (indices, batch, statistics, state of the loss).

        A loss that reads the global batch reads all held-out pairs in its place, so their statistics come first.
        """
        run = self.run
        waiting: list[tuple[list[int], PairBatch, PairStats]] = []
        values: list[Values] = []
        batches = run.batcher.micro_batches(run.eval_pairs, run.config.eval.batch)
        for indices, batch in evaluation_bar(batches, len(run.eval_pairs), run.runtime):
            run.exit_if_requested()
            batch = to_device(batch, run.runtime.device)
            stats = pair_stats(run.model, batch, want)
            if run.needs.batch_values:
                pairs = [run.eval_pairs[i] for i in indices]
                values.append(self.loss_states.evaluation_values(pairs, stats, batch))
                waiting.append((indices, batch, stats))
            else:
                yield indices, batch, stats, self.loss_states.of_evaluation(step)[0]
        if run.needs.batch_values:
            states = self.loss_states.of_evaluation(step, values)
            for (indices, batch, stats), state in zip(waiting, states, strict=True):
                yield indices, batch, stats, state

    def _means(self, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The loss and the mean of each metric; `fsum` is exact, so the order of the pairs does not matter."""
        means: dict[str, float] = {}
        for name in rows[0]["cells"]:
            total = math.fsum(row["cells"][name][0] for row in rows)
            count = math.fsum(row["cells"][name][1] for row in rows)
            if count > 0:
                means[name] = total / count
        loss = sum(weight * means.get(f"loss/{name}", 0.0) for name, weight in self._terms)
        single = len(self._terms) == 1
        return {"loss": loss} | {n: v for n, v in means.items() if not (single and n.startswith("loss/"))}

    def _call_evaluators(self) -> tuple[dict[str, float], list[Evaluation]]:
        """(the figures of all evaluators, their results on rank 0). A signal that asks to save ends those of rank 0.

        Under a sharding backend, evaluators with `inside` are called on all ranks inside the forward of the wrapped
        model, which gathers weights as modules need them; a signal does not end them.
        """
        run, backend = self.run, self.run.backend
        inside = [one for one in self.evaluators if backend.sharded and getattr(one, "inside", False)]
        alone = [one for one in self.evaluators if one not in inside]
        found: list[Mapping[str, float] | Evaluation] = []
        if inside:
            with preserved_random_state():
                found += backend.run_inside_forward(lambda: [evaluator(run.policy.lm) for evaluator in inside])
        results: list[Evaluation] = []

        def work(policy: Policy | None) -> dict[str, float] | None:
            more = [] if policy is None else self._call_alone(alone, policy)
            if more is None:
                return None
            results.extend(one if isinstance(one, Evaluation) else Evaluation(one) for one in found + more)
            return {name: value for one in results for name, value in one.figures.items()}

        with backend.full_state() if alone else contextlib.nullcontext() as policy:
            figures = run.runtime.on_main_patiently(functools.partial(work, policy))
        if figures is None:
            raise Interrupted
        return figures, results

    def _call_alone(
        self, evaluators: Sequence[Evaluator], policy: Policy
    ) -> list[Mapping[str, float] | Evaluation] | None:
        """The results of evaluators on this rank; None if a signal ended them."""
        try:
            with self._interruptible(policy), compiling.eagerly(policy.lm):  # their inputs have many shapes
                return [evaluator(policy.lm) for evaluator in evaluators]
        except Interrupted:
            return None

    @contextlib.contextmanager
    def _interruptible(self, policy: Policy) -> Iterator[None]:
        """While it lasts, a forward pass of the policy or the reference raises Interrupted once a stop is requested."""

        def stop(*_: Any) -> None:
            if self.run.runtime.stop.requested is not None:
                raise Interrupted

        models = [model for model in (policy.lm, policy.reference) if model is not None]
        hooks = [model.register_forward_pre_hook(stop) for model in models]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _pair_line(step: int, row: Mapping[str, Any]) -> str:
    cells = {name: value / count for name, (value, count) in row["cells"].items() if count > 0}
    counts = {name: count for name, (_, count) in row["cells"].items() if count not in (0, 1)}
    more = {"counts": counts} if counts else {}
    return json.dumps({"step": step, "index": row["index"], "where": row["where"], **cells, **more}) + "\n"
