"""What three optimizer steps leave behind, from our trainer or from another one, and how far two of them are apart."""

import copy
from dataclasses import dataclass

import torch

from tests.invariant.steps import Bench

BATCH = 8  # pairs per step, in two micro-batches
BOUNDS = {"loss": 1e-5, "gradient": 1e-4, "update": 1e-3}  # relative; the worst step, the worst tensor


@dataclass(frozen=True)
class Trajectory:
    """`losses` and `gradients` (by parameter name) of each step; `update`: how far the steps have moved each parameter.

    `seen` holds all rows that went through the policy and the reference, each as `row` gives it.
    """

    losses: list
    gradients: list
    update: dict
    seen: dict


def row(ids, scored):
    """A row of token ids, and which of them are scored."""
    return tuple(ids), tuple(scored)


def ours(runtime, method, models, steps, lr):
    """What prefopt's trainer does on `steps`, a list of batches of encoded pairs."""
    bench = Bench(runtime, method, models, lr=lr)
    lm, reference = bench.run.policy.lm, bench.run.policy.reference
    before = {name: p.detach().clone() for name, p in lm.named_parameters()}
    scored, seen = [], {"policy": [], "reference": []}
    bench.run.policy.register_forward_pre_hook(lambda _, __, kw: scored.append(_scored(kw)), with_kwargs=True)
    for name, model in (("policy", lm), ("reference", reference)):
        model.base_model.register_forward_pre_hook(
            lambda _, __, kw, seen=seen[name]: seen.extend(_rows(kw, scored[-1])), with_kwargs=True
        )
    done = [bench.step(batch, BATCH // 2) for batch in steps]
    update = {name: p.detach() - before[name] for name, p in lm.named_parameters()}
    return Trajectory([loss for loss, _ in done], [copy.copy(gradients) for _, gradients in done], update, seen)


def _scored(inputs):
    """Which cells hold a scored token, (R, T) bool: those behind the states that are scored."""
    scored = torch.zeros(inputs["input_ids"].numel(), dtype=torch.bool)
    scored[inputs["loss_index"] + 1] = True
    return scored.view(inputs["input_ids"].shape)


def _rows(inputs, scored):
    real = inputs["attention_mask"].bool()
    return [row(i[r].tolist(), s[r].tolist()) for i, r, s in zip(inputs["input_ids"], real, scored, strict=True)]


def gaps(expected, found):
    """How far `found` is from `expected`, relative to it: the worst loss, gradient tensor and tensor of the update."""
    steps = range(len(expected.losses))
    assert len(found.losses) == len(steps)
    return {
        "loss": max(abs(expected.losses[i] - found.losses[i]) / abs(expected.losses[i]) for i in steps),
        "gradient": max(_worst(expected.gradients[i], found.gradients[i]) for i in steps),
        "update": _worst(expected.update, found.update),
    }


def beyond(expected, found):
    """Which of the three figures lie beyond their bounds, as `{name: gap}`; empty where the two trajectories agree."""
    return {name: gap for name, gap in gaps(expected, found).items() if not gap <= BOUNDS[name]}


def _worst(expected, found):
    assert expected.keys() == found.keys()
    assert all(tensor.norm() > 0 for tensor in expected.values()), "a tensor of zeros: nothing is compared"
    return max(float((tensor - found[name]).norm() / tensor.norm()) for name, tensor in expected.items())
