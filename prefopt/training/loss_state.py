"""What a loss reads beyond its micro-batch: values of the whole global batch, numbers kept between steps, the step.

Most losses read none of it, and then nothing here runs. The values of the global batch must be known before the first
loss of a step. Where a rank has one micro-batch per step, its own forward pass provides them; otherwise, and for
mismatched completions, one more forward pass without gradient does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from prefopt.training.forward import pair_stats, statistics_for, to_device
from prefopt.training.launcher import print_rank_0
from prefopt.training.random_state import preserved_random_state
from prefopt.training.run import TrainingRun
from prefopt.types import EncodedPair, LossOutput, LossState, PairBatch, PairStats

Values = dict[str, list[float]]  # of the pairs of one rank, by name


class LossStates:
    """The LossState of each micro-batch of a run, and the numbers that its method keeps, which checkpoints hold."""

    def __init__(self, run: TrainingRun) -> None:
        self.run, self.method, self.needs = run, run.method, run.method.needs
        self.state: Mapping[str, float] = dict(self.needs.state)
        self._values: Mapping[str, torch.Tensor] | None = None  # of the step's global batch
        self._offsets: list[int] = []  # of this rank's micro-batches among them
        self._ranks: tuple[int, ...] = ()  # how many of them each rank has
        self._progress = 0.0
        cut = run.config.train.micro_batch * run.runtime.world < run.config.train.global_batch
        if self.needs.batch_values and (cut or self.needs.mismatched):
            what = "mismatched completions" if self.needs.mismatched else "all micro-batches"
            print_rank_0(f"loss: it reads the global batch; each step has one more forward pass, of {what}")
        if self.method.depends_on_cut:
            print_rank_0("loss: it depends on micro-batches and ranks with these settings, so runs may not compare")

    def begin_step(self, step: int, pairs: Sequence[Sequence[EncodedPair]], batches: Sequence[PairBatch]) -> None:
        """Collect the values of the global batch, unless the forward pass of the only micro-batch will provide them.

        Args: pairs, batches: this rank's micro-batches. All ranks call this together.
        """
        self._values = None
        if not self.needs.with_state:
            return
        self._progress = self.run.run_length.progress(step)
        if not self.needs.batch_values:
            self._update({})
        elif self.needs.mismatched or len(batches) > 1:
            with torch.no_grad(), preserved_random_state():  # dropout draws as in the passes with gradient
                self._collect([self._values_of(mine, batch) for mine, batch in zip(pairs, batches, strict=True)])

    def loss(self, index: int, stats: PairStats, batch: PairBatch) -> LossOutput:
        """The loss of micro-batch `index` of the step."""
        if not self.needs.with_state:
            return self.method.loss(stats, batch)
        if self._values is None:
            with torch.no_grad():
                self._collect([as_lists(self.method.batch_values(stats, batch))])
        assert self._values is not None
        values = {name: value.to(stats.chosen_lengths.device) for name, value in self._values.items()}
        offset = self._offsets[index] if self._offsets else 0
        return self.method.loss_of(stats, batch, LossState(values, offset, self._ranks, self.state, self._progress))

    def of_evaluation(self, step: int, parts: Sequence[Values] = ()) -> list[LossState]:
        """The LossState of each batch of an evaluation: the values of all held-out pairs, and the state as it is.

        Args: step: optimizer steps done. parts: the values of this rank's batches, see `evaluation_values`.
        """
        progress = self.run.run_length.progress(step)
        if not self.needs.batch_values:
            return [LossState(state=self.state, progress=progress)]
        values, offsets, ranks = self._gathered(parts)
        device = self.run.runtime.device
        values = {name: value.to(device) for name, value in values.items()}
        return [LossState(values, offset, ranks, self.state, progress) for offset in offsets]

    def evaluation_values(self, pairs: Sequence[EncodedPair], stats: PairStats, batch: PairBatch) -> Values:
        """The values of a batch of an evaluation. Args: stats: of `batch`."""
        if self.needs.mismatched:
            return self._values_of(pairs, batch)
        return as_lists(self.method.batch_values(stats, batch))

    def state_dict(self) -> dict[str, float]:
        """The numbers that the method keeps, for a checkpoint."""
        return dict(self.state)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.state = dict(state)

    def _values_of(self, pairs: Sequence[EncodedPair], batch: PairBatch) -> Values:
        if self.needs.mismatched:
            batch = self.run.batcher.mismatched(pairs)
        batch = to_device(batch, self.run.runtime.device)
        stats = pair_stats(self.run.model, batch, statistics_for(self.needs))
        return as_lists(self.method.batch_values(stats, batch))

    def _collect(self, parts: Sequence[Values]) -> None:
        values, self._offsets, self._ranks = self._gathered(parts)
        self._update(values)

    def _gathered(self, parts: Sequence[Values]) -> tuple[dict[str, torch.Tensor], list[int], tuple[int, ...]]:
        """(values of all pairs on all ranks, offsets of this rank's parts among them, pairs of each rank)."""
        runtime, names = self.run.runtime, self.needs.batch_values
        mine = {name: [value for part in parts for value in part[name]] for name in names}
        ranks = runtime.gather_objects([mine])
        sizes = [len(part[names[0]]) for part in parts]
        counts = tuple(len(rank[names[0]]) for rank in ranks)
        before = sum(counts[: runtime.rank])
        offsets = [before + sum(sizes[:i]) for i in range(len(sizes))]
        values = {
            name: torch.tensor([value for rank in ranks for value in rank[name]], dtype=torch.float64) for name in names
        }
        return values, offsets, counts

    def _update(self, values: Mapping[str, torch.Tensor]) -> None:
        self._values = values
        if self.needs.state:
            self.state = self.method.next_state(self.state, values)


def as_lists(values: Mapping[str, torch.Tensor]) -> Values:
    """Values of pairs as Python floats, which ranks exchange exactly."""
    return {name: value.detach().double().tolist() for name, value in values.items()}
