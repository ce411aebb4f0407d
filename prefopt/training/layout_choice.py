"""Which layout a micro-batch takes: those that are exact for this model, and of them the one expected to be fastest.

The choice is a function of the lengths in the micro-batch, the model's shape and the constants below, never of a clock:
a continued run makes the same choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from prefopt.data.collate import collate
from prefopt.data.layouts import LAYOUTS, PADDED, rows_of, shares_prompts, units_of, width_of
from prefopt.errors import ConfigError
from prefopt.settings import RunConfig
from prefopt.training import adapters, quantized, sharding
from prefopt.training.attention import MASKED, Kind, ends_a_square
from prefopt.training.forward import Policy, scored_states, to_device
from prefopt.training.model_checks import vocabulary
from prefopt.types import EncodedPair, Needs

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MARGIN = 0.92  # of the padded layout's predicted time: what another one must stay below to be chosen


# What it costs ------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What a forward and backward pass does, or what a device does of it in a second.

    Args:
        linear: multiply-adds of the backbone's matrices, counted forward.
        causal: products of a query and a key, times width, in SDPA that is told it is causal.
        masked: the same in SDPA under a mask.
        mask: cells of a (R, T, T) mask that is made.
        calls: of SDPA, each with taking its piece out of the row and putting it back.
    """

    linear: float
    causal: float
    masked: float
    mask: float
    calls: float


# The CPU's, of one thread of a server, are fitted by benchmarks/layouts.py to passes of a small Llama. CUDA's are
# guesses, set against the layouts that they could choose wrongly: calls and masks dear, cells cheap.
SPEEDS = {
    "cpu": Work(linear=8.7e9, causal=3.2e9, masked=6.3e9, mask=2e7, calls=3300),
    "cuda": Work(linear=1e14, causal=1e14, masked=1e14 / MASKED["cuda"], mask=1e10, calls=3000),
}
_BLOCK = 128  # cells of a side of FlexAttention's blocks


@dataclass(frozen=True)
class Shape:
    """A model as far as the cost of a layout depends on it.

    Args:
        layers: how many attend.
        width: size of the heads of one layer together.
        weights: entries of the backbone's matrices, without the embedding: multiply-adds per cell, forward.
    """

    layers: int
    width: int
    weights: int


def shape_of(lm: PreTrainedModel) -> Shape:
    """The shape of a model."""
    config: Any = lm.config.get_text_config()
    heads, head = getattr(config, "num_attention_heads", 1), getattr(config, "head_dim", None)
    width = heads * head if head else config.hidden_size
    embedding = lm.get_input_embeddings().weight
    weights = sum(sharding.numel(p) for p in lm.base_model.parameters() if sharding.ndim(p) >= 2 and p is not embedding)
    return Shape(config.num_hidden_layers, width, weights)


def work(parts: np.ndarray, layout: str, kind: Kind, shape: Shape, device: str) -> Work:
    """What a forward and backward pass of the backbone over these sequences does.

    The head is left out: it sees scored positions, which are the same in every layout.

    Args:
        parts: (S, 2) tokens of prompt and completion of each sequence, as in `data.layouts.units_of`.
        kind: how attention is told of units.
    """
    units = units_of(parts, layout)
    rows = rows_of(units.sum(1), layout, one_row=kind in ONE_ROW)
    width = width_of(units.sum(1), rows)
    cells = len(rows) * width
    causal, masked, mask, calls = 0.0, 0.0, 0.0, 1
    if layout == PADDED:
        causal = cells * width / 2
    elif kind in ("dense", "additive"):
        masked = mask = float(cells * width)
    else:
        trunk, one, other = units.astype(np.float64).T
        square = ends_a_square(trunk, other, device)
        causal = float(((trunk + one) ** 2).sum() + ((trunk + other) ** 2)[square].sum()) / 2
        masked = float((other * (trunk + other))[~square].sum())
        if kind == "by_unit":
            calls = len(units) + int((other > 0).sum())
        elif kind == "blocks":
            causal, mask = causal + cells * _BLOCK, (cells / _BLOCK) ** 2
    wide = shape.layers * shape.width
    return Work(cells * shape.weights, causal * wide, masked * wide, mask, calls * shape.layers)


def seconds(amounts: Work, speeds: Work) -> float:
    """How long that takes."""
    return sum(amount / speed for amount, speed in zip(amounts, speeds, strict=True))


ONE_ROW: tuple[Kind, ...] = ("by_unit", "blocks", "varlen")  # a longer row costs these nothing


@dataclass(frozen=True)
class Layouts:
    """The layout of each micro-batch.

    Args:
        allowed: layouts to choose from, the simplest first; one alone is taken as it is.
        kind: of the policy's attention, or of the reference's where that one alone needs a mask.
        device: `cpu` or `cuda`.
        longest: sequences longer than this stay padded: a window of the model's attention is left out of other layouts.
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
        return best if PADDED not in times or times[best] < MARGIN * times[PADDED] else PADDED

    def settings(self, layout: str) -> dict[str, Any]:
        """What `collate` is to be told beside the pairs."""
        return collate_settings(self.kind, layout)


def collate_settings(kind: Kind, layout: str) -> dict[str, Any]:
    """What `collate` is to be told of a layout for this attention."""
    if layout == PADDED:
        return {"layout": layout}
    rounded = {"pad_to_multiple_of": _BLOCK} if kind == "blocks" else {}
    return {"layout": layout, "one_row": kind in ONE_ROW, **rounded}


# What is exact ------------------------------------------------------------------------------------------------------


def check_settings(config: RunConfig, device: torch.device) -> None:
    """Raises: ConfigError for an attention that cannot train on this device."""
    if config.model.attention == "flex_attention" and device.type == "cpu":
        raise ConfigError(
            "model.attention: found 'flex_attention', which has no backward pass on the CPU; expected sdpa or eager"
        )


def check_architecture(config: RunConfig, architecture: PretrainedConfig, key: str = "model.path") -> None:
    """Raises: ConfigError for a layout that is asked for by name and cannot be exact, before weights are loaded."""
    layout = config.train.layout
    if layout in ("auto", PADDED):
        return
    reason = _never_exact(architecture)
    window = _window(architecture)
    if reason is None and window is not None and config.data.max_length > window:
        reason = f"its attention sees {window} tokens back, rows have up to {config.data.max_length}"
        reason += f" (--data.max_length {window} keeps them within)"
    if reason is not None:
        raise ConfigError(f"train.layout: '{layout}' is not exact for {key}: {reason}; expected auto or padded")


def choose_layouts(
    config: RunConfig,
    policy: Policy,
    device: torch.device,
    inside: Callable[[Callable[[], Any]], Any] = lambda run: run(),
) -> tuple[Layouts, str | None]:
    """The layouts that are exact for policy and reference, and a line on those that are not, if any.

    Args: inside: where the policy, which a backend may have sharded, can be called by itself.
    Raises: ConfigError when the one asked for is not exact.
    """
    asked, kind = config.train.layout, policy.attention
    wanted = possible_layouts(config.method.needs, kind) if asked == "auto" else (asked,)
    both = {"the policy": (adapters.base_of(policy.lm), kind)}
    if policy.reference is not None:
        both["the reference"] = (policy.reference, policy.reference_attention)
    refused: dict[str, str] = {}
    for layout in wanted:
        for who, (lm, how) in both.items():
            if layout == PADDED or layout in refused:
                continue
            if config.lora.dropout and shares_prompts(layout):  # by name: refused with the settings
                reason: str | None = "lora.dropout would drop the same of a shared prompt for both sides of a pair"
            else:
                reason = inside(partial(_inexact, lm, how, layout, device, config.train.mixed_precision))
            if reason is not None:
                refused[layout] = f"{who} ({type(lm).__name__}): {reason}"
    if asked in refused:
        raise ConfigError(f"train.layout: '{asked}' is not exact for {refused[asked]}; expected auto or padded")
    windows = [w for lm, _ in both.values() if (w := _window(lm.config)) is not None]
    layouts = Layouts(
        allowed=tuple(layout for layout in wanted if layout not in refused),
        # one row of all tokens would be a mask of all by all for a reference that needs one
        kind=next((how for _, how in both.values() if how not in ONE_ROW), kind),
        shape=shape_of(adapters.base_of(policy.lm)),
        device=device.type,
        longest=min(windows, default=None),
    )
    return layouts, _line(refused, layouts, config.data.max_length)


def possible_layouts(needs: Needs, kind: Kind) -> tuple[str, ...]:
    """The layouts that mean something for this method and this attention."""
    shared = needs.rows == "pairs" and kind != "varlen"
    return tuple(layout for layout in LAYOUTS if shared or not shares_prompts(layout))


def _line(refused: dict[str, str], layouts: Layouts, max_length: int) -> str | None:
    if refused:
        reasons = list(refused.values())
        what = "padded rows only" if layouts.allowed == (PADDED,) else f"not {' or '.join(refused)}"
        return f"layout: {what}, for {reasons[0]}"
    if layouts.longest is not None and layouts.longest < max_length and layouts.allowed != (PADDED,):
        return (
            f"layout: sequences of more than {layouts.longest} tokens stay padded: the model's attention has a window"
        )
    return None


def _never_exact(config: PretrainedConfig) -> str | None:
    """Why no layout but the padded one can be exact for this architecture, as far as its config tells, or None."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text: Any = config.get_text_config()
    if getattr(text, "index_topk", None) or getattr(text, "index_topk_blocks", None):
        return "its sparse attention ranks the keys of the whole row"
    attention = {"full_attention", "sliding_attention", "chunked_attention"}
    others = sorted(set(getattr(text, "layer_types", None) or ()) - attention)
    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if others or getattr(cls, "_is_stateful", False):
        kind = f"layers of type {', '.join(others)}" if others else "state-space or recurrent layers"
        return f"{kind} carry what they have seen along the whole row"
    if getattr(text, "attn_temperature_tuning", False):
        return "it scales attention by places in the row"
    if text.model_type in ("bloom", "mpt") or getattr(text, "alibi", False):
        return "ALiBi measures distances along the row"
    if _window(config) is not None and not getattr(cls, "_supports_attention_backend", True):
        return "its attention counts a window along the row"
    return None


def _window(config: PretrainedConfig) -> int | None:
    """How far back a token sees at most in some layer, or None for all the way."""
    text: Any = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ("sliding_attention", "chunked_attention"))
    named = {"sliding_window": "sliding_attention", "window_size": "sliding_attention"}
    named["attention_chunk_size"] = "chunked_attention"
    found = [getattr(text, name, None) for name, kind in named.items() if kind in kinds]
    return min((value for value in found if isinstance(value, int)), default=None)


def _inexact(lm: PreTrainedModel, kind: Kind, layout: str, device: torch.device, mixed: str) -> str | None:
    """Why this layout is not exact for this model, or None: its config, then a try on a few short pairs."""
    reason = _never_exact(lm.config)
    if reason is not None:
        return reason
    # only flash attention needs to be tried in the run's own precision, which blurs what is to be seen
    own = {"no": lm.dtype, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed]
    precision = own if kind == "varlen" else lm.dtype
    tolerance = max(_TOLERANCE[precision], _TOLERANCE[quantized.precision(lm)])
    plain = probe_states(lm, kind, PADDED, device, precision)  # what fails here is not the layout's fault
    try:
        gap = relative_gap(plain, probe_states(lm, kind, layout, device, precision))
    except Exception as error:
        return f"its forward does not take the layout ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
    return None if gap <= tolerance else f"hidden states differ from those of padded rows by {gap:.1g}"


# Largest relative difference of a scored hidden state; transformers computes norms in float32 for any dtype.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def relative_gap(plain: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of a hidden state, relative to `plain`; 1 where one is not a number."""
    return float((plain - other).norm(dim=-1).div(plain.norm(dim=-1).clamp(min=1e-12)).nan_to_num(nan=1.0).max())


@torch.no_grad()
def probe_states(
    lm: PreTrainedModel, kind: Kind, layout: str, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Scored hidden states of a few short random pairs, in float64."""
    draw = np.random.default_rng(0)
    top = vocabulary(lm.config)

    def ids(length: int) -> list[int]:
        return draw.integers(0, top, length).tolist()

    sizes = ((1, 3, 2), (4, 2, 3), (2, 1, 1))
    pairs = [EncodedPair(ids(p), ids(c), ids(r), [True] * c, [True] * r) for p, c, r in sizes]
    batch = to_device(collate(pairs, pad_id=0, **collate_settings(kind, layout)), device)
    training = lm.training
    lm.eval()
    try:
        with torch.autocast(device.type, dtype, enabled=dtype != lm.dtype):
            return scored_states(lm, kind, batch).double()
    finally:
        lm.train(training)
