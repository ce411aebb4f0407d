"""Reads from a model's config how it scales, softcaps or truncates its logits after the head.

`prefopt.kernels.head` computes token statistics without the model's own forward, so it has to apply the same scale and
softcap. A setting that the table below lacks is detected by the check at step 0, which compares with the model's own
logits.
"""

from __future__ import annotations

import inspect
import math
import re
from typing import Any, Literal, NamedTuple

from prefopt.errors import TrainError
from prefopt.training import adapters

Effect = Literal["multiply", "divide", "softcap", "truncate"]

# Config setting -> what it does, provided that the model's code reads it: logits are multiplied or divided by the value
# (for a head without bias, scaling the hidden states instead is equivalent), softcapped at it, or truncated to that
# number of entries.
LOGIT_SETTINGS: dict[str, Effect] = {
    "logit_scale": "multiply",  # Cohere
    "lm_head_multiplier": "multiply",  # Falcon-H1
    "logits_scaling": "divide",  # Granite, MiniCPM
    "logits_mup_width_multiplier": "divide",  # Inkling
    "final_logit_softcapping": "softcap",  # Gemma 2 and later
    "logits_soft_cap": "softcap",  # RecurrentGemma
    "output_logit_soft_cap": "softcap",  # xLSTM
    "unpadded_vocab_size": "truncate",  # Inkling
}
# (model type, setting) whose effect differs from the table above.
FAMILY_EXCEPTIONS: dict[tuple[str, str], Effect] = {("hyperclovax", "logits_scaling"): "multiply"}


class Scaling(NamedTuple):
    """Logits are `softcap * tanh(scale * z / softcap)` of the head's output z, or `scale * z` without a softcap."""

    scale: float
    softcap: float | None


def effect(model_type: str, field: str) -> Effect:
    """The effect of a setting in models of this type."""
    return FAMILY_EXCEPTIONS.get((model_type, field), LOGIT_SETTINGS[field])


def head_scaling(lm: Any) -> Scaling:
    """The scale and the softcap that a model, with or without an adapter, applies to its logits after the head.

    Raises: TrainError for a value out of range, or for truncated logits, whose other entries would get no gradient.
    """
    base = adapters.base_of(lm)
    config: Any = base.config.get_text_config()
    name, code = type(base).__name__, _source_of(type(base))
    scale, softcap = 1.0, None
    for field in LOGIT_SETTINGS:
        value = getattr(config, field, None)
        if value is None or (code is not None and not re.search(rf"\b{field}\b", code)):
            continue
        what = effect(config.model_type, field)
        number = float(value) if isinstance(value, (int, float)) else math.nan
        if not math.isfinite(number) or number == 0 or (what in ("softcap", "truncate") and number < 0):
            expected = "a number above 0" if what in ("softcap", "truncate") else "a number other than 0"
            raise TrainError(
                f"model.path: {type(base).__name__} has {field} {value!r} in its config, expected {expected}"
            )
        if what == "truncate" and number < config.vocab_size:
            raise TrainError(
                f"model.path: {name} truncates its logits to {field} ({value}) of {config.vocab_size} entries, which "
                "is not supported"
            )
        if what == "softcap":
            softcap = number
        elif what != "truncate":
            scale = scale * number if what == "multiply" else scale / number
    return Scaling(scale, softcap)


def _source_of(kind: type) -> str | None:
    """The source code of a model's class and of its base classes; None if it cannot be read."""
    from transformers import PreTrainedModel

    mine = [part for part in kind.__mro__ if issubclass(part, PreTrainedModel) and part is not PreTrainedModel]
    try:
        return "\n".join(inspect.getsource(part) for part in mine)
    except (OSError, TypeError):
        return None
