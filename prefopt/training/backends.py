"""Parallel backends: a single process, DDP, DeepSpeed's ZeRO and FSDP2, behind one interface for the training loop.

The loop divides losses by global normalizers and multiplies them by the world size, because every backend averages
gradients over ranks. Checkpoints have the same content under each backend, namely full weights and optimizer state by
parameter, so a run may be resumed under another backend or with another world size.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefopt.errors import ConfigError, TrainError
from prefopt.training import adapter_saving, adapters, checkpoint, sharding
from prefopt.training.checkpoint import State
from prefopt.training.launcher import print_rank_0
from prefopt.training.runtime import SHARDING

if TYPE_CHECKING:
    from prefopt.settings import RunConfig
    from prefopt.training.forward import Policy
    from prefopt.training.runtime import Runtime


_ACCUMULATE = "grad_accum_dtype"  # DeepSpeed's setting for the dtype in which gradients are accumulated


def make_backend(runtime: Runtime, config: RunConfig) -> Backend:
    """The backend that the launcher started.

    Raises: ConfigError for a setting that the backend does not support, with what to use instead.
    """
    kind = {"single process": Backend, "ddp": Backend, "fsdp2": Fsdp2Backend}.get(runtime.backend, ZeroBackend)
    if kind is not Backend:
        check_supported(config, runtime.backend)
    return kind(runtime, config)


def check_supported(config: RunConfig, backend: str) -> None:
    """Raises: ConfigError for settings that a sharding backend does not support, or that are not tested under it."""
    plain = ("adamw", "rmsprop", "sgd")  # elementwise updates, so a shard is updated as the full weight would be
    sharded = backend in SHARDING
    small = "another backend (configs/accelerate/ddp.yaml)"
    for wrong, key, found, expected in (
        (config.train.mixed_precision == "fp16", "train.mixed_precision", "fp16", "bf16 or no"),
        (config.model.quantize is not None, "model.quantize", config.model.quantize, f"none, or {small}"),
        (
            "." not in config.optim.name and config.optim.name not in plain,
            "optim.name",
            config.optim.name,
            f"{', '.join(plain)}, or {small}",
        ),
        (config.train.compile, "train.compile", "true", f"false, or {small}"),
        (sharded and config.model.offload_activations, "model.offload_activations", "true", f"false, or {small}"),
    ):
        if wrong:
            raise ConfigError(f"{key}: found {found}, which is not supported under {backend}, expected {expected}")


class Backend:
    """A single process, or DDP: every rank holds all weights and the full optimizer state. Base class of the others."""

    def __init__(self, runtime: Runtime, config: RunConfig) -> None:
        self.runtime, self.config = runtime, config
        self.accelerator = runtime.accelerator
        # float32 accumulators of 16-bit gradients over the micro-batches of a step: {weight: its sum}
        self._sums: dict[torch.Tensor, torch.Tensor] = {}
        self._accumulating = False  # whether the gradients of this micro-batch are added to these sums

    def prepare(self, policy: Policy, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """(the wrapped policy, the wrapped optimizer).

        Raises: TrainError when the backend has sharded nothing, which would otherwise go unnoticed.
        """
        self.policy = policy
        if self.sharded:  # copied before the backend adds hooks and shards weights
            self._meta_copy = _MetaCopy(policy)
        # names in the order of the optimizer's parameters; backends may replace parameters, but keep names and order
        names = {id(p): name for name, p in policy.lm.named_parameters()}
        self._order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        self.model, self.optimizer = self.accelerator.prepare(policy, optimizer)
        self._accumulate_in_float32()
        mine, full, what = self.shard_size()
        if what:
            print_rank_0(f"{self.runtime.backend}: this rank holds {mine:,} of {full:,} entries of the {what}")
        if self.runtime.world > 1 and what and mine >= full:
            raise TrainError(f"launcher: {self.runtime.backend} has sharded nothing: each rank holds the full {what}")
        return self.model, self.optimizer

    # A training step

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """The context of forward and backward of a micro-batch; gradients are all-reduced with the last one."""
        # a step of a single micro-batch needs no accumulators: its gradients are reduced by the backend as they are
        self._accumulating = not last or bool(self._sums)
        all_reduce = last and not self._sums  # float32 accumulators are all-reduced in `backward`
        return contextlib.nullcontext() if all_reduce else self.accelerator.no_sync(self.model)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """The backward pass; with the last micro-batch, 16-bit weights receive their float32 sums, rounded once."""
        self.accelerator.backward(loss)
        if last and self._sums:
            for weight in filter(_is_16_bit, self._optimizer_parameters()):
                total = self._sums.pop(weight, None)
                # a weight without gradient on this rank may have one on another, and all ranks must call the all-reduce
                total = torch.zeros_like(weight, dtype=torch.float32) if total is None else total
                weight.grad = (self.runtime.sum(total) / self.runtime.world).to(weight.dtype)

    def _accumulate_in_float32(self) -> None:
        """Accumulate the gradients of 16-bit weights in float32 and round them once, after the last micro-batch.

        bfloat16 has 8 bits of significand: adding a gradient below 1/256 of the running sum would change nothing.
        """

        def accumulate(weight: torch.Tensor) -> None:
            if self._accumulating and weight.grad is not None:
                # autograd calls this as soon as a gradient is complete, so 16-bit gradients never exist all at once
                if weight in self._sums:
                    self._sums[weight] += weight.grad
                else:
                    self._sums[weight] = weight.grad.float()
                weight.grad = None

        for weight in filter(_is_16_bit, self._optimizer_parameters()):
            weight.register_post_accumulate_grad_hook(accumulate)

    def clip(self, limit: float) -> float | None:
        """Clip the gradient and return its global norm; None where `step` does both."""
        return float(self.accelerator.clip_grad_norm_(self._optimizer_parameters(), limit))

    def _optimizer_parameters(self) -> list[Any]:
        """The parameters of the optimizer, as this rank holds them."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def step(self) -> tuple[bool, float]:
        """The optimizer step. Returns: (whether the gradient scaler skipped it, the norm where `clip` gave None)."""
        self.optimizer.step()
        return bool(self.optimizer.step_was_skipped), math.nan

    def zero_grad(self) -> None:
        """Discard gradients and accumulators, after a step or in place of one."""
        self._sums.clear()
        self.optimizer.zero_grad(set_to_none=True)

    # Weights and optimizer state; all ranks call these together

    @property
    def sharded(self) -> bool:
        """Whether a rank holds only a shard of each weight."""
        return False

    def run_inside_forward(self, run: Callable[[], Any]) -> Any:
        """The result of `run`, called inside the wrapper's forward, where the unwrapped policy can be called.

        All ranks must make the same calls of the policy in it.
        """
        return self.model(run=run) if self.sharded else run()

    def shard_size(self) -> tuple[int, int, str]:
        """(entries on this rank, entries in total, the name of what is sharded)."""
        return 0, 0, ""

    @contextlib.contextmanager
    def full_state(self) -> Iterator[Policy]:
        """Context manager that yields a policy with full weights, which each rank may call alone. Not for training."""
        yield self.policy

    def full_tensor(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight or buffer of the policy, unsharded, in the precision in which it is trained."""
        return weight.detach()

    def set_full_tensor(self, weight: nn.Parameter, full: torch.Tensor) -> None:
        """The inverse of `full_tensor`, for a weight that is not trained."""
        weight.data.copy_(full)

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters of the optimizer in its order; a parameter's number is its index in this list."""
        parameters = dict(self.policy.lm.named_parameters())
        return [parameters[name] for name in self._order]

    def optimizer_state(self) -> Callable[[int], dict[str, Any]]:
        """A function from a parameter's number to its optimizer state by name; empty for a parameter without state."""
        state = self.optimizer.state_dict()["state"]
        return lambda number: dict(state.get(number, {}))

    def load(self, folder: Path) -> None:
        """Load the optimizer state of a checkpoint; the policy was loaded with its weights already."""
        self.load_optimizer_state(checkpoint.load_optimizer(folder))

    def load_optimizer_state(self, state: State) -> None:
        """Restore the optimizer state from the full state of each parameter."""
        checkpoint.restore_optimizer(self.optimizer, state)


class Fsdp2Backend(Backend):
    """FSDP2 of accelerate: every weight is a DTensor, sharded over ranks along its first dimension."""

    def __init__(self, runtime: Runtime, config: RunConfig) -> None:
        super().__init__(runtime, config)
        bf16 = config.train.mixed_precision == "bf16"
        plugin: Any = self.accelerator.state.fsdp_plugin
        if bf16 or config.model.dtype == "bfloat16":
            from torch.distributed.fsdp import MixedPrecisionPolicy

            # accelerate's default has output_dtype bfloat16, which would round the returned statistics. reduce_dtype is
            # the dtype in which gradients are accumulated over micro-batches and ranks.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if bf16 else None,
                reduce_dtype=torch.float32,
                output_dtype=None,
                cast_forward_inputs=False,
            )

    @property
    def sharded(self) -> bool:
        return True

    def _accumulate_in_float32(self) -> None:
        """Done by the mixed-precision policy."""

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def shard_size(self) -> tuple[int, int, str]:
        return _weight_shard_size(self.policy)

    def clip(self, limit: float) -> float | None:
        # accelerate's clip_grad_norm_ compares lists of parameters and fails when their order differs. Parameters are
        # not selected by requires_grad, because disabling an adapter may change it on a sharded weight.
        return float(_unsharded(torch.nn.utils.clip_grad_norm_(self._optimizer_parameters(), limit)))

    @contextlib.contextmanager
    def full_state(self) -> Iterator[Policy]:
        yield self._meta_copy.filled({name: _unsharded(p) for name, p in self.policy.named_parameters()})

    def full_tensor(self, weight: torch.Tensor) -> torch.Tensor:
        return _unsharded(weight)

    def optimizer_state(self) -> Callable[[int], dict[str, Any]]:
        mine = super().optimizer_state()
        # each DTensor is gathered when its parameter is saved, so that one full state at a time is in memory
        return lambda number: {
            name: _unsharded(value) if isinstance(value, torch.Tensor) else value
            for name, value in mine(number).items()
        }

    def set_full_tensor(self, weight: nn.Parameter, full: torch.Tensor) -> None:
        sharding.local_shard(weight).copy_(_shard_like(weight, full).to_local())

    def load_optimizer_state(self, state: State) -> None:
        parameters = self._optimizer_parameters()

        def part(parameter: Any, value: Any) -> Any:
            # values that are not entries of the parameter, such as a step count, are the same on every rank
            if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
                return value
            return _shard_like(parameter, value)

        super().load_optimizer_state(
            {n: {name: part(parameters[n], value) for name, value in values.items()} for n, values in state.items()}
        )


class ZeroBackend(Backend):
    """DeepSpeed's ZeRO: stage 1 shards the optimizer state, stage 2 also gradients, stage 3 also weights.

    DeepSpeed's optimizer works on flat partitions of concatenated parameters; this class reads and writes its state by
    parameter.
    """

    def __init__(self, runtime: Runtime, config: RunConfig) -> None:
        super().__init__(runtime, config)
        self.stage = int(runtime.backend[-1])
        settings = runtime.deepspeed_settings
        settings["train_micro_batch_size_per_gpu"] = (
            config.train.micro_batch
        )  # DeepSpeed uses it for throughput figures only
        settings["gradient_accumulation_steps"] = 1  # the loop marks the last micro-batch of a step, see `backward`
        settings["gradient_clipping"] = config.optim.clip  # accelerate would set 1.0
        settings["zero_allow_untested_optimizer"] = True
        settings["steps_per_print"] = 10**9
        types = settings.setdefault("data_types", {})
        if types.get(_ACCUMULATE, "fp32") != "fp32":
            print_rank_0(
                f"DeepSpeed's data_types.{_ACCUMULATE}: found {types[_ACCUMULATE]}, fp32 is used, since 16-bit sums "
                "lose small gradients"
            )
        types[_ACCUMULATE] = "fp32"  # DeepSpeed's default is the dtype of the weights

    @property
    def sharded(self) -> bool:
        return self.stage == 3

    def shard_size(self) -> tuple[int, int, str]:
        if self.stage == 3:
            return _weight_shard_size(self.policy)
        mine = sum(flat.numel() for flat in self._partitions)
        return mine, sum(p.numel() for p in self.trained_parameters()), "optimizer state"

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        # DeepSpeed accumulates gradients until a boundary, after which its step updates the weights
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss)

    def clip(self, limit: float) -> float | None:
        return None  # DeepSpeed clips in its step, by the setting gradient_clipping

    def step(self) -> tuple[bool, float]:
        self.model.step()
        norm: Any = self.model.get_global_grad_norm()
        return False, math.nan if norm is None else float(norm)

    def zero_grad(self) -> None:
        """Does nothing: DeepSpeed's step discards gradients, and the process ends if a step is not taken."""

    @contextlib.contextmanager
    def full_state(self) -> Iterator[Policy]:
        if not self.sharded:
            yield self.policy
            return
        with sharding.gathered(self.policy):
            yield self._meta_copy.filled({name: p.detach() for name, p in self.policy.named_parameters()})

    def full_tensor(self, weight: torch.Tensor) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        if not isinstance(weight, nn.Parameter):
            return weight.detach()
        # the 32-bit master weight; None for a weight that the optimizer does not hold
        full = safe_get_full_fp32_param(weight) if weight.requires_grad else None
        if full is None:
            with sharding.gathered_tensors([weight]):
                full = weight.detach().clone()
        # adapter weights are float32 over a 16-bit base
        dtype = full.dtype if adapters.has_adapter(self.policy.lm) else getattr(torch, self.config.model.dtype)
        return full.to(dtype)

    def set_full_tensor(self, weight: nn.Parameter, full: torch.Tensor) -> None:
        with sharding.gathered_tensors([weight], from_rank_0=True):
            weight.data.copy_(full)

    def _accumulate_in_float32(self) -> None:
        """Done by DeepSpeed, see grad_accum_dtype in its settings."""

    @property
    def _partitions(self) -> list[torch.Tensor]:
        """This rank's flat partitions of the 32-bit trained weights."""
        # attributes of stage 3, of stages 1 and 2, and of stage 1 with 16-bit weights
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        optimizer = self.model.optimizer
        return next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The torch optimizer, whose parameters are the flat partitions."""
        inner: torch.optim.Optimizer = self.model.optimizer.optimizer
        return inner

    def optimizer_state(self) -> Callable[[int], dict[str, Any]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        shared = {name: v for state in self._inner.state.values() for name, v in state.items() if not _is_per_entry(v)}
        mine = {name for state in self._inner.state.values() for name, value in state.items() if _is_per_entry(value)}
        # all ranks call the collective below for the same names, also a rank whose partition is empty
        names = sorted(set(self.runtime.gather_objects(sorted(mine))))
        self._link_optimizer_state()
        trained = self.trained_parameters()

        def state_of(number: int) -> dict[str, Any]:
            full = {name: safe_get_full_optimizer_state(trained[number], name) for name in names}
            return full | {name: _copy(value) for name, value in shared.items()}

        return state_of

    def _link_optimizer_state(self) -> None:
        """Make DeepSpeed link parameters to their state again; by itself it does so once, after the first step."""
        if self.stage < 3:
            self.model.optimizer._hp_optimizer_states_linked = False
            self.model.optimizer._lazy_init_hp_params_optimizer_state()

    def load_optimizer_state(self, state: State) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if not state:
            return
        # first create state of the flat partitions, so that DeepSpeed can then fill it parameter by parameter
        for number, flat in enumerate(self._partitions):
            with self._swapped_in(number):
                self._inner.state[flat] = {
                    name: torch.zeros_like(flat) if _is_per_entry(value) else _copy(value)
                    for name, value in state[0].items()
                }
        self._link_optimizer_state()
        for number, parameter in enumerate(self.trained_parameters()):
            for name, value in state[number].items():
                if _is_per_entry(value):
                    safe_set_full_optimizer_state(parameter, value.to(self.runtime.device, torch.float32), name)

    @contextlib.contextmanager
    def _swapped_in(self, number: int) -> Iterator[None]:
        """Context manager in which a partition and its state are in memory, also if they are offloaded to NVMe."""
        optimizer = self.model.optimizer
        swapped = self.stage == 3 and optimizer._swappable_optimizer_subgroup(number)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(number)
        yield
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_out(number)

    def load(self, folder: Path) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        super().load(folder)
        # the checkpoint holds the 32-bit master weights, which are more precise than the policy's 16-bit weights
        if self.config.train.mixed_precision != "no":
            weights = adapter_saving.saved_weights(self.policy.lm, folder)
            for name, parameter in zip(self._order, self.trained_parameters(), strict=True):
                safe_set_full_fp32_param(parameter, weights[name].to(self.runtime.device, torch.float32))


def _is_16_bit(weight: torch.Tensor) -> bool:
    return weight.dtype in (torch.bfloat16, torch.float16)


def _is_per_entry(value: Any) -> bool:
    """Whether a value of the optimizer state has one entry per entry of the parameter, unlike a step count."""
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _weight_shard_size(policy: Policy) -> tuple[int, int, str]:
    parameters = list(policy.parameters())
    return (
        sum(sharding.local_shard(p).numel() for p in parameters),
        sum(sharding.numel(p) for p in parameters),
        "weights",
    )


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _unsharded(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, gathered if FSDP2 has sharded it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _shard_like(weight: Any, full: torch.Tensor) -> Any:
    """A DTensor of `full`, sharded like `weight`, which has the same shape."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(weight.device), weight.device_mesh, weight.placements)


class _MetaCopy:
    """A copy of a policy on the meta device, made before the backend adds hooks and shards its weights."""

    def __init__(self, policy: Policy) -> None:
        # deepcopy takes from its memo what it would copy: parameters are replaced by placeholders without data
        meta = {id(p): nn.Parameter(torch.empty(0, device="meta"), requires_grad=False) for p in policy.parameters()}
        self._policy = copy.deepcopy(policy, dict(meta))
        self._names = {name: meta[id(p)] for name, p in policy.named_parameters()}

    def filled(self, weights: dict[str, torch.Tensor]) -> Policy:
        """A policy with these full weights. Args: weights: by name."""
        return copy.deepcopy(self._policy, {id(meta): weights[name] for name, meta in self._names.items()})
