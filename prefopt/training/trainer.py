"""The loop. One for every method: only `method.loss` differs."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefopt import storage
from prefopt.data.collate import collate
from prefopt.data.encoding_report import show_batch
from prefopt.data.loader import Batches, Shares
from prefopt.data.pairs import BLOCK, facts, fed_tokens, padded_lengths
from prefopt.data.structure import Structure, check_row_structure
from prefopt.data.templates import Rendering
from prefopt.errors import ConfigError, TrainError, did_you_mean
from prefopt.figures import NOTHING, readable
from prefopt.rounds_method import in_rounds
from prefopt.settings import RunConfig
from prefopt.storage import write_whole
from prefopt.training import (
    adapter_loading,
    adapter_saving,
    adapters,
    checkpoint,
    compiling,
    experts,
    export,
    extension,
    model_card,
    model_sources,
    models,
    offload,
    sharded_io,
    sharding,
    step0_check,
)
from prefopt.training.backends import make_backend
from prefopt.training.best_checkpoint import SELECTED, Selection
from prefopt.training.forward import (
    Policy,
    PolicyWithReference,
    pair_stats,
    pair_stats_and_routing,
    statistics_for,
    statistics_to_evaluate,
    to_device,
)
from prefopt.training.launcher import print_rank_0
from prefopt.training.layout_choice import choose_layouts
from prefopt.training.metrics import Evaluation, Evaluator, Meter, MetricsFile, shared_metrics
from prefopt.training.micro_batches import micro_batches
from prefopt.training.moving_reference import MovingReference
from prefopt.training.optimizers import make_optimizer
from prefopt.training.random_state import preserved_random_state, random_state, set_random_state
from prefopt.training.reference_cache import ReferenceValues
from prefopt.training.run_length import RunLength
from prefopt.training.runtime import Runtime
from prefopt.training.schedule import learning_rate, total_steps
from prefopt.training.signals import EXIT_UNFINISHED
from prefopt.training.tracking import Trackers
from prefopt.types import EncodedPair, LossOutput, Needs, PairBatch, PairStats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REFERENCE = "moving_reference"  # files of a checkpoint


class _Interrupted(Exception):
    """A signal asked for a save; the step under way is given up."""


@dataclass
class Trainer:
    """A run that is ready to train.

    Args:
        config: all settings.
        runtime: the processes.
        policy: not yet wrapped.
        tokenizer: saved with every checkpoint; its pad id fills batches.
        train: what to train on.
        eval_pairs: held-out pairs, maybe none.
        output: the run's folder; the lock on it is held.
        resume_from: an undamaged checkpoint whose weights `policy` holds, or None.
        evaluators: functions of the policy whose values are logged at each evaluation, such as a testbed's exact ones;
            they are called on the first process alone.
        values: what is kept of the reference, for all pairs, where that takes the place of a live one.
        trackers: who else is told; the caller closes them. None: nobody.
    """

    config: RunConfig
    runtime: Runtime
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    train: Batches
    eval_pairs: Sequence[EncodedPair]
    output: Path
    resume_from: Path | None = None
    evaluators: Sequence[Evaluator] = field(default_factory=tuple)
    values: ReferenceValues | None = None
    trackers: Trackers | None = None

    def run(self) -> int:
        """Train to the end. Returns 0 when finished, 75 when a signal asked to save and leave."""
        self.prepare()
        start = self._restore()
        if self.trackers is not None:
            self.trackers.start()
        try:
            self._loop(start)
        except _Interrupted:
            return EXIT_UNFINISHED
        self._finish()
        return 0

    def prepare(self) -> None:
        """Make the optimizer and wrap the model, so that steps and evaluations can be done."""
        config, runtime = self.config, self.runtime
        self.method = config.method
        self.needs = self.method.needs
        if self.needs.coupled and (runtime.world > 1 or config.train.micro_batch < config.train.global_batch):
            raise ConfigError(
                f"train.micro_batch: found {config.train.micro_batch} with world size {runtime.world}; this method "
                "looks at the batch as a whole, expected one process and micro_batch = global_batch "
                f"({config.train.global_batch})"
            )
        self._steps = None if self.train.steps_per_epoch is None else self.train.steps
        self.budget = RunLength.of(config, total_steps(config, self._steps))
        self.moving: MovingReference | None = None
        if config.reference.sync_every is not None:
            assert isinstance(self.policy, PolicyWithReference), "a score has no reference"
            self.moving = MovingReference(self.policy, config.reference.sync_weight)
        if config.model.gradient_checkpointing:
            models.recompute_activations(self.policy.lm)
        # a fused step would hide from the loop that the gradient scaler skipped it
        optimizer = make_optimizer(config.optim, self.policy.lm, fused=runtime.accelerator.scaler is None)
        self.backend = make_backend(runtime, config)
        self.model, self.optimizer = self.backend.prepare(self.policy, optimizer)
        if config.model.offload_activations:
            self.policy.saving = offload.Offloading(self.policy.lm, pin_memory=runtime.device.type == "cuda")
        self.layouts, note = choose_layouts(config, self.policy, runtime.device, self.backend.run_inside_forward)
        if note is not None:
            print_rank_0(note)
        self.router_weight = experts.router_weight(self.policy.config, config.model.router_aux_weight)
        if self.router_weight:
            print_rank_0(
                f"router: its load-balancing loss is added, times {self.router_weight:g} (model.router_aux_weight)"
            )
        if config.train.compile:
            compiling.compile_layers(self.policy.backbone)
        whole = self.train.grouped
        self._counts_per_pair = None if whole is None else self._average_counts(whole)
        self.metrics = MetricsFile(self.output / "metrics.jsonl")

    # The loop ---------------------------------------------------------------------------------------------------------

    def _loop(self, start: int) -> None:
        done = saved = start
        config = self.config
        self.runtime.stop.in_loop = True
        try:
            if start == 0:
                self._first_batch()
            if self._evaluation_is_due(start):
                self._evaluate(start)
            over = self._patience_is_over(start)
            with self._progress_bar(start) as bar:
                for step in () if over else self.budget.left(start):
                    line = self._step(step)
                    done = step + 1
                    self._log(line)
                    bar.set_postfix(_postfix(line, config.tied_at_start), refresh=False)
                    bar.update()
                    if self._evaluation_is_due(done):
                        self._evaluate(done)
                        over = self._patience_is_over(done)
                    if done % config.train.save_every == 0 or self.budget.over(done) or over:
                        self._save(done)
                        saved = done
                    if over:
                        break
        except _Interrupted:
            if done > saved:
                self._save(done)
            print_rank_0(f"left at step {done}{self.budget.of_them}; the same command continues")
            raise

    def _progress_bar(self, start: int) -> Any:
        from tqdm import tqdm

        seconds = 0.2 if os.isatty(2) else 10  # between redraws; a log file wants few
        hidden = not self.runtime.is_main
        return tqdm(
            total=self.budget.steps, initial=start, disable=hidden, unit="step", mininterval=seconds, dynamic_ncols=True
        )

    def _evaluation_bar(self, batches: Iterator[tuple[list[int], PairBatch]]) -> Iterator[tuple[list[int], PairBatch]]:
        """The micro-batches of an evaluation, with a bar of its pairs where it takes longer than a few seconds."""
        from tqdm import tqdm

        pairs, world = len(self.eval_pairs), self.runtime.world
        slow = 0.2 if os.isatty(2) else 10
        bar = tqdm(
            total=pairs,
            desc="evaluating",
            unit="pair",
            delay=3,
            leave=False,
            mininterval=slow,
            disable=not self.runtime.is_main,
            dynamic_ncols=True,
        )
        with bar:
            for numbers, batch in batches:
                yield numbers, batch
                bar.update(min(len(numbers) * world, pairs - bar.n))  # the other processes score as many meanwhile

    def _evaluation_is_due(self, done: int) -> bool:
        """After every `eval.every` steps and the last one, unless an attempt before this one has logged it."""
        regular = done % self.config.eval.every == 0 if done else self.config.eval.at_start
        due = regular or self.budget.over(done)
        return due and not self.runtime.on_main(lambda: self.metrics.has(done, "eval"))

    def _patience_is_over(self, done: int) -> bool:
        """Whether the last `eval.patience` evaluations were no better than one before them; it is said, once."""
        patience, select = self.config.eval.patience, self.config.eval.select
        if patience is None or select is None:
            return False
        by = Selection.of(select)
        over = bool(self.runtime.on_main(lambda: by.stale(self.metrics.lines()) >= patience))
        if over and not self.budget.over(done) and self.runtime.is_main:
            in_vain = f"no better {by.metric} in {patience} evaluations"
            _say_beside_the_bar(f"stopped at step {done}{self.budget.of_them}: {in_vain}")
        return over

    def _step(self, step: int) -> dict[str, Any]:
        """One optimizer step. Returns its metrics line."""
        began = time.perf_counter()
        config, runtime = self.config, self.runtime
        self.model.train()
        pairs_of_step = self.train.global_batch(step)
        batches = list(self._micro_batches(pairs_of_step, config.train.micro_batch))
        grouped = self._counts_per_pair is not None
        counted = self.train.counted_pairs(step) if grouped else len(pairs_of_step)
        counts = self._global_counts([batch for _, batch in batches], counted)
        meter, want = Meter(), statistics_for(self.needs)
        routed = self._routing_of_step([batch for _, batch in batches])
        broken: list[tuple[torch.Tensor, PairBatch]] = []
        tokens = torch.zeros(4, dtype=torch.float64)  # pairs, scored tokens, tokens fed, cells that hold a token or not
        for index, (_, batch) in enumerate(batches):
            self._leave_if_asked()
            fed = int(batch.attention_mask.sum()) if batch.pairs else 0
            cells = batch.attention_mask.numel()
            tokens += torch.tensor([batch.pairs, len(batch.labels), fed, cells], dtype=torch.float64)
            last = index == len(batches) - 1
            with self.backend.micro_batch(last):
                batch = to_device(batch, runtime.device)
                if self.router_weight:
                    stats, routing = pair_stats_and_routing(self.model, batch, want)
                else:
                    stats = pair_stats(self.model, batch, want)
                output = self.method.loss(stats, batch)
                loss = sum(
                    (term.weight * term.value.sum() / counts[term.name] for term in output.terms),
                    start=output.terms[0].value.new_zeros(()),
                )
                if self.router_weight:
                    chosen, of_step = routed or (routing.chosen, routing.tokens)
                    balance = experts.balance_loss(routing, chosen, of_step)
                    loss = loss + self.router_weight * balance
                    passes = balance.new_full((1,), 1 / (len(batches) * runtime.world))
                    meter.add({"aux_loss": (balance.detach()[None], passes)})
                self.backend.backward(loss * runtime.world, last)  # backends average over processes
            meter.add(_terms(output) | shared_metrics(stats) | dict(output.metrics))
            broken.append((_not_finite(output), batch))
        self._leave_if_asked()
        norm = self.backend.clip(config.optim.clip or math.inf)
        anywhere = float(runtime.sum(torch.stack([rows.sum() for rows, _ in broken]).sum().double()))
        scale = self._loss_scale()
        # an overflow of scaled gradients is the scaler's business: it skips the step and halves the scale
        if anywhere > 0 or not (norm is None or math.isfinite(norm) or scale > 1):
            self._stop_on_nonfinite(step, math.nan if norm is None else norm, broken)
        pairs, scored_tokens, fed, cells = runtime.sum(tokens).tolist()
        gone = self.budget.gone(int(fed), self._seconds_since(began))
        lr = learning_rate(config, self._steps, step, gone)
        self.backend.set_lr(lr)
        skipped, found = self.backend.step()
        self.backend.zero_grad()
        norm = found if norm is None else norm
        if not (math.isfinite(norm) or skipped):
            self._stop_on_nonfinite(step, norm, broken)
        if self.moving is not None and (step + 1) % (config.reference.sync_every or 1) == 0:
            self.moving.update()
        averages = meter.averages(runtime)
        seconds = self._seconds_since(began)
        self.budget.spend(int(fed), seconds)
        line: dict[str, Any] = {"step": step + 1, "split": "train"}
        if self.train.steps_per_epoch:
            line["epoch"] = self.train.epochs(step + 1)
        line |= {"loss": _total_loss(output, averages) + self.router_weight * averages.get("aux_loss", 0.0)}
        line |= {
            name: value for name, value in averages.items() if len(output.terms) > 1 or not name.startswith("loss/")
        }
        line |= {
            "learning_rate": lr,
            "pairs": int(pairs),
            "completion_tokens": int(scored_tokens),
            "tokens_processed": int(fed),
        }
        line |= {} if skipped else {"grad_norm": norm}
        if runtime.accelerator.scaler is not None:
            line |= {"loss_scale": scale, "skipped_step": int(skipped)}
        line |= {"padding_fraction": 1 - fed / cells}
        line |= {"seconds": seconds, "pairs_per_second": pairs / seconds, "tokens_per_second": fed / seconds}
        if torch.cuda.is_available():
            line["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return line

    @torch.no_grad()
    def _routing_of_step(self, batches: Sequence[PairBatch]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """How often each expert is chosen in a step, and of how many tokens, for the router's loss.

        The loss is a product of two averages over the step, so a pass needs the first one of all passes: they are made
        once without gradients. None where one pass is the step.
        """
        if not self.router_weight or (len(batches) == 1 and self.runtime.world == 1):
            return None
        self.model.eval()  # no dropout, which would draw numbers
        total: torch.Tensor | None = None
        for batch in batches:
            batch = to_device(batch, self.runtime.device)
            if self.needs.output != "scores":  # no position for the head
                none = batch.score_index[:0]
                batch = replace(
                    batch, score_index=none, labels=none, sequence_index=none, ref_logps=None, ref_hidden=None
                )
            want = statistics_for(self.needs) if self.needs.output == "scores" else ()
            found = pair_stats_and_routing(self.model, batch, want)[1].packed().double()
            total = found if total is None else total + found
        self.model.train()
        assert total is not None
        total = self.runtime.sum(total)
        experts_there = (len(total) - 1) // 2
        return total[:experts_there], total[-1]

    def _seconds_since(self, began: float) -> float:
        """The same on all processes where the run's end depends on it."""
        seconds = time.perf_counter() - began
        return seconds if self.config.train.max_seconds is None else float(self.runtime.from_main(seconds))

    def _micro_batches(self, pairs: Sequence[EncodedPair], size: int) -> Iterator[tuple[list[int], PairBatch]]:
        """This process's share of a batch, as (which of the pairs, their batch); see `share.micro_batches`."""
        shares = micro_batches(padded_lengths(pairs), fed_tokens(pairs), size, self.runtime.world)
        for mine in shares[self.runtime.rank]:
            numbers = mine.tolist()
            yield numbers, self._collate([pairs[i] for i in numbers])

    def _collate(self, pairs: Sequence[EncodedPair], layout: str | None = None) -> PairBatch:
        """The batch in the layout that these pairs call for, or in the one that is named, with what is kept of the
        reference."""
        need_rejected = self.needs.rows == "pairs"
        batch = collate(
            pairs,
            pad_id=int(self.tokenizer.pad_token_id),
            need_rejected=need_rejected,
            columns=tuple(column.name for column in self.needs.columns),
            **self.layouts.settings(layout or self.layouts.of(pairs, need_rejected)),
        )
        return batch if self.values is None else self.values.fill(batch, pairs)

    def _global_counts(self, batches: Sequence[PairBatch], pairs: float) -> dict[str, float]:
        """What each term is divided by: its count over all `pairs` of the step on all processes.

        Where batches are grouped by length, their own counts would make a token in a batch of short completions weigh
        more than one in a batch of long ones; there it is the count of as many pairs of average count. The two are the
        same for terms that count pairs.
        """
        if self._counts_per_pair is not None:
            return {name: count * pairs for name, count in self._counts_per_pair.items()}
        totals = self._counts(batches)
        summed = self.runtime.sum(torch.tensor(list(totals.values()), dtype=torch.float64)).tolist()
        return {name: count if count > 0 else 1.0 for name, count in zip(totals, summed, strict=True)}

    def _counts(self, batches: Iterable[PairBatch]) -> dict[str, float]:
        """The count of each term, summed over batches.

        Counts depend on the batch alone, so the loss of placeholder statistics gives them before any forward pass.
        """
        totals: dict[str, float] = {}
        for batch in batches:
            for term in self.method.loss(_placeholder(batch, self.needs), batch).terms:
                totals[term.name] = totals.get(term.name, 0.0) + float(term.count.double().sum())
        return totals

    def _average_counts(self, shares: Shares) -> dict[str, float]:
        """The count of each term per pair of an epoch."""
        averages: dict[str, float] = {}
        for share, pairs in shares:
            for name, count in self._counts(self._bare(pairs)).items():
                averages[name] = averages.get(name, 0.0) + share * count / len(pairs)
        return {name: count if count > 0 else 1.0 for name, count in averages.items()}

    def _bare(self, pairs: Sequence[EncodedPair]) -> Iterator[PairBatch]:
        """Lengths and columns of pairs without their tokens, which are all that a count can depend on."""
        empty = self._collate([])
        for begin in range(0, len(pairs), BLOCK):
            end = min(begin + BLOCK, len(pairs))

            def of(name: str, begin: int = begin, end: int = end) -> torch.Tensor:
                return torch.from_numpy(facts(pairs, name, begin, end).copy())

            yield replace(
                empty,
                chosen_lengths=of("chosen_scored"),
                rejected_lengths=None if empty.rejected_lengths is None else of("rejected_scored"),
                columns={name: of(f"column.{name}") for name in empty.columns},
                where=("",) * (end - begin),
            )

    def _loss_scale(self) -> float:
        """What fp16 multiplies the loss by, so that small gradients do not vanish; 1 in any other precision."""
        scaler = self.runtime.accelerator.scaler
        return 1.0 if scaler is None else float(scaler.get_scale())

    def _leave_if_asked(self) -> None:
        """Give up the step when any process was asked to stop; all of them hear it at the same point."""
        asked = torch.tensor(float(self.runtime.stop.requested is not None))
        if float(self.runtime.sum(asked)) > 0:
            self.backend.zero_grad()
            raise _Interrupted

    def _stop_on_nonfinite(self, step: int, norm: float, broken: Sequence[tuple[torch.Tensor, PairBatch]]) -> None:
        """All processes come here together, and raise one error that names the rows."""
        mine = [b.where[i] or f"pair {i} of the batch" for bad, b in broken for i in bad.nonzero().flatten().tolist()]
        rows = self.runtime.gather_objects(mine)
        batch = f"first rows with a loss that is not finite: {', '.join(rows[:3])}" if rows else f"gradient norm {norm}"
        if not rows:
            first = self.train.global_batch(step)
            batch += f", batch of {first[0].where or 'pair 0'} and {len(first) - 1} more"
        raise TrainError(f"step {step + 1}: the loss or its gradient is not finite ({batch}); {self._last_good()}")

    def _last_good(self) -> str:
        kept = checkpoint.last_good(self._checkpoints) if self.runtime.is_main else None  # it is the one that speaks
        return f"last good checkpoint: {kept}" if kept else "no checkpoint was written yet"

    # Evaluation -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _evaluate(self, step: int) -> None:
        """Score the held-out pairs and log their averages; the last evaluation's pairs are kept in eval_pairs.jsonl."""
        began = time.perf_counter()
        self.model.eval()
        want = statistics_to_evaluate(self.needs, self.config.reference.cache)
        line: dict[str, Any] = {"step": step, "split": "eval"}
        if self.eval_pairs:
            rows = self._eval_rows(want)
            line |= {"pairs": len(rows)} | self._averages_of_rows(rows)
            if self.runtime.is_main:
                write_whole(self.output / "eval_pairs.jsonl", (_pair_line(step, row) for row in rows))
        line |= self._say_of_evaluators(step) if self.evaluators else {}
        line["seconds"] = time.perf_counter() - began
        if len(line) > 3:
            self._log(line)
        if self.config.eval.select is not None:
            self._keep_if_best(step, line)
        self.model.train()

    def _say_of_evaluators(self, step: int) -> dict[str, float]:
        """Their figures, once their tables are kept and shown. A signal that asks to save gives them up.

        Those that can be are called where the backend gathers weights as modules need them, by all processes together;
        they are not given up. The others are called by the first process, on the whole policy.
        """
        inside = [one for one in self.evaluators if self.backend.sharded and getattr(one, "inside", False)]
        alone = [one for one in self.evaluators if one not in inside]

        def ask(policy: Policy) -> list[Mapping[str, float] | Evaluation] | None:
            try:
                with self._stoppable(policy), compiling.eagerly(policy.lm):  # what they ask has many shapes
                    return [evaluator(policy.lm) for evaluator in alone]
            except _Interrupted:
                return None

        found: list[Mapping[str, float] | Evaluation] = []
        if inside:
            with preserved_random_state():
                found += self.backend.run_inside_forward(lambda: [evaluator(self.policy.lm) for evaluator in inside])

        def work(policy: Policy | None) -> dict[str, float] | None:
            more = [] if policy is None else ask(policy)
            return None if more is None else self._keep_evaluations(step, found + more)

        with self.backend.full_state() if alone else contextlib.nullcontext() as policy:
            figures = self.runtime.on_main_patiently(functools.partial(work, policy))
        if figures is None:
            raise _Interrupted
        return figures

    def _keep_evaluations(self, step: int, found: Sequence[Mapping[str, float] | Evaluation]) -> dict[str, float]:
        """All their figures; their tables are written, and what they show is said."""
        figures: dict[str, float] = {}
        for one in found:
            whole = one if isinstance(one, Evaluation) else Evaluation(one)
            figures |= dict(whole.figures)
            for name, rows in whole.tables.items():
                MetricsFile(self.output / f"{name}.jsonl").replace(step, rows)
                if self.trackers is not None:
                    texts = [{k: v for k, v in row.items() if not k.endswith("_ids")} for row in rows]
                    self.trackers.table(name, texts, step)
            if whole.shown:
                _say_beside_the_bar(f"\nstep {step}: {whole.shown}")
        return figures

    @contextlib.contextmanager
    def _stoppable(self, policy: Policy) -> Iterator[None]:
        """While it lasts, a wish to stop ends whoever calls the models, however often they are still to be called."""

        def stop(*_: Any) -> None:
            if self.runtime.stop.requested is not None:
                raise _Interrupted

        models_here = [model for model in (policy.lm, policy.reference) if model is not None]
        hooks = [model.register_forward_pre_hook(stop) for model in models_here]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _eval_rows(self, want: tuple[str, ...]) -> list[dict[str, Any]]:
        """One record per held-out pair, in the order of the file, whatever batches and processes there are."""
        mine: list[dict[str, Any]] = []
        batches = self._micro_batches(self.eval_pairs, self.config.eval.batch)
        for numbers, batch in self._evaluation_bar(batches):
            self._leave_if_asked()
            batch = to_device(batch, self.runtime.device)
            stats = pair_stats(self.model, batch, want)
            output = self.method.loss(stats, batch)
            values = _terms(output) | shared_metrics(stats) | dict(output.metrics)
            table = {name: (v.double().cpu().tolist(), c.double().cpu().tolist()) for name, (v, c) in values.items()}
            for i, (number, where) in enumerate(zip(numbers, batch.where, strict=True)):
                cells = {name: (v[i], c[i]) for name, (v, c) in table.items()}
                mine.append({"index": number, "where": where, "cells": cells})
            self._eval_terms = [(term.name, term.weight) for term in output.terms]
        return sorted(self.runtime.gather_objects(mine), key=lambda row: row["index"])

    def _averages_of_rows(self, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        averages: dict[str, float] = {}
        for name in rows[0]["cells"]:
            total = math.fsum(row["cells"][name][0] for row in rows)
            count = math.fsum(row["cells"][name][1] for row in rows)
            if count > 0:
                averages[name] = total / count
        loss = sum(weight * averages.get(f"loss/{name}", 0.0) for name, weight in self._eval_terms)
        single = len(self._eval_terms) == 1
        return {"loss": loss} | {n: v for n, v in averages.items() if not (single and n.startswith("loss/"))}

    def _keep_if_best(self, step: int, line: Mapping[str, Any]) -> None:
        """Write the model aside where no evaluation after a step was better. The start is no candidate.

        What was the best before stays as long as a checkpoint knows nothing of this one: continued from there, the run
        may find another.
        """
        by = Selection.of(str(self.config.eval.select))

        def is_best() -> bool:
            if by.metric not in line:
                known = sorted(set(line) - {"step", "split", "seconds", "pairs"})
                raise ConfigError(
                    f"eval.select: found '{by.metric}', expected a metric of the evaluations: "
                    f"{', '.join(known) or 'none'}{did_you_mean(by.metric, known)}"
                )
            return step > 0 and by.best(self.metrics.lines()) == step

        if self.runtime.on_main(is_best):

            def write(folder: Path) -> list[Path]:
                mine = self._write_export(folder)
                if self.runtime.is_main:
                    (folder / SELECTED).write_text(json.dumps({"step": step, by.metric: line.get(by.metric)}))
                return mine

            checkpoint.export(self._best / checkpoint.name_of(step), write, self.runtime, self._checkpoints)
            self.runtime.on_main(lambda: self._drop_surpassed(step))

    @property
    def _best(self) -> Path:
        """Models of the best evaluations, in folders that are named by their steps."""
        return self.output / "best"

    def _best_step(self) -> int | None:
        select = self.config.eval.select
        return None if select is None else Selection.of(select).best(self.metrics.lines())

    def _drop_surpassed(self, best: int | None) -> None:
        """Remove kept models that are neither the best so far nor that of any checkpoint."""
        known = {best}
        for folder in checkpoint.steps(self._checkpoints):
            with contextlib.suppress(storage.Damaged):
                known.add(checkpoint.load_state(folder).get("best"))
        for folder in checkpoint.steps(self._best):
            if checkpoint.step_of(folder) not in known:
                checkpoint.drop(folder)

    # Before the first step --------------------------------------------------------------------------------------------

    def _first_batch(self) -> None:
        """Show the first batch if asked to, and prove that its scores are right."""
        config, runtime = self.config, self.runtime
        pairs = self.train.global_batch(0)
        numbers, batch = next(self._micro_batches(pairs, config.train.micro_batch))
        chunk = [pairs[i] for i in numbers]
        if config.train.show_batch:
            print_rank_0(show_batch(batch, self.tokenizer))
        if not config.train.check_first_batch:
            return
        self.model.eval()
        few = chunk[: step0_check.ROWS]
        layout = self.layouts.of(chunk, self.needs.rows == "pairs")
        if self.backend.sharded:  # all processes must make the same calls
            few, layout = runtime.from_main((few, layout))
        batch = to_device(self._collate(few, layout), runtime.device)
        promised = Structure(self.tokenizer, Rendering(config.data.template_args))
        mixed = config.train.mixed_precision
        tol = step0_check.tolerance(self.policy.lm, mixed)
        rounded = self.values is not None and self.values.in_bfloat16
        loose = max(tol, step0_check.tolerance(self.policy.lm, "bf16")) if rounded else tol
        named = config.reference.path
        same = named is None or (config.model.path is not None and model_sources.same_place(named, config.model.path))
        # every process runs every check, whatever it has found: a wrapped model's forward may wait for the others
        with runtime.accelerator.autocast():
            structure = (f"{p.where}: {w}" for p in few if (w := check_row_structure(p, promised)))
            problems = [
                next(structure, None),
                step0_check.first_difference(
                    self.model, self.policy, self.method, few, batch, tol, self.backend.run_inside_forward
                ),
            ]
            if same:
                with compiling.eagerly(self.policy):  # the reference's layers are not compiled
                    problems.append(
                        step0_check.unexpected_loss(self.model, self.method, batch, loose, self.values is not None)
                    )
        precise = step0_check.is_rounded(self.policy.lm, mixed)
        problem, note = self._check_in_float32(few, batch) if precise else (None, "")
        found = runtime.gather_objects([problem for problem in (*problems, problem) if problem])
        step0_check.refuse(found[0] if found else None)
        known = self.method.loss_at_reference() if self.needs.reference != "none" and same else None
        agreed = f", loss {known:.4f} as it must be" if known is not None else ""
        print_rank_0(f"step 0: {len(few)} pairs scored again by an independent path agree to {tol:g}{note}{agreed}")

    def _check_in_float32(self, pairs: Sequence[EncodedPair], batch: PairBatch) -> tuple[str | None, str]:
        """(what is wrong with the scores of the same rows without rounding, what is to be said of it)."""
        runtime = self.runtime
        needed = step0_check.float32_bytes(self.policy, self.backend.sharded)
        short = [1] if needed > step0_check.free_bytes(runtime.device, runtime.world) // 2 else []
        if runtime.gather_objects(short):
            return None, " (not in float32, for want of memory)"
        if "varlen" in (self.policy.attention, self.policy.reference_attention):
            return None, " (not in float32, which flash attention does not know)"
        with self.backend.full_state() as policy, step0_check.in_float32(policy), compiling.eagerly(policy):
            try:
                problem = step0_check.first_difference(
                    policy, policy, self.method, pairs, batch, step0_check.IN_FLOAT32
                )
            except torch.OutOfMemoryError:
                return None, " (not in float32, for want of memory)"
        return problem, f", in float32 to {step0_check.IN_FLOAT32:g}"

    # Logging ----------------------------------------------------------------------------------------------------------

    def _log(self, line: Mapping[str, Any]) -> None:
        if not self.runtime.is_main:
            return
        self.metrics.write(line)
        prefix = "eval/" if line["split"] == "eval" else ""
        values = {f"{prefix}{k}": v for k, v in line.items() if k not in ("step", "split")}
        if self.trackers is not None:
            self.trackers.log(values, int(line["step"]))

    # Saving -----------------------------------------------------------------------------------------------------------

    @property
    def _checkpoints(self) -> Path:
        return self.output / "checkpoints"

    def _save(self, step: int) -> None:
        """Write a checkpoint after `step` optimizer steps; on every process, because they wait for rank 0."""
        mine = sharding.not_finite(self.policy.lm)
        bad = next(iter(self.runtime.gather_objects([] if mine is None else [mine])), None)
        if bad is not None:
            rows = self.train.global_batch(step - 1)
            raise TrainError(
                f"step {step}: its update left weights that are not finite ({bad}; batch of "
                f"{rows[0].where or 'pair 0'} and {len(rows) - 1} more); {self._last_good()}"
            )

        scaler = self.runtime.accelerator.scaler
        best, lines = self.runtime.on_main(lambda: (self._best_step(), self.metrics.seal()))
        state = {
            "step": step,
            "best": best,
            "metrics": lines,
            "random": self.runtime.gather_objects([random_state()]),  # by rank
            "loss_scale": None if scaler is None else scaler.state_dict(),
            "data": self.train.fingerprint,
            "budget": self.budget.state(),
        }

        def write(folder: Path) -> list[Path]:
            size = self.config.train.max_shard_mb
            mine = sharded_io.save_model(self.backend, folder, size) + sharded_io.save_optimizer(
                self.backend, folder, size
            )
            if self.moving is not None:
                mine += sharded_io.save_frozen(self.backend, folder, _REFERENCE, self.moving.weights(), size)
            if self.runtime.is_main:
                self.tokenizer.save_pretrained(folder)
            return mine

        checkpoint.save(self._checkpoints, step, write, state, self.config.train.keep_last, self.runtime)
        if self.config.eval.select is not None:
            self.runtime.on_main(lambda: self._drop_surpassed(best))

    def _restore(self) -> int:
        """Take up the run where its last good checkpoint left it. Returns the number of steps done."""
        start, state = 0, {}
        if self.resume_from is not None:
            state = checkpoint.load_state(self.resume_from)
            if state["data"] != self.train.fingerprint:
                raise TrainError(
                    f"{self.output}: the training data changed since step {state['step']}; choose another --output"
                )
            self.backend.load(self.resume_from)
            if self.moving is not None:
                sharded_io.load_frozen(self.backend, self.resume_from, _REFERENCE, self.moving.weights())
            if "budget" in state:  # not in checkpoints of before there was one
                self.budget.restore(state["budget"])
            by_rank = state["random"]
            if self.runtime.world == len(by_rank):  # else the run's seed and this process's rank have set it
                set_random_state(by_rank[self.runtime.rank])
            if self.runtime.accelerator.scaler is not None:
                self.runtime.accelerator.scaler.load_state_dict(state["loss_scale"])
            start = int(state["step"])
        self.runtime.on_main(lambda: self._forget_after(start, state))
        return start

    def _forget_after(self, start: int, state: Mapping[str, Any]) -> None:
        """Take back what an earlier attempt has written after the checkpoint that this one continues from.

        Checkpoints, which may be read again another time, stay until this attempt has saved its own.
        """
        storage.sweep(self.output)
        checkpoint.clean(self._checkpoints)
        checkpoint.clean(self._best)
        if "metrics" in state:
            self.metrics.restore(state["metrics"], str(self.resume_from))
        else:  # a run that begins, or a checkpoint of before its lines were sealed
            self.metrics.rewind(start if self.resume_from is not None else -1)
        if self.config.eval.select is not None:
            best = state["best"] if "best" in state else self._best_step()
            if best is not None:
                self._good_best(best)
            self._drop_surpassed(best)

    def _good_best(self, step: int) -> Path:
        """The folder of the best model. Raises: TrainError where it is not as it was written."""
        folder = self._best / checkpoint.name_of(step)
        wrong = checkpoint.damage(folder)
        exported = self.output / "model"
        if wrong is not None and not storage.is_there(folder) and storage.is_there(exported):
            raise TrainError(
                f"{exported}: is damaged ({checkpoint.damage(exported)}), and this finished run has no other copy of "
                "the model that eval.select chose; put it back from a copy, or choose another --output and train again"
            )
        if wrong is not None:
            raise TrainError(
                f"{folder}: the model that eval.select chose is damaged or missing: {wrong}; put it back from a copy, "
                "or choose another --output and train again"
            )
        return folder

    def _finish(self) -> None:
        """Export the final model, or the best one, in the format of transformers, whole or not at all."""
        step = self.runtime.on_main(self._selected)
        source: checkpoint.Write = self._write_export

        def copied(folder: Path) -> None:
            if self.runtime.is_main:
                checkpoint.copy(self._best / checkpoint.name_of(step or 0), folder, without=(SELECTED,))

        if step is not None:
            source = copied
        if self.config.lora.merge:
            adapter = self.output / "adapter"
            self._export(adapter, source)
            print_rank_0(f"merged: the adapter itself is in {adapter}")
            source = functools.partial(self._write_merged, adapter=adapter, step=step)
        self._export(self.output / "model", source)
        if self.runtime.is_main:
            checkpoint.drop_all(self._best)
        self.runtime.wait()

    def _export(self, folder: Path, source: checkpoint.Write) -> None:
        aside = checkpoint.export(folder, source, self.runtime)
        if aside is not None:
            print_rank_0(
                f"{folder}: was damaged, or held files that this run did not write; what was there is in {aside}"
            )

    def _selected(self) -> int | None:
        """The step of the model that eval.select has chosen, which is said; None for the last one."""
        select = self.config.eval.select
        if select is None:
            return None
        by = Selection.of(select)
        best = self._best_step()
        if best is None:
            print_rank_0(f"exported: the last model, since no evaluation knew a {by.metric}")
            return None
        chosen = storage.read_json(self._good_best(best) / SELECTED)
        print_rank_0(f"exported: the model of step {best}, with the best {by.metric}: {readable(chosen[by.metric])}")
        return best

    def _write_export(self, folder: Path) -> list[Path]:
        config = self.config
        mine = sharded_io.save_model(
            self.backend, folder, config.train.max_shard_mb, config.model.export_dtype, original=True
        )
        if self.runtime.is_main:
            self._describe(folder)
        return mine

    def _write_merged(self, folder: Path, adapter: Path, step: int | None) -> None:
        """The policy with an exported adapter in its weights. Args: step: of the adapter, None for the last one."""
        if self.runtime.is_main:
            lm: Any = self.policy.lm
            if self.backend.sharded:  # a copy in the host's memory, of this process alone
                lm = adapter_loading.load_frozen(
                    model_sources.find(str(adapter), self.config.model), self.config.model, "lora.merge"
                )
            adapter_saving.merge(lm, adapter, self.config.model)
            adapter_saving.save_merged(lm, folder, self.config.model.export_dtype)
            self._describe(folder, step, merged=True)

    def _describe(self, folder: Path, step: int | None = None, merged: bool = False) -> None:
        self.tokenizer.save_pretrained(folder)
        export.describe_answers(folder, self.tokenizer, in_rounds(self.method).card(), self.config.generate.stop)
        lines = [line for line in self.metrics.lines() if step is None or line["step"] <= step]
        adapter = adapters.has_adapter(self.policy.lm) and not merged
        facts = model_card.facts(
            self.config, self.tokenizer, lines, self.train.fingerprint, adapter=adapter, merged=merged
        )
        facts = replace(facts, data=[*facts.data, *extension.notes(self.output / "run_card.json")])
        (folder / model_card.FILE).write_text(model_card.page(facts), encoding="utf-8")


def _say_beside_the_bar(text: str) -> None:
    """Print on the first process without tearing the progress bar."""
    from tqdm import tqdm

    tqdm.write(text)


# Pure pieces ----------------------------------------------------------------------------------------------------------


def _terms(output: LossOutput) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {f"loss/{term.name}": (term.value.detach(), term.count) for term in output.terms}


def _total_loss(output: LossOutput, averages: Mapping[str, float]) -> float:
    return sum(term.weight * averages.get(f"loss/{term.name}", 0.0) for term in output.terms)


def _placeholder(batch: PairBatch, needs: Needs) -> PairStats:
    """What a model says that knows nothing, for asking a loss for its counts."""
    zeros = torch.zeros(batch.pairs, dtype=torch.float64)
    paired = zeros if batch.rejected_lengths is not None else None
    names = {"logp": "logps", "ref_logp": "ref_logps", "kl": "kl", "scores": "scores"}
    members: dict[str, Any] = {"chosen_logps": None, "rejected_logps": None}
    for name in statistics_for(needs) + (() if needs.output == "scores" else ("logp",)):
        members[f"chosen_{names[name]}"], members[f"rejected_{names[name]}"] = zeros, paired
    return PairStats(**members, chosen_lengths=batch.chosen_lengths, rejected_lengths=batch.rejected_lengths)


def _not_finite(output: LossOutput) -> torch.Tensor:
    """Which pairs have a term that is NaN or infinite, (B,) bool; not read here, since reading waits for the GPU."""
    return torch.stack([~torch.isfinite(term.value.detach()) for term in output.terms]).any(0)


def _pair_line(step: int, row: Mapping[str, Any]) -> str:
    cells = {name: value / count for name, (value, count) in row["cells"].items() if count > 0}
    counts = {name: count for name, (_, count) in row["cells"].items() if count not in (0, 1)}
    more = {"counts": counts} if counts else {}
    return json.dumps({"step": step, "index": row["index"], "where": row["where"], **cells, **more}) + "\n"


def _postfix(line: Mapping[str, Any], tied_at_start: Sequence[str]) -> dict[str, str]:
    """What the progress bar shows of a step. Args: tied_at_start: see `RunConfig.tied_at_start`."""
    shown = {"loss": f"{line['loss']:.4f}", "tok/s": f"{line['tokens_per_second']:,.0f}"}
    name = "rewards/accuracies"
    if name in line:
        # statistics of step 1 are those of the policy before its first update
        shown["acc"] = NOTHING if name in tied_at_start and line["step"] == 1 else f"{line[name]:.3f}"
    return shown
