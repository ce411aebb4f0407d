"""The layout of each micro-batch: of those that are exact for this model, the one with the lowest predicted time.

The choice depends on the lengths in the micro-batch, the model's shape and the constants below, but not on measured
time, so a resumed run makes the same choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from prefopt.data.collate import collate
from prefopt.data.layouts import LAYOUTS, PADDED, rows_of, segments_of, shares_prompts, width_of
from prefopt.errors import ConfigError
from prefopt.settings import RunConfig
from prefopt.training import adapters, quantized, sharding
from prefopt.training.attention import MASKED_COST, Kind, cheaper_as_causal
from prefopt.training.forward import Policy, loss_token_states, to_device
from prefopt.training.model_checks import vocabulary_size
from prefopt.types import EncodedPair, Needs

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MARGIN = 0.92  # another layout is chosen only if its predicted time is below this fraction of the padded layout's


# Cost model ---------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """Amounts of work of a forward and backward pass; or, for a device, how much of each it does per second.

    Args:
        linear: multiply-adds of the backbone's matrices in the forward pass.
        causal: query-key products times width in causal SDPA calls.
        masked: query-key products times width in SDPA calls with a mask.
        mask: entries of (R, T, T) masks that are created.
        calls: SDPA calls, including slicing the row and concatenating the outputs.
    """

    linear: float
    causal: float
    masked: float
    mask: float
    calls: float


# CPU: for one thread of a server, fitted by benchmarks/layouts.py to passes of a small Llama. CUDA: estimates that
# favour the padded layout, with expensive calls and masks and cheap positions.
SPEEDS = {
    "cpu": Work(linear=8.7e9, causal=3.2e9, masked=6.3e9, mask=2e7, calls=3300),
    "cuda": Work(linear=1e14, causal=1e14, masked=1e14 / MASKED_COST["cuda"], mask=1e10, calls=3000),
}
_BLOCK = 128  # side of FlexAttention's blocks, in positions


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that determine the cost of a layout.

    Args:
        layers: number of attention layers.
        width: number of heads times head size.
        weights: entries of the backbone's matrices without the embedding, which is the number of multiply-adds per
            position of a forward pass.
    """

    layers: int
    width: int
    weights: int


def shape_of(lm: PreTrainedModel) -> Shape:
    """The shape of a model, from its config and weights."""
    config: Any = lm.config.get_text_config()
    heads, head = getattr(config, "num_attention_heads", 1), getattr(config, "head_dim", None)
    width = heads * head if head else config.hidden_size
    embedding = lm.get_input_embeddings().weight
    weights = sum(sharding.numel(p) for p in lm.base_model.parameters() if sharding.ndim(p) >= 2 and p is not embedding)
    return Shape(config.num_hidden_layers, width, weights)


def work(parts: np.ndarray, layout: str, kind: Kind, shape: Shape, device: str) -> Work:
    """The work of a forward and backward pass of the backbone over these sequences.

    The head is not included, because it is applied to loss tokens only, which are the same in every layout.

    Args:
        parts: (S, 2) lengths of prompt and completion of each sequence, as in `data.layouts.segments_of`.
        kind: how attention handles segments.
    """
    segments = segments_of(parts, layout)
    rows = rows_of(segments.sum(1), layout, one_row=kind in ONE_ROW)
    width = width_of(segments.sum(1), rows)
    positions = len(rows) * width  # R * T
    causal, masked, mask, calls = 0.0, 0.0, 0.0, 1
    if layout == PADDED:
        causal = positions * width / 2  # R T^2 / 2
    elif kind in ("dense", "additive"):
        masked = mask = float(positions * width)  # R T^2
    else:
        # trunk and first branch: a causal call, (t + b1)^2 / 2 products; second branch: another causal call with the
        # trunk, (t + b2)^2 / 2, or b2 queries by t + b2 keys under a mask
        trunk, one, other = segments.astype(np.float64).T  # lengths, (U,) each
        square = cheaper_as_causal(trunk, other, device)
        causal = float(((trunk + one) ** 2).sum() + ((trunk + other) ** 2)[square].sum()) / 2
        masked = float((other * (trunk + other))[~square].sum())
        if kind == "per_segment":
            calls = len(segments) + int((other > 0).sum())
        elif kind == "blocks":
            # FlexAttention computes blocks on the boundary of the mask in full
            causal, mask = causal + positions * _BLOCK, (positions / _BLOCK) ** 2
    per_product = shape.layers * shape.width
    return Work(positions * shape.weights, causal * per_product, masked * per_product, mask, calls * shape.layers)


def seconds(amounts: Work, speeds: Work) -> float:
    """The predicted time of this work."""
    return sum(amount / speed for amount, speed in zip(amounts, speeds, strict=True))


# Kinds of attention whose cost does not depend on the length of a batch row: all sequences can share a single row.
ONE_ROW: tuple[Kind, ...] = ("per_segment", "blocks", "varlen")


@dataclass(frozen=True)
class Layouts:
    """Chooses the layout of each micro-batch.

    Args:
        allowed: layouts to choose from, the simplest first; if there is only one, it is always used.
        kind: the policy's kind of attention, or the reference's if only the reference needs a mask.
        device: `cpu` or `cuda`.
        longest: batches with a longer sequence use the padded layout, because other layouts ignore a sliding window.
    """

    allowed: tuple[str, ...]
    kind: Kind
    shape: Shape
    device: str
    longest: int | None = None

    def of(self, pairs: Sequence[EncodedPair], need_rejected: bool) -> str:
        """The layout for these pairs."""
        if not pairs or self.allowed == (PADDED,):
            return PADDED
        parts = [(len(pair.prompt_ids), len(pair.chosen_ids)) for pair in pairs]
        if need_rejected:
            parts += [(len(pair.prompt_ids), len(pair.rejected_ids or ())) for pair in pairs]
        table = np.array(parts, np.int64)
        if self.longest is not None and table.sum(1).max() > self.longest:
            return PADDED
        if len(self.allowed) == 1:
            return self.allowed[0]
        speeds = SPEEDS.get(self.device, SPEEDS["cuda"])
        times = {
            layout: seconds(work(table, layout, self.kind, self.shape, self.device), speeds) for layout in self.allowed
        }
        best = min(times, key=times.__getitem__)
        # predictions are approximate, so a small advantage over the padded layout is ignored
        return best if PADDED not in times or times[best] < MARGIN * times[PADDED] else PADDED

    def settings(self, layout: str) -> dict[str, Any]:
        """The arguments of `collate` other than the pairs."""
        return collate_settings(self.kind, layout)


def collate_settings(kind: Kind, layout: str) -> dict[str, Any]:
    """The arguments of `collate` for a layout under this kind of attention."""
    if layout == PADDED:
        return {"layout": layout}
    rounded = {"pad_to_multiple_of": _BLOCK} if kind == "blocks" else {}
    return {"layout": layout, "one_row": kind in ONE_ROW, **rounded}


# Exactness ---------------------------------------------------------------------------------------------------------


def check_settings(config: RunConfig, device: torch.device) -> None:
    """Raises: ConfigError for an attention implementation that has no backward pass on this device."""
    if config.model.attention == "flex_attention" and device.type == "cpu":
        raise ConfigError(
            "model.attention: found 'flex_attention', which has no backward pass on the CPU; expected sdpa or eager"
        )


def check_architecture(config: RunConfig, architecture: PretrainedConfig, key: str = "model.path") -> None:
    """Check a layout that is requested by name, before weights are loaded. Raises: ConfigError if it is not exact."""
    layout = config.train.layout
    if layout in ("auto", PADDED):
        return
    reason = _never_exact(architecture)
    window = _window(architecture)
    if reason is None and window is not None and config.data.max_length > window:
        reason = f"its attention window is {window} tokens, sequences have up to {config.data.max_length}"
        reason += f" (--data.max_length {window} truncates them to the window)"
    if reason is not None:
        raise ConfigError(f"train.layout: '{layout}' is not exact for {key}: {reason}; expected auto or padded")


def choose_layouts(
    config: RunConfig,
    policy: Policy,
    device: torch.device,
    run_inside_forward: Callable[[Callable[[], Any]], Any] = lambda run: run(),
) -> tuple[Layouts, str | None]:
    """The layouts that are exact for policy and reference, and a log line about those that are not, or None.

    Args: run_inside_forward: calls a function where a sharded policy can be called, see `Backend.run_inside_forward`.
    Raises: ConfigError when the requested layout is not exact.
    """
    requested, kind = config.train.layout, policy.attention
    wanted = possible_layouts(config.method.needs, kind) if requested == "auto" else (requested,)
    both = {"the policy": (adapters.base_of(policy.lm), kind)}
    if policy.reference is not None:
        both["the reference"] = (policy.reference, policy.reference_attention)
    inexact: dict[str, str] = {}
    for layout in wanted:
        for who, (lm, how) in both.items():
            if layout == PADDED or layout in inexact:
                continue
            if config.lora.dropout and shares_prompts(layout):  # if requested by name, the settings reject it
                reason: str | None = "lora.dropout would drop the same entries of a shared prompt for both completions"
            else:
                reason = run_inside_forward(partial(_inexact, lm, how, layout, device, config.train.mixed_precision))
            if reason is not None:
                inexact[layout] = f"{who} ({type(lm).__name__}): {reason}"
    if requested in inexact:
        raise ConfigError(f"train.layout: '{requested}' is not exact for {inexact[requested]}; expected auto or padded")
    windows = [w for lm, _ in both.values() if (w := _window(lm.config)) is not None]
    layouts = Layouts(
        allowed=tuple(layout for layout in wanted if layout not in inexact),
        # if the reference needs a dense mask, a single row of all N tokens would need an (N, N) mask
        kind=next((how for _, how in both.values() if how not in ONE_ROW), kind),
        shape=shape_of(adapters.base_of(policy.lm)),
        device=device.type,
        longest=min(windows, default=None),
    )
    return layouts, _note(inexact, layouts, config.data.max_length)


def possible_layouts(needs: Needs, kind: Kind) -> tuple[str, ...]:
    """The layouts that apply to this method and this kind of attention."""
    shared = needs.rows == "pairs" and kind != "varlen"
    return tuple(layout for layout in LAYOUTS if shared or not shares_prompts(layout))


def _note(inexact: dict[str, str], layouts: Layouts, max_length: int) -> str | None:
    """The log line of `choose_layouts`."""
    if inexact:
        reasons = list(inexact.values())
        what = "padded rows only" if layouts.allowed == (PADDED,) else f"not {' or '.join(inexact)}"
        return f"layout: {what}, for {reasons[0]}"
    if layouts.longest is not None and layouts.longest < max_length and layouts.allowed != (PADDED,):
        return (
            f"layout: batches with sequences of more than {layouts.longest} tokens are padded: the model's attention "
            "has a sliding window"
        )
    return None


def _never_exact(config: PretrainedConfig) -> str | None:
    """Why only the padded layout can be exact for this architecture, from its config; None if others may be exact."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text: Any = config.get_text_config()
    if getattr(text, "index_topk", None) or getattr(text, "index_topk_blocks", None):
        return "its sparse attention ranks the keys of the whole row"
    attention = {"full_attention", "sliding_attention", "chunked_attention"}
    others = sorted(set(getattr(text, "layer_types", None) or ()) - attention)
    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if others or getattr(cls, "_is_stateful", False):
        kind = f"layers of type {', '.join(others)}" if others else "state-space or recurrent layers"
        return f"{kind} carry state along the whole row"
    if getattr(text, "attn_temperature_tuning", False):
        return "it scales attention by the position in the row"
    if text.model_type in ("bloom", "mpt") or getattr(text, "alibi", False):
        return "ALiBi measures distances along the row"
    if _window(config) is not None and not getattr(cls, "_supports_attention_backend", True):
        return "its attention counts a window along the row"
    return None


def _window(config: PretrainedConfig) -> int | None:
    """The smallest attention window of any layer in tokens, or None for full attention."""
    text: Any = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ("sliding_attention", "chunked_attention"))
    named = {"sliding_window": "sliding_attention", "window_size": "sliding_attention"}
    named["attention_chunk_size"] = "chunked_attention"
    found = [getattr(text, name, None) for name, kind in named.items() if kind in kinds]
    return min((value for value in found if isinstance(value, int)), default=None)


def _inexact(lm: PreTrainedModel, kind: Kind, layout: str, device: torch.device, mixed: str) -> str | None:
    """Why this layout is not exact for this model, or None if it is.

    First the config is checked, then hidden states of a few short pairs are compared with those of the padded layout.
    """
    reason = _never_exact(lm.config)
    if reason is not None:
        return reason
    # flash attention supports 16 bits only; others are compared in the weights' dtype, which has less rounding error
    own = {"no": lm.dtype, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed]
    precision = own if kind == "varlen" else lm.dtype
    tolerance = max(_TOLERANCE[precision], _TOLERANCE[quantized.precision(lm)])
    plain = probe_states(
        lm, kind, PADDED, device, precision
    )  # outside of `try`: an error here is not due to the layout
    try:
        gap = relative_gap(plain, probe_states(lm, kind, layout, device, precision))
    except Exception as error:
        return f"its forward does not support the layout ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
    return None if gap <= tolerance else f"hidden states differ from those of padded rows by {gap:.1g}"


# Largest relative difference of a hidden state; transformers computes norms in float32 for any dtype.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def relative_gap(plain: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of a hidden state, relative to `plain`; 1 if a value is NaN."""
    return float((plain - other).norm(dim=-1).div(plain.norm(dim=-1).clamp(min=1e-12)).nan_to_num(nan=1.0).max())


@torch.no_grad()
def probe_states(
    lm: PreTrainedModel, kind: Kind, layout: str, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Hidden states of the loss tokens of a few short random pairs, (N, H) in float64."""
    generator = np.random.default_rng(0)
    vocab = vocabulary_size(lm.config)

    def ids(length: int) -> list[int]:
        return generator.integers(0, vocab, length).tolist()

    sizes = ((1, 3, 2), (4, 2, 3), (2, 1, 1))
    pairs = [EncodedPair(ids(p), ids(c), ids(r), [True] * c, [True] * r) for p, c, r in sizes]
    batch = to_device(collate(pairs, pad_id=0, **collate_settings(kind, layout)), device)
    training = lm.training
    lm.eval()
    try:
        with torch.autocast(device.type, dtype, enabled=dtype != lm.dtype):
            return loss_token_states(lm, kind, batch).double()
    finally:
        lm.train(training)
