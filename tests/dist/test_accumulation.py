"""Micro-batches add up in float32 where weights and gradients are held in 16 bits, under each parallel backend.

Micro-batches of the same pair, each divided by their number, are the pair once, exactly where that is a power of two. Added
up in bfloat16 they are not: the sum stops growing by what is below its last bit.
"""

from dataclasses import replace

import pytest
import torch

from prefopt.settings import TrainConfig
from prefopt.training.backends import make_backend
from prefopt.training.forward import PolicyWithReference
from prefopt.training.optimizers import make_optimizer
from tests.dist.ranks import run_ranks
from tests.dist.test_wrapped_head import CASES, LONG, SHORT, _step, _through, load, places  # noqa: F401 - a fixture
from tests.fork_server import BACKENDS

MANY = 32


def _gradient(runtime, places, many, dtype, mixed, own):  # noqa: F811
    """The gradient of one step whose micro-batches are `many` times the same, by the name of a weight."""
    if own is not None:  # as in a DeepSpeed file of the user's own
        runtime.deepspeed_settings["data_types"] = {"grad_accum_dtype": own}
    config = replace(CASES["all weights"].config(places), train=TrainConfig(mixed_precision=mixed))
    config = replace(config, model=replace(config.model, dtype=dtype))
    lm, reference = load(CASES["all weights"], places, runtime)
    if dtype == "bfloat16":
        lm, reference = lm.bfloat16(), reference.bfloat16()
    before = {name: w.detach().clone() for name, w in lm.state_dict(keep_vars=True).items()}
    policy = PolicyWithReference(lm, reference, config.kernel)
    backend = make_backend(runtime, config)
    wrapped, _ = backend.prepare(policy, make_optimizer(config.optim, lm, fused=False))
    if runtime.backend == "zero3":
        before = {name: backend.full_tensor(w).clone() for name, w in lm.state_dict(keep_vars=True).items()}
    backend.set_lr(1.0)
    wrapped.train()
    found = {}
    take = backend.step

    def kept():
        """A step; of weights in 16 bits the gradient is read before it, since their change would be rounded."""
        for name, w in lm.named_parameters():
            if not runtime.backend.startswith("zero"):
                gradient = w.grad
                found[name] = (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()
        return take()

    backend.step = kept
    with runtime.accelerator.autocast():
        _step(runtime, backend, lambda batch: _through(wrapped, policy, batch), [[SHORT[:1]] * many, [LONG[:1]] * many])
    return found or {n: before[n] - backend.full_tensor(w) for n, w in lm.state_dict(keep_vars=True).items()}


def _once_and_often(runtime, places, dtype, mixed, own):  # noqa: F811
    return [_gradient(runtime, places, many, dtype, mixed, own) for many in (1, MANY)]


@pytest.mark.parametrize(
    ("backend", "dtype", "mixed", "own"),
    [
        *(
            pytest.param(
                backend, "float32", "bf16", None, marks=() if backend in ("zero1", "zero3") else pytest.mark.slow
            )
            for backend in BACKENDS
        ),
        ("ddp", "bfloat16", "no", None),
        ("fsdp2", "bfloat16", "no", None),
        ("zero2", "float32", "bf16", "bf16"),
    ],
)
def test_gradient_of_many_micro_batches_is_that_of_one_pass(backend, dtype, mixed, own, places):  # noqa: F811
    for once, often in run_ranks(_once_and_often, places, dtype, mixed, own, backend=backend, mixed_precision=mixed):
        whole = torch.cat([g.flatten() for g in once.values()]).float()
        gap = torch.cat([(often[n] - g).flatten() for n, g in once.items()]).float()
        assert whole.norm() > 0.1
        assert gap.norm() / whole.norm() <= 2e-4, backend
