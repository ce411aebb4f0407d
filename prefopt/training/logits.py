"""What a model does to its logits after the head: the settings of transformers' families that scale, cap or cut them.

The head of this package computes statistics without the model's own forward, and must do the same. What no table
knows is caught by the check at step 0.
"""

from __future__ import annotations

import inspect
import math
import re
from typing import Any, Literal, NamedTuple

from prefopt.errors import TrainError
from prefopt.training import adapters

Effect = Literal["times", "over", "cap", "cut"]

# What a setting of a model's config does, where the model's code reads it: logits are multiplied or divided by it (or
# the states before a head without a bias are, which is the same), soft-capped at it, or cut to so many entries.
EFFECTS: dict[str, Effect] = {
    "logit_scale": "times",  # Cohere
    "lm_head_multiplier": "times",  # Falcon-H1
    "logits_scaling": "over",  # Granite, MiniCPM
    "logits_mup_width_multiplier": "over",  # Inkling
    "final_logit_softcapping": "cap",  # Gemma 2 and later
    "logits_soft_cap": "cap",  # RecurrentGemma
    "output_logit_soft_cap": "cap",  # xLSTM
    "unpadded_vocab_size": "cut",  # Inkling
}
OTHERWISE: dict[tuple[str, str], Effect] = {("hyperclovax", "logits_scaling"): "times"}


class Scaling(NamedTuple):
    """`softcap * tanh(scale * z / softcap)` of the head's products z, and without a soft-cap `scale * z`."""

    scale: float
    softcap: float | None


def effect(model_type: str, field: str) -> Effect:
    """What a setting does in a family."""
    return OTHERWISE.get((model_type, field), EFFECTS[field])


def head_scaling(lm: Any) -> Scaling:
    """The scale and the soft-cap that a model, with an adapter or without, applies to its logits after the head.

    Raises: TrainError for a value that is no such number, or logits that are cut: they would have no gradient.
    """
    base = adapters.base_of(lm)
    config: Any = base.config.get_text_config()
    name, code = type(base).__name__, _code_of(type(base))
    scale, softcap = 1.0, None
    for field in EFFECTS:
        value = getattr(config, field, None)
        if value is None or (code is not None and not re.search(rf"\b{field}\b", code)):
            continue
        what = effect(config.model_type, field)
        number = float(value) if isinstance(value, (int, float)) else math.nan
        if not math.isfinite(number) or number == 0 or (what in ("cap", "cut") and number < 0):
            expected = "a number above 0" if what in ("cap", "cut") else "a number other than 0"
            raise TrainError(
                f"model.path: {type(base).__name__} has {field} {value!r} in its config, expected {expected}"
            )
        if what == "cut" and number < config.vocab_size:
            raise TrainError(
                f"model.path: {name} cuts its logits to {field} ({value}) of {config.vocab_size} entries, which is not "
                "supported"
            )
        if what == "cap":
            softcap = number
        elif what != "cut":
            scale = scale * number if what == "times" else scale / number
    return Scaling(scale, softcap)


def _code_of(kind: type) -> str | None:
    """The source of a model's class and of those that it is made from; None where there is none to read."""
    from transformers import PreTrainedModel

    mine = [part for part in kind.__mro__ if issubclass(part, PreTrainedModel) and part is not PreTrainedModel]
    try:
        return "\n".join(inspect.getsource(part) for part in mine)
    except (OSError, TypeError):
        return None
