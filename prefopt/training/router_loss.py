"""The load-balancing loss of a mixture-of-experts model's routers, over the micro-batches of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from prefopt.training import experts
from prefopt.training.experts import Routing
from prefopt.training.forward import pair_stats_and_routing, statistics_for, to_device
from prefopt.training.launcher import print_rank_0
from prefopt.training.run import TrainingRun
from prefopt.types import PairBatch


class RouterLoss:
    """`weight * E sum_e f_e P_e` of a step, see `experts.balance_loss`; weight 0 for a model without routers."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self.weight = experts.router_weight(run.policy.config, run.config.model.router_aux_weight)
        if self.weight:
            print_rank_0(f"router: load-balancing loss added with weight {self.weight:g} (model.router_aux_weight)")
        self._step_counts: tuple[torch.Tensor, torch.Tensor] | None = None  # (chosen, tokens) of the whole step

    @torch.no_grad()
    def begin_step(self, batches: Sequence[PairBatch]) -> None:
        """Count how often each expert is chosen in the whole step, which gives f_e.

        The loss is a product of two means over the step, so each micro-batch needs f_e of the whole step in advance.
        This costs one more forward pass without gradients; it is skipped for a step of one micro-batch on one rank.
        """
        self._step_counts = None
        if not self.weight or (len(batches) == 1 and self.run.runtime.world == 1):
            return
        run, scores = self.run, self.run.needs.output == "scores"
        run.model.eval()  # no dropout, which would advance the random state
        total: torch.Tensor | None = None
        for batch in batches:
            batch = to_device(batch, run.runtime.device)
            if not scores:  # no loss tokens, so that the head computes nothing
                none = batch.loss_index[:0]
                batch = replace(
                    batch, loss_index=none, labels=none, sequence_index=none, ref_logps=None, ref_hidden=None
                )
            want = statistics_for(run.needs) if scores else ()
            found = pair_stats_and_routing(run.model, batch, want)[1].to_vector().double()
            total = found if total is None else total + found
        run.model.train()
        assert total is not None
        total = run.runtime.sum(total)
        count = (len(total) - 1) // 2  # E of the vector (2 E + 1,)
        self._step_counts = total[:count], total[-1]

    def of_micro_batch(self, routing: Routing) -> torch.Tensor:
        """A micro-batch's part of the step's loss, not yet multiplied by the weight, shape ()."""
        chosen, tokens = self._step_counts or (routing.chosen, routing.tokens)
        return experts.balance_loss(routing, chosen, tokens)
