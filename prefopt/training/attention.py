"""Attention over rows that hold several packed segments.

There are four implementations with equal results: SDPA called once per segment (without a T x T mask), a dense mask, a
FlexAttention block mask, and varlen flash attention, which does not support shared prompts.

A segment is a trunk (the shared prompt) with one or two branches (the completions). A branch attends to the trunk and
to itself, not to the other branch.
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

Kind = Literal["per_segment", "dense", "additive", "blocks", "varlen"]

PER_SEGMENT = "prefopt_sdpa"  # the name under which transformers knows `attend_per_segment`
# Cost of a query-key product of SDPA under a mask, relative to that of a causal call (which computes half of the
# products). On the CPU it was measured between 0.4 and 0.6 for 128 to 1024 keys. On CUDA a mask rules out flash
# attention; 3 is an estimate.
MASKED_COST = {"cpu": 0.5, "cuda": 3.0}


def attention_kind(lm: PreTrainedModel) -> Kind:
    """How this model's attention handles segments; replaces its SDPA by `attend_per_segment` where possible.

    Calls without segments, such as those of evaluation and generation, still run transformers' SDPA. A model whose code
    depends on the name "sdpa" keeps its attention and gets a dense mask.
    """
    name = str(lm.config._attn_implementation)
    replaceable = lm._supports_attention_backend and lm._can_set_attn_implementation() and not _depends_on_sdpa_name(lm)
    if name == "sdpa" and replaceable:
        _register()
        lm.set_attn_implementation(PER_SEGMENT)
        name = PER_SEGMENT
    if name == PER_SEGMENT:
        return "per_segment"
    if name == "flex_attention":
        return "blocks"
    if "flash" in name:
        return "varlen"
    return "dense" if name == "sdpa" else "additive"


def _depends_on_sdpa_name(lm: PreTrainedModel) -> bool:
    """Whether a model's code compares the name of its attention with "sdpa", as models with sparse attention do."""
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

    AttentionInterface.register(PER_SEGMENT, attend_per_segment)
    AttentionMaskInterface.register(PER_SEGMENT, sdpa_mask)


@dataclass(frozen=True, eq=False)
class Rows:
    """The inputs of one batch in the forms that models need; each form is computed once for all layers and both models.

    Args:
        input_ids, attention_mask, position_ids: (R, T), on the model's device.
        segments: (U, 4) on the host, as in `data.layouts.Grid`; None where each row is one sequence.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    segments: np.ndarray | None
    _cache: dict[Any, Any] = field(default_factory=dict, init=False)

    def arguments(self, kind: Kind, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of a model's forward.

        Args: dtype: dtype of the model's weights.
        """
        inputs = {"input_ids": self.input_ids, "position_ids": self.position_ids}
        if self.segments is None:
            return inputs | {"attention_mask": self.attention_mask}
        return inputs | self._once((kind, dtype), lambda: getattr(self, f"_{kind}")(dtype))

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def _per_segment(self, dtype: torch.dtype) -> dict[str, Any]:
        # transformers passes a 4-D mask to the attention function unchanged; this placeholder, (R, 1, 1, 1), keeps it
        # from making a T x T mask, since `attend_per_segment` reads the segments instead
        mask = torch.ones(len(self.position_ids), 1, 1, 1, dtype=torch.bool, device=self.position_ids.device)
        return {"attention_mask": mask, "packed_rows": self}

    def _dense(self, dtype: torch.dtype) -> dict[str, Any]:
        return {"attention_mask": self.visible()[:, None]}  # (R, 1, T, T) bool

    def _additive(self, dtype: torch.dtype) -> dict[str, Any]:
        # (R, 1, T, T): 0 where i may attend to j, the dtype's minimum elsewhere, because eager attention adds the mask
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
        # if compiled, it never materialises a T x T mask; on the CPU compiling would cost more than the mask
        mask = create_block_mask(
            visible, rows, None, columns, columns, device=block.device, _compile=block.device.type == "cuda"
        )
        return {"attention_mask": mask}

    def _varlen(self, dtype: torch.dtype) -> dict[str, Any]:
        """Cumulative sequence lengths of a single batch row; padding at its end counts as one more sequence."""
        segments, positions = self._in_order(), self.position_ids.numel()
        edges = np.concatenate(([0], np.cumsum(segments[:, 1])))
        if edges[-1] < positions:
            edges = np.append(edges, positions)
        cumulative = torch.from_numpy(edges).to(self.position_ids.device, torch.int32)
        longest = int(np.diff(edges).max())
        return {
            "attention_mask": None,
            "cu_seq_lens_q": cumulative,
            "cu_seq_lens_k": cumulative,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def _in_order(self) -> np.ndarray:
        """The segments in the order of their positions."""
        assert self.segments is not None, "each row is one sequence"
        return self.segments[np.argsort(self.segments[:, 0])]

    def visible(self) -> torch.Tensor:
        """(R, T, T) bool: whether position i (second axis) may attend to position j (third)."""
        # causal, in the same segment, and j in the trunk or in the branch of i
        block, branch = self._block_and_branch()  # (R, T) each
        same = block[:, :, None] == block[:, None, :]
        trunk = (branch == 0)[:, None, :]
        return (same & (trunk | (branch[:, :, None] == branch[:, None, :]))).tril()

    def _block_and_branch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(segment, branch) of each position, (R, T) each; branch 0 is the trunk."""

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            block, branch = block_and_branch(self._in_order(), self.position_ids.numel())
            one, other = (
                torch.from_numpy(x).to(self.position_ids.device).view_as(self.position_ids) for x in (block, branch)
            )
            return one, other

        return self._once("block and branch", make)

    def spans(self) -> list[tuple[int, int]]:
        """All R * T positions split into spans for attention: (length, trunk) of each span, in order.

        A span with trunk 0 is a trunk with its first branch, and attends to itself only. A span with trunk t > 0 is a
        second branch, which also attends to the first t positions of the previous span. Trunk -1 marks padding.
        """

        def make() -> list[tuple[int, int]]:
            spans, at = [], 0
            for first, trunk, one, other in self._in_order().tolist():
                if first > at:
                    spans.append((first - at, -1))
                spans.append((trunk + one, 0))
                if other:
                    spans.append((other, trunk))
                at = first + trunk + one + other
            if at < self.position_ids.numel():
                spans.append((self.position_ids.numel() - at, -1))
            return spans

        return self._once("spans", make)

    def lower_right(self, queries: int, keys: int) -> torch.Tensor:
        """A lower-right causal mask, (1, 1, queries, keys): the last query sees all keys, the one before one less."""

        def make() -> torch.Tensor:
            mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=self.position_ids.device)
            return mask.tril_(keys - queries)

        return self._once((queries, keys), make)


def cheaper_as_causal(trunk: Any, branch: Any, device: str) -> Any:
    """Whether a second branch is cheaper at the end of a causal call than under a mask. Lengths may be arrays.

    For trunk length t and branch length b, a causal call over both costs (t + b)^2 / 2 products; a masked call costs
    b (t + b) products, each MASKED_COST times as expensive.
    """
    return trunk + branch < 2 * MASKED_COST.get(device, 1.0) * branch


def attend_per_segment(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed_rows: Rows | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA with transformers' signature; for packed rows, one call per segment, or two if it has a second branch.

    The trunk and the first branch of a segment are one causal call. The second branch is another call, whose queries
    attend to the trunk's keys and to their own. It uses a lower-right causal mask or, if that is cheaper, a causal call
    in which the trunk's queries are included and their outputs discarded.

    Args: query: (R, heads, T, head size); key, value: the same, possibly with fewer heads (GQA).
    Returns: (R, T, heads, head size), zero at padding.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packed_rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    rows, _, width, _ = query.shape
    spans = packed_rows.spans()
    # (R, heads, T, d) -> (R * T, heads, d), split into spans. One split has one concatenation as its gradient; a slice
    # per span would allocate a zero tensor of full size for each in the backward pass.
    q, k, v = (x.transpose(1, 2).flatten(0, 1).split([length for length, _ in spans]) for x in (query, key, value))
    out: list[torch.Tensor] = []
    for i, (length, trunk) in enumerate(spans):
        if trunk < 0:  # padding
            out.append(q[i].new_zeros(q[i].shape[:-1] + v[i].shape[-1:]))
            continue
        queries, keys, values, mask, dropped = q[i], k[i], v[i], None, 0
        if trunk:  # a second branch; its trunk is the beginning of the previous span
            keys, values = (torch.cat((x[i - 1][:trunk], x[i])) for x in (k, v))  # (t + b, heads, d)
            if cheaper_as_causal(trunk, length, query.device.type):
                queries, dropped = torch.cat((q[i - 1][:trunk], queries)), trunk
            else:
                mask = packed_rows.lower_right(length, trunk + length)
        # (length, heads, d) -> (1, heads, length, d)
        one_q, one_k, one_v = (x.transpose(0, 1)[None] for x in (queries, keys, values))
        out.append(sdpa_attention_forward(module, one_q, one_k, one_v, mask, **settings)[0][0, dropped:])
    return torch.cat(out).view(rows, width, *out[0].shape[1:]), None
