"""A reference that follows the policy during training: an exponential moving average, or a copy every few steps."""

from __future__ import annotations

import torch
from torch import nn

from prefopt.errors import ConfigError
from prefopt.training import adapters, sharding
from prefopt.training.forward import PolicyWithReference


class MovingReference:
    """A live reference that is synchronised with the policy: `ref = weight * policy + (1 - weight) * ref`.

    With LoRA it is the frozen snapshot of the adapter that is updated.

    Args: policy: holds both models. weight: of the policy, above 0, at most 1.
    Raises: ConfigError when the two models differ in architecture.
    Reference: TR-DPO, Gorbatovski et al., Learn Your Reference Model for Real Good Alignment, arXiv 2404.09656: the
        soft update (weight below 1) and the hard one (1).
    """

    def __init__(self, policy: PolicyWithReference, weight: float) -> None:
        self.weight, self._policy = weight, policy
        if policy.reference is None:
            named = adapters.snapshot_pairs(policy.lm)
        else:
            mine, other = (dict(lm.named_parameters()) for lm in (policy.lm, policy.reference))
            if {n: sharding.shape(p) for n, p in mine.items()} != {n: sharding.shape(p) for n, p in other.items()}:
                raise ConfigError(
                    "reference.sync_every: the reference is another architecture than the policy, expected one whose "
                    "weights can be mixed with the policy's (leave reference.path out)"
                )
            named = {name: (mine[name], other[name]) for name in mine}
        # by name, because a sharding backend replaces the parameters themselves
        names = {id(p): name for name, p in policy.named_parameters()}
        self._names = {name: (names[id(mine)], names[id(other)]) for name, (mine, other) in named.items()}

    def _pairs(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """(the policy's parameter, the reference's), by name."""
        parameters = self._policy.state_dict(keep_vars=True)  # makes FSDP2 reshard what a forward pass has gathered
        return {name: (parameters[mine], parameters[other]) for name, (mine, other) in self._names.items()}

    def weights(self) -> dict[str, nn.Parameter]:
        """The reference's parameters, by name."""
        return {name: reference for name, (_, reference) in self._pairs().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move every reference parameter towards the policy's, in place."""
        for policy, reference in self._pairs().values():
            for mine, other in zip(sharding.local_copies(policy), sharding.local_copies(reference), strict=True):
                if self.weight == 1.0:
                    other.copy_(mine)
                else:
                    other.lerp_(mine.to(other.dtype), self.weight)
