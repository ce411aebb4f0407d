"""What joins the processes: nothing, DDP, DeepSpeed's ZeRO or FSDP2. The loop speaks to all of them in these words.

Losses come in divided by global counts and multiplied by the number of processes, because every backend averages over
them. What a checkpoint holds is the same under each: whole weights, and the optimizer's state by parameter, so a run
may go on under another backend or with another number of processes.
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


_ACCUMULATE = "grad_accum_dtype"  # DeepSpeed's name of what gradients add up in


def make_backend(runtime: Runtime, config: RunConfig) -> Backend:
    """The backend that the launcher started.

    Raises: ConfigError for settings that it cannot keep, with what to use instead.
    """
    kind = {"single process": Backend, "ddp": Backend, "fsdp2": Fsdp2Backend}.get(runtime.backend, ZeroBackend)
    if kind is not Backend:
        _refuse(config, runtime.backend)
    return kind(runtime, config)


def _refuse(config: RunConfig, backend: str) -> None:
    """Raises: ConfigError for what a backend that shards cannot do, or where nobody has tried whether it can."""
    plain = ("adamw", "rmsprop", "sgd")  # of one entry at a time: where a weight is cut does not matter
    shards = backend in SHARDING
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
        (shards and config.model.offload_activations, "model.offload_activations", "true", f"false, or {small}"),
    ):
        if wrong:
            raise ConfigError(f"{key}: found {found}, which is not supported under {backend}, expected {expected}")


class Backend:
    """One process, or DDP: every process holds all weights and the whole state of the optimizer."""

    def __init__(self, runtime: Runtime, config: RunConfig) -> None:
        self.runtime, self.config = runtime, config
        self.accelerator = runtime.accelerator
        self._sums: dict[torch.Tensor, torch.Tensor] = {}  # of the step's gradients in 16 bits, in float32
        self._adds = False  # whether gradients go there

    def prepare(self, policy: Policy, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """(the wrapped policy, the wrapped optimizer).

        Raises: TrainError when what the backend is there to shard was not: that would go unseen.
        """
        self.policy = policy
        if self.shards:
            self._skeleton = _Skeleton(policy)
        names = {id(p): name for name, p in policy.lm.named_parameters()}
        self._order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        self.model, self.optimizer = self.accelerator.prepare(policy, optimizer)
        self._accumulate_in_float32()
        mine, whole, what = self.held()
        if what:
            print_rank_0(f"{self.runtime.backend}: this process holds {mine:,} of {whole:,} entries of the {what}")
        if self.runtime.world > 1 and what and mine >= whole:
            raise TrainError(
                f"launcher: {self.runtime.backend} has sharded nothing: each process holds the whole {what}"
            )
        return self.model, self.optimizer

    # A step

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; gradients travel with the last one."""
        self._adds = not last or bool(self._sums)
        alone = last and not self._sums  # sums in float32 travel by themselves
        return contextlib.nullcontext() if alone else self.accelerator.no_sync(self.model)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.accelerator.backward(loss)
        if last and self._sums:
            for weight in filter(_is_narrow, self._of_optimizer()):
                total = self._sums.pop(weight, None)
                total = torch.zeros_like(weight, dtype=torch.float32) if total is None else total
                weight.grad = (self.runtime.sum(total) / self.runtime.world).to(weight.dtype)

    def _accumulate_in_float32(self) -> None:
        """Let the gradients of weights in 16 bits add up in float32, and be rounded once, after the last micro-batch.

        Added to each other in bfloat16, what is less than a 256th of a sum is lost.
        """

        def add(weight: torch.Tensor) -> None:
            if self._adds and weight.grad is not None:
                if weight in self._sums:
                    self._sums[weight] += weight.grad
                else:
                    self._sums[weight] = weight.grad.float()
                weight.grad = None

        for weight in filter(_is_narrow, self._of_optimizer()):
            weight.register_post_accumulate_grad_hook(add)

    def clip(self, limit: float) -> float | None:
        """Clip the gradient and return its norm over all parameters; None where the step does both."""
        return float(self.accelerator.clip_grad_norm_(self._of_optimizer(), limit))

    def _of_optimizer(self) -> list[Any]:
        """What the optimizer moves, as it is held now."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def step(self) -> tuple[bool, float]:
        """(whether a gradient scaler skipped it, the gradient's norm where `clip` did not know it)."""
        self.optimizer.step()
        return bool(self.optimizer.step_was_skipped), math.nan

    def forget_gradients(self) -> None:
        """After a step, or for one that is given up."""
        self._sums.clear()
        self.optimizer.zero_grad(set_to_none=True)

    # Weights and state; all processes together

    @property
    def shards(self) -> bool:
        """Whether a process holds a part of each weight only."""
        return False

    def inside(self, run: Callable[[], Any]) -> Any:
        """What `run` returns, called where the unwrapped policy can be: all processes make the same calls of it."""
        return self.model(run=run) if self.shards else run()

    def held(self) -> tuple[int, int, str]:
        """(how many entries of what is sharded this process holds, of how many, of what)."""
        return 0, 0, ""

    @contextlib.contextmanager
    def whole(self) -> Iterator[Policy]:
        """While it lasts, the policy by itself, which each process may call as it is. No training in it."""
        yield self.policy

    def gathered(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight or buffer of the policy, whole and as it is trained."""
        return weight.detach()

    def put(self, weight: nn.Parameter, whole: torch.Tensor) -> None:
        """Undo `gathered`, of a weight that is not trained."""
        weight.data.copy_(whole)

    def trained(self) -> list[nn.Parameter]:
        """The parameters that the optimizer was given, in its order: their numbers are the places here."""
        parameters = dict(self.policy.lm.named_parameters())
        return [parameters[name] for name in self._order]

    def optimizer_state(self) -> Callable[[int], dict[str, Any]]:
        """What gives all that the optimizer keeps of the parameter with a number, by name: nothing of some."""
        state = self.optimizer.state_dict()["state"]
        return lambda number: dict(state.get(number, {}))

    def load(self, folder: Path) -> None:
        """Take up what a checkpoint has beside the weights, which the policy was loaded with."""
        self.load_optimizer_state(checkpoint.load_optimizer(folder))

    def load_optimizer_state(self, state: State) -> None:
        """Give the optimizer what it kept of each parameter, whole."""
        checkpoint.restore_optimizer(self.optimizer, state)


class Fsdp2Backend(Backend):
    """FSDP2 of accelerate: every weight is a DTensor, of which each process holds some rows."""

    def __init__(self, runtime: Runtime, config: RunConfig) -> None:
        super().__init__(runtime, config)
        bf16 = config.train.mixed_precision == "bf16"
        plugin: Any = self.accelerator.state.fsdp_plugin
        if bf16 or config.model.dtype == "bfloat16":
            from torch.distributed.fsdp import MixedPrecisionPolicy

            # accelerate's own choice would round the statistics to bfloat16 on their way out; gradients add up, over
            # micro-batches and ranks, in what they are reduced in
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if bf16 else None,
                reduce_dtype=torch.float32,
                output_dtype=None,
                cast_forward_inputs=False,
            )

    @property
    def shards(self) -> bool:
        return True

    def _accumulate_in_float32(self) -> None:
        """The mixed-precision policy does."""

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def held(self) -> tuple[int, int, str]:
        return _held_weights(self.policy)

    def clip(self, limit: float) -> float | None:
        # accelerate compares lists of parameters, which fails for as many of them in another order; and not by their
        # flags, which disabling an adapter may leave another way on a sharded weight
        return float(_full(torch.nn.utils.clip_grad_norm_(self._of_optimizer(), limit)))

    @contextlib.contextmanager
    def whole(self) -> Iterator[Policy]:
        yield self._skeleton.filled({name: _full(p) for name, p in self.policy.named_parameters()})

    def gathered(self, weight: torch.Tensor) -> torch.Tensor:
        return _full(weight)

    def optimizer_state(self) -> Callable[[int], dict[str, Any]]:
        mine = super().optimizer_state()
        return lambda number: {
            name: _full(value) if isinstance(value, torch.Tensor) else value for name, value in mine(number).items()
        }

    def put(self, weight: nn.Parameter, whole: torch.Tensor) -> None:
        sharding.local_shard(weight).copy_(_part(weight, whole).to_local())

    def load_optimizer_state(self, state: State) -> None:
        parameters = self._of_optimizer()

        def part(parameter: Any, value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
                return value
            return _part(parameter, value)

        super().load_optimizer_state(
            {n: {name: part(parameters[n], value) for name, value in kept.items()} for n, kept in state.items()}
        )


class ZeroBackend(Backend):
    """DeepSpeed's ZeRO: stage 1 shards the optimizer's state, 2 the gradients too, 3 the weights too.

    Its optimizer is over flat partitions; what that keeps is addressed by the parameters that they are made of.
    """

    def __init__(self, runtime: Runtime, config: RunConfig) -> None:
        super().__init__(runtime, config)
        self.stage = int(runtime.backend[-1])
        settings = runtime.deepspeed_settings
        settings["train_micro_batch_size_per_gpu"] = config.train.micro_batch  # for its own counts only
        settings["gradient_accumulation_steps"] = 1  # the loop's own
        settings["gradient_clipping"] = config.optim.clip  # left out, accelerate would put 1.0 there
        settings["zero_allow_untested_optimizer"] = True
        settings["steps_per_print"] = 10**9
        types = settings.setdefault("data_types", {})
        if types.get(_ACCUMULATE, "fp32") != "fp32":
            print_rank_0(
                f"DeepSpeed's data_types.{_ACCUMULATE}: found {types[_ACCUMULATE]}, fp32 is used: sums of 16 bits drift"
            )
        types[_ACCUMULATE] = "fp32"  # left out, DeepSpeed takes that of the weights

    @property
    def shards(self) -> bool:
        return self.stage == 3

    def held(self) -> tuple[int, int, str]:
        if self.stage == 3:
            return _held_weights(self.policy)
        mine = sum(flat.numel() for flat in self._partitions)
        return mine, sum(p.numel() for p in self.trained()), "optimizer's state"

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss)

    def clip(self, limit: float) -> float | None:
        return None

    def step(self) -> tuple[bool, float]:
        self.model.step()
        norm: Any = self.model.get_global_grad_norm()
        return False, math.nan if norm is None else float(norm)

    def forget_gradients(self) -> None:
        """A step forgets them itself; what a given-up step has gathered dies with the process."""

    @contextlib.contextmanager
    def whole(self) -> Iterator[Policy]:
        if not self.shards:
            yield self.policy
            return
        with sharding.gathered(self.policy):
            yield self._skeleton.filled({name: p.detach() for name, p in self.policy.named_parameters()})

    def gathered(self, weight: torch.Tensor) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        if not isinstance(weight, nn.Parameter):
            return weight.detach()
        full = safe_get_full_fp32_param(weight) if weight.requires_grad else None
        if full is None:
            with sharding.gathered_tensors([weight]):
                full = weight.detach().clone()
        # an adapter's own weights are float32 over a base of 16 bits
        kept = full.dtype if adapters.has_adapter(self.policy.lm) else getattr(torch, self.config.model.dtype)
        return full.to(kept)

    def put(self, weight: nn.Parameter, whole: torch.Tensor) -> None:
        with sharding.gathered_tensors([weight], from_first=True):
            weight.data.copy_(whole)

    def _accumulate_in_float32(self) -> None:
        """DeepSpeed does, as its settings say."""

    @property
    def _partitions(self) -> list[torch.Tensor]:
        """What this process holds of the trained weights in 32 bits, one after the other."""
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        optimizer = self.model.optimizer  # of ZeRO-3; of 1 and 2; of 1 where weights have fewer bits
        return next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))

    @property
    def _inner(self) -> torch.optim.Optimizer:
        inner: torch.optim.Optimizer = self.model.optimizer.optimizer
        return inner

    def optimizer_state(self) -> Callable[[int], dict[str, Any]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        once = {name: v for kept in self._inner.state.values() for name, v in kept.items() if not _per_weight(v)}
        mine = {name for kept in self._inner.state.values() for name, value in kept.items() if _per_weight(value)}
        names = sorted(set(self.runtime.gather_objects(sorted(mine))))
        self._relink()
        trained = self.trained()

        def kept(number: int) -> dict[str, Any]:
            whole = {name: safe_get_full_optimizer_state(trained[number], name) for name in names}
            return whole | {name: _copy(value) for name, value in once.items()}

        return kept

    def _relink(self) -> None:
        """Show DeepSpeed where its state is: it looks once, after the first group's first step, and misses others."""
        if self.stage < 3:
            self.model.optimizer._hp_optimizer_states_linked = False
            self.model.optimizer._lazy_init_hp_params_optimizer_state()

    def load_optimizer_state(self, state: State) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if not state:
            return
        for number, flat in enumerate(self._partitions):
            with self._read_from_disk(number):
                self._inner.state[flat] = {
                    name: torch.zeros_like(flat) if _per_weight(value) else _copy(value)
                    for name, value in state[0].items()
                }
        self._relink()
        for number, parameter in enumerate(self.trained()):
            for name, value in state[number].items():
                if _per_weight(value):
                    safe_set_full_optimizer_state(parameter, value.to(self.runtime.device, torch.float32), name)

    @contextlib.contextmanager
    def _read_from_disk(self, number: int) -> Iterator[None]:
        """While it lasts, a partition and its state are in memory, where NVMe offload keeps them in files."""
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
        if self.config.train.mixed_precision != "no":  # the optimizer's own copy has more bits than the model
            weights = adapter_saving.saved_weights(self.policy.lm, folder)
            for name, parameter in zip(self._order, self.trained(), strict=True):
                safe_set_full_fp32_param(parameter, weights[name].to(self.runtime.device, torch.float32))


def _is_narrow(weight: torch.Tensor) -> bool:
    return weight.dtype in (torch.bfloat16, torch.float16)


def _per_weight(value: Any) -> bool:
    """Whether what an optimizer keeps has an entry for each of a parameter's, and is no count of steps."""
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _held_weights(policy: Policy) -> tuple[int, int, str]:
    parameters = list(policy.parameters())
    return (
        sum(sharding.local_shard(p).numel() for p in parameters),
        sum(sharding.numel(p) for p in parameters),
        "weights",
    )


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that FSDP2 may have sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _part(weight: Any, whole: torch.Tensor) -> Any:
    """A tensor sharded as FSDP2 has sharded a weight of its shape."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(weight.device), weight.device_mesh, weight.placements)


class _Skeleton:
    """A policy as it was before a backend put hooks on its modules and took their weights away, without weights."""

    def __init__(self, policy: Policy) -> None:
        hollow = {id(p): nn.Parameter(torch.empty(0, device="meta"), requires_grad=False) for p in policy.parameters()}
        self._policy = copy.deepcopy(policy, dict(hollow))
        self._names = {name: hollow[id(p)] for name, p in policy.named_parameters()}

    def filled(self, weights: dict[str, torch.Tensor]) -> Policy:
        """A policy with these weights, by name."""
        return copy.deepcopy(self._policy, {id(hollow): weights[name] for name, hollow in self._names.items()})
