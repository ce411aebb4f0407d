"""What a model's attention is told of a batch whose rows hold more than one sequence.

Four ways, all equal: SDPA unit by unit (no mask of T x T anywhere), a dense mask, a FlexAttention block mask, and
varlen flash attention, which knows no shared prompts.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from prefopt.data.layouts import block_and_branch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["by_unit", "dense", "additive", "blocks", "varlen"]

BY_UNIT = "prefopt_sdpa"  # the name under which transformers knows `attend_by_unit`
# What SDPA takes for a product of query and key under a mask, in those of a causal call, of which it computes half. On
# the CPU between 0.4 and 0.6 for 128 to 1024 keys; on CUDA a mask keeps flash attention out, and 3 is a guess.
MASKED = {"cpu": 0.5, "cuda": 3.0}


def attention_kind(lm: PreTrainedModel) -> Kind:
    """How this model's attention is told of units; its SDPA is replaced by one that goes unit by unit if it can be.

    The replacement is that of the stock SDPA in all calls without units: evaluation and generation are untouched. A
    model that does something else under any name but "sdpa" keeps that name.
    """
    name = str(lm.config._attn_implementation)
    replaceable = lm._supports_attention_backend and lm._can_set_attn_implementation() and not _asks_for_sdpa(lm)
    if name == "sdpa" and replaceable:
        _register()
        lm.set_attn_implementation(BY_UNIT)
        name = BY_UNIT
    if name == BY_UNIT:
        return "by_unit"
    if name == "flex_attention":
        return "blocks"
    if "flash" in name:
        return "varlen"
    return "dense" if name == "sdpa" else "additive"


def _asks_for_sdpa(lm: PreTrainedModel) -> bool:
    """Whether the code of a model compares the name of its attention with "sdpa", as sparse attention does."""
    for name in {type(module).__module__ for module in lm.modules()} - {"torch.nn"}:
        try:
            source = inspect.getsource(sys.modules[name])
        except (KeyError, OSError, TypeError):
            continue
        if re.search(r"_attn_implementation\b.*[\"']sdpa[\"']", source):
            return True
    return False


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(BY_UNIT, attend_by_unit)
    AttentionMaskInterface.register(BY_UNIT, sdpa_mask)


@dataclass(frozen=True, eq=False)
class Rows:
    """The inputs of one batch in the forms that models take, each made at most once, for all layers and models.

    Args:
        input_ids, attention_mask, positions: (R, T), on the model's device.
        units: (U, 4) on the host, as in `data.layouts.Grid`; None where each row is one sequence.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    positions: torch.Tensor
    units: np.ndarray | None
    _made: dict[Any, Any] = field(default_factory=dict, init=False)

    def arguments(self, kind: Kind, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of a model's forward.

        Args: dtype: of the model's weights.
        """
        inputs = {"input_ids": self.input_ids, "position_ids": self.positions}
        if self.units is None:
            return inputs | {"attention_mask": self.attention_mask}
        return inputs | self._once((kind, dtype), lambda: getattr(self, f"_{kind}")(dtype))

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _by_unit(self, dtype: torch.dtype) -> dict[str, Any]:
        # a mask of four dimensions is passed on as it is; `attend_by_unit` reads the units instead of it
        mask = torch.ones(len(self.positions), 1, 1, 1, dtype=torch.bool, device=self.positions.device)
        return {"attention_mask": mask, "rows_of_units": self}

    def _dense(self, dtype: torch.dtype) -> dict[str, Any]:
        return {"attention_mask": self.visible()[:, None]}

    def _additive(self, dtype: torch.dtype) -> dict[str, Any]:
        visible = self.visible()[:, None]
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return {"attention_mask": mask.masked_fill_(~visible, torch.finfo(dtype).min)}

    def _blocks(self, dtype: torch.dtype) -> dict[str, Any]:
        from torch.nn.attention.flex_attention import create_block_mask

        block, branch = self._block_and_branch()

        def visible(row: Any, head: Any, i: Any, j: Any) -> Any:
            same = (j <= i) & (block[row, i] == block[row, j])
            return same & ((branch[row, j] == 0) | (branch[row, i] == branch[row, j]))

        rows, columns = block.shape
        # compiled, it never holds a mask of T x T; on the CPU compiling costs more than the mask
        mask = create_block_mask(
            visible, rows, None, columns, columns, device=block.device, _compile=block.device.type == "cuda"
        )
        return {"attention_mask": mask}

    def _varlen(self, dtype: torch.dtype) -> dict[str, Any]:
        """One row, which holds whole sequences only; cells of padding at its end are one more sequence."""
        units, cells = self._in_order(), self.positions.numel()
        edges = np.concatenate(([0], np.cumsum(units[:, 1])))
        if edges[-1] < cells:
            edges = np.append(edges, cells)
        cumulative = torch.from_numpy(edges).to(self.positions.device, torch.int32)
        longest = int(np.diff(edges).max())
        return {
            "attention_mask": None,
            "cu_seq_lens_q": cumulative,
            "cu_seq_lens_k": cumulative,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def _in_order(self) -> np.ndarray:
        assert self.units is not None, "each row is one sequence"
        return self.units[np.argsort(self.units[:, 0])]

    def visible(self) -> torch.Tensor:
        """(R, T, T) bool: whether cell i (second axis) may attend to cell j (third)."""
        block, branch = self._block_and_branch()
        same = block[:, :, None] == block[:, None, :]
        trunk = (branch == 0)[:, None, :]
        return (same & (trunk | (branch[:, :, None] == branch[:, None, :]))).tril()

    def _block_and_branch(self) -> tuple[torch.Tensor, torch.Tensor]:
        def make() -> tuple[torch.Tensor, torch.Tensor]:
            block, branch = block_and_branch(self._in_order(), self.positions.numel())
            one, other = (
                torch.from_numpy(x).to(self.positions.device).view_as(self.positions) for x in (block, branch)
            )
            return one, other

        return self._once("block and branch", make)

    def pieces(self) -> list[tuple[int, int]]:
        """The line of all R * T cells cut for attention: (cells, trunk) of each piece, in order.

        A piece with trunk 0 sees itself. One with a trunk sees as many cells at the start of the piece before it as
        well. -1 stands for padding.
        """

        def make() -> list[tuple[int, int]]:
            pieces, at = [], 0
            for first, trunk, one, other in self._in_order().tolist():
                if first > at:
                    pieces.append((first - at, -1))
                pieces.append((trunk + one, 0))
                if other:
                    pieces.append((other, trunk))
                at = first + trunk + one + other
            if at < self.positions.numel():
                pieces.append((self.positions.numel() - at, -1))
            return pieces

        return self._once("pieces", make)

    def lower_right(self, queries: int, keys: int) -> torch.Tensor:
        """(1, 1, queries, keys): the last query sees all keys, each one before it one key less."""

        def make() -> torch.Tensor:
            mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=self.positions.device)
            return mask.tril_(keys - queries)

        return self._once((queries, keys), make)


def ends_a_square(trunk: Any, cells: Any, device: str) -> Any:
    """Whether a unit's second branch is cheaper as the end of a causal call than under a mask; numbers or arrays."""
    return trunk + cells < 2 * MASKED.get(device, 1.0) * cells


def attend_by_unit(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    rows_of_units: Rows | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA as transformers calls it, and unit by unit where it is told of units.

    The trunk and the first branch of a unit are one causal call. The second branch is another, whose queries see the
    trunk's keys and their own: under a mask that hides a triangle, or, where that is cheaper, as the end of a causal
    call with the trunk's queries, whose outcome is dropped.

    Args: query: (R, heads, T, head size); key, value: the same, maybe of fewer heads.
    Returns: (R, T, heads, head size), zero in cells of padding.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if rows_of_units is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    rows, _, width, _ = query.shape
    pieces = rows_of_units.pieces()
    # one split, whose gradient is one concatenation: a slice for each piece would cost a zero tensor of full size
    q, k, v = (x.transpose(1, 2).flatten(0, 1).split([n for n, _ in pieces]) for x in (query, key, value))
    out: list[torch.Tensor] = []
    for i, (cells, trunk) in enumerate(pieces):
        if trunk < 0:
            out.append(q[i].new_zeros(q[i].shape[:-1] + v[i].shape[-1:]))
            continue
        queries, keys, values, mask, dropped = q[i], k[i], v[i], None, 0
        if trunk:
            keys, values = (torch.cat((x[i - 1][:trunk], x[i])) for x in (k, v))
            if ends_a_square(trunk, cells, query.device.type):
                queries, dropped = torch.cat((q[i - 1][:trunk], queries)), trunk
            else:
                mask = rows_of_units.lower_right(cells, trunk + cells)
        one, seen, read = (x.transpose(0, 1)[None] for x in (queries, keys, values))
        out.append(sdpa_attention_forward(module, one, seen, read, mask, **settings)[0][0, dropped:])
    return torch.cat(out).view(rows, width, *out[0].shape[1:]), None
