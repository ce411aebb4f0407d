"""What joins the processes: nothing, DDP, DeepSpeed's ZeRO or FSDP2. The loop speaks to all of them in these words.

Losses come in divided by global counts and multiplied by the number of processes, because every engine averages over
them. What a checkpoint holds is the same under each: whole weights, and the optimizer's state by parameter, so a run
may go on under another engine or with another number of processes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefopt.engine import adapters
from prefopt.errors import ConfigError

if TYPE_CHECKING:
    from prefopt.config import RunConfig
    from prefopt.engine.forward import Policy
    from prefopt.engine.runtime import Runtime

State = dict[int, dict[str, Any]]  # of an optimizer: what it keeps of each parameter, by the parameter's number


def make_engine(runtime: Runtime, config: RunConfig) -> Engine:
    """The engine that the launcher started.

    Raises: ConfigError for settings that it cannot keep, with what to use instead.
    """
    if runtime.engine.startswith("zero"):
        return ZeroEngine(runtime, config)
    return (Fsdp2Engine if runtime.engine == "fsdp2" else Engine)(runtime, config)


class Engine:
    """One process, or DDP: every process holds all weights and the whole state of the optimizer."""

    def __init__(self, runtime: Runtime, config: RunConfig) -> None:
        self.runtime, self.config = runtime, config
        self.accelerator = runtime.accelerator

    @property
    def shards(self) -> bool:
        """Whether a process holds a part of each weight only."""
        return False

    def prepare(self, policy: Policy, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """(the wrapped policy, the wrapped optimizer)."""
        self.policy = policy
        self.names = {id(p): name for name, p in policy.lm.named_parameters()}
        self.order = [self.names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        self.model, self.optimizer = self.accelerator.prepare(policy, optimizer)
        return self.model, self.optimizer

    # A step

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; gradients travel with the last one."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.accelerator.backward(loss)

    def clip(self, limit: float) -> float | None:
        """Clip the gradient and return its norm over all parameters; None where the step does both."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return float(self.accelerator.clip_grad_norm_(trained, limit))

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def step(self) -> tuple[bool, float | None]:
        """(whether a gradient scaler skipped it, the gradient's norm where `clip` did not know it)."""
        self.optimizer.step()
        skipped = bool(self.optimizer.step_was_skipped)
        self.optimizer.zero_grad(set_to_none=True)
        return skipped, None

    def give_up(self) -> None:
        """Forget the gradients of a step that is not taken."""
        self.optimizer.zero_grad(set_to_none=True)

    # Weights and state

    @contextlib.contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """While it lasts, the policy's language model can be called by itself, on every process. No training in it."""
        yield self.policy.lm

    def not_finite(self) -> str | None:
        """The name of a weight of the policy with a NaN or an infinity, or None; the same on every process."""
        mine = [name for name, p in self.policy.lm.named_parameters() if not bool(self._local(p).isfinite().all())]
        return next(iter(self.runtime.gather_objects(mine[:1])), None) if self.runtime.world > 1 else next(iter(mine), None)

    def _local(self, parameter: nn.Parameter) -> torch.Tensor:
        return parameter

    def weights(self) -> dict[str, torch.Tensor] | None:
        """All weights of the policy as they are trained, by name, on rank 0; None where the model has them itself."""
        return None

    def optimizer_state(self) -> State:
        """What the optimizer keeps, by the number of the parameter; on rank 0 it is whole."""
        return dict(self.optimizer.state_dict()["state"])

    def load_optimizer_state(self, state: State) -> None:
        """Undo `optimizer_state`; the policy holds the weights of the same checkpoint."""
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


class Fsdp2Engine(Engine):
    """FSDP2 of accelerate: every weight is a DTensor, of which each process holds some rows."""

    def __init__(self, runtime: Runtime, config: RunConfig) -> None:
        super().__init__(runtime, config)
        mixed = config.train.mixed_precision
        if mixed == "fp16":
            raise ConfigError(
                "train.mixed_precision: 'fp16' is not supported under fsdp2; expected bf16 or no (or another engine)"
            )
        plugin: Any = self.accelerator.state.fsdp_plugin
        if mixed == "bf16":
            from torch.distributed.fsdp import MixedPrecisionPolicy

            # accelerate's own choice would round the statistics to bfloat16 on their way out
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
            )

    @property
    def shards(self) -> bool:
        return True

    @contextlib.contextmanager
    def whole(self) -> Iterator[nn.Module]:
        from torch.distributed.fsdp import FSDPModule

        modules = [m for m in self.model.modules() if isinstance(m, FSDPModule)]
        for module in modules:
            module.unshard()
        plain = _hookless(self.policy.lm)
        try:
            yield plain
        finally:
            for module in modules:
                module.reshard()

    def _local(self, parameter: nn.Parameter) -> torch.Tensor:
        return parameter.to_local() if hasattr(parameter, "to_local") else parameter

    def weights(self) -> dict[str, torch.Tensor] | None:
        return {name: self._full(value) for name, value in self.policy.lm.state_dict().items()}

    def _full(self, value: Any) -> torch.Tensor:
        full = value.full_tensor() if hasattr(value, "full_tensor") else value
        return full.cpu() if self.runtime.is_main else full.new_empty(0)

    def optimizer_state(self) -> State:
        found = super().optimizer_state()
        return {
            number: {k: self._full(v) if isinstance(v, torch.Tensor) else v for k, v in entries.items()}
            for number, entries in found.items()
        }

    def load_optimizer_state(self, state: State) -> None:
        from torch.distributed.tensor import distribute_tensor

        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

        def local(parameter: Any, value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
                return value
            whole = value.to(parameter.device)
            return distribute_tensor(whole, parameter.device_mesh, parameter.placements)

        sharded = {n: {k: local(parameters[n], v) for k, v in entries.items()} for n, entries in state.items()}
        super().load_optimizer_state(sharded)


class ZeroEngine(Engine):
    """DeepSpeed's ZeRO: stage 1 shards the optimizer's state, 2 the gradients too, 3 the weights too."""

    def __init__(self, runtime: Runtime, config: RunConfig) -> None:
        super().__init__(runtime, config)
        self.stage = int(runtime.engine[-1])
        if config.train.mixed_precision == "fp16":
            raise ConfigError(
                f"train.mixed_precision: 'fp16' is not supported under {runtime.engine}; expected bf16 or no "
                "(or another engine)"
            )
        settings = runtime.deepspeed_settings
        settings["train_micro_batch_size_per_gpu"] = config.train.micro_batch  # of its own counts only
        settings["gradient_accumulation_steps"] = 1  # the loop's own
        settings["gradient_clipping"] = config.optim.clip  # left out, accelerate would put 1.0 there
        settings["zero_allow_untested_optimizer"] = True
        settings.setdefault("steps_per_print", 10**9)

    @property
    def shards(self) -> bool:
        return self.stage == 3

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss)

    def clip(self, limit: float) -> float | None:
        return None

    def step(self) -> tuple[bool, float | None]:
        self.model.step()
        norm = self.model.get_global_grad_norm()
        return False, math.nan if norm is None else float(norm)

    def give_up(self) -> None:
        pass  # what was accumulated dies with the process, which leaves now

    @contextlib.contextmanager
    def whole(self) -> Iterator[nn.Module]:
        if self.stage < 3:
            yield self.policy.lm
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.policy.lm.parameters())):
            yield _hookless(self.policy.lm)

    def _local(self, parameter: Any) -> torch.Tensor:
        return getattr(parameter, "ds_tensor", parameter)

    def weights(self) -> dict[str, torch.Tensor] | None:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        dtype = getattr(torch, self.config.model.dtype)
        parameters = dict(self.policy.lm.named_parameters())
        found: dict[str, torch.Tensor] = {}
        for name, parameter in parameters.items():
            full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if full is None:
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                    full = parameter.detach().clone()
            if self.runtime.is_main:
                kept = torch.float32 if adapters.has_adapter(self.policy.lm) and parameter.requires_grad else dtype
                found[name] = full.to(kept).cpu().clone()
        if self.runtime.is_main:
            by_identity = {id(p): name for name, p in parameters.items()}
            for name, value in self.policy.lm.state_dict(keep_vars=True).items():
                if name not in found:  # a tied weight, or a buffer
                    found[name] = found[by_identity[id(value)]] if id(value) in by_identity else value.detach().cpu()
        return found

    # The optimizer is over flat partitions; what it keeps is addressed by the parameters that they are made of.

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return self.model.optimizer.optimizer

    def _trained(self) -> list[nn.Parameter]:
        parameters = dict(self.policy.lm.named_parameters())
        return [parameters[name] for name in self.order]

    def _kept(self) -> tuple[list[str], dict[str, Any]]:
        """(names of what is kept per weight, what is kept once for all), the same on every process."""
        per_weight: set[str] = set()
        once: dict[str, Any] = {}
        for flat, entries in self._inner.state.items():
            for name, value in entries.items():
                if isinstance(value, torch.Tensor) and value.numel() == flat.numel() and value.ndim > 0:
                    per_weight.add(name)
                else:
                    once[name] = value
        names = {name for part in self.runtime.gather_objects([sorted(per_weight)]) for name in part}
        return sorted(names), once

    def optimizer_state(self) -> State:
        from deepspeed.utils import safe_get_full_optimizer_state

        names, once = self._kept()
        state: State = {}
        for number, parameter in enumerate(self._trained()):
            entries = {name: safe_get_full_optimizer_state(parameter, name) for name in names}
            if self.runtime.is_main and (names or once):
                state[number] = {name: value.cpu().clone() for name, value in entries.items()} | once
        return state

    def load_optimizer_state(self, state: State) -> None:
        """Also gives the optimizer's own copy of the weights what 16 bits could not hold."""
        if state:
            template = {k: v for k, v in state[0].items()}
            shape = tuple(state[0][next(k for k, v in template.items() if _per_weight(v))].shape) if any(
                _per_weight(v) for v in template.values()
            ) else ()
            for group in self._inner.param_groups:
                for flat in group["params"]:
                    self._inner.state[flat] = {
                        name: torch.zeros_like(flat) if _per_weight(value) and tuple(value.shape) == shape else value
                        for name, value in template.items()
                    }
            self._remap()
        from deepspeed.utils import safe_set_full_optimizer_state

        for number, parameter in enumerate(self._trained()):
            for name, value in state.get(number, {}).items():
                if _per_weight(value):
                    safe_set_full_optimizer_state(parameter, value.to(self.runtime.device, torch.float32), name)

    def _remap(self) -> None:
        """Tell DeepSpeed where the state is, that it looks for at its own steps only."""
        optimizer: Any = self.model.optimizer
        if self.stage < 3:
            optimizer._link_all_hp_params()

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """The optimizer's own copy of the trained weights, in float32."""
        from deepspeed.utils import safe_set_full_fp32_param

        for name, parameter in zip(self.order, self._trained(), strict=True):
            safe_set_full_fp32_param(parameter, weights[name].to(self.runtime.device, torch.float32))


def _per_weight(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _hookless(lm: nn.Module) -> nn.Module:
    """A model over the same tensors as `lm`, without the hooks and classes that an engine has put on its modules."""
    import copy

    memo: dict[int, Any] = {}
    for tensor in (*lm.parameters(), *lm.buffers()):
        memo[id(tensor)] = tensor.detach()
    plain = copy.deepcopy(lm, memo)
    for module in plain.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return plain


def _names(found: Sequence[str]) -> str:
    return ", ".join(found)
