"""Whether the numbers in a model's config are those of a model, before anything is made of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prefopt.errors import TrainError

# Settings that count something -> (least, most that is believed). Models of today have a tenth of the most.
_COUNTS = (
    (r"num_hidden_layers|num_layers|n_layers?|num_(de|en)coder_layers|(de|en)coder_layers", 1, 2_000),
    (r"num_local_experts|num_experts|n_routed_experts|moe_num_experts", 0, 10_000),
    (r"num_attention_heads|num_key_value_heads|n_heads?|num_heads", 1, 10_000),
    (r"hidden_size|n_embd|d_model|word_embed_proj_dim", 1, 1_000_000),
    (r"intermediate_size|n_inner|ffn_dim|d_ff", 1, 10_000_000),
    (r"moe_intermediate_size|shared_expert_intermediate_size", 0, 10_000_000),
    (r"head_dim", 1, 100_000),
    (r"vocab_size", 1, 100_000_000),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len", 1, 10**10),
)
_MOST = 1e14  # weights


def check_counts(config: Mapping[str, Any], file: str, key: str) -> None:
    """Whether what a config counts can be counted: some families make lists of such lengths as they read it.

    Args: config: as the file has it.
    Raises: TrainError naming `key` and the setting.
    """
    for name, value in config.items():
        if isinstance(value, dict):
            check_counts(value, file, key)
        known = next((limits for pattern, *limits in _COUNTS if re.fullmatch(pattern, name)), None)
        if known is None or value is None or isinstance(value, (list, dict)):
            continue
        least, most = known
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise TrainError(f"{key}: '{file}' has {name} {value!r}, expected a number from {least} to {most:,}")


def check_sizes(config: Any, path: str, key: str) -> None:
    """Raises: TrainError for the config of a model that nobody could hold, or whose attention sees nothing."""
    window = getattr(config.get_text_config(), "sliding_window", None)
    if isinstance(window, int) and window < 0:  # no token would see another, and nothing else would tell
        raise TrainError(
            f"{key}: the config of '{path}' has sliding_window {window}, expected a number above 0, or null"
        )
    found = weights_of(config)
    if found > _MOST:
        raise TrainError(
            f"{key}: the config of '{path}' is that of {found:.1e} weights, expected a model of at most {_MOST:.0e}"
        )


def weights_of(config: Any) -> float:
    """How many weights a model of this config has, roughly: what its sizes say of matrices."""
    text = config.get_text_config()

    def size(*names: str, default: float = 0) -> float:
        found = (getattr(text, name, None) for name in names)
        return float(next((value for value in found if isinstance(value, int)), default))

    width, layers = size("hidden_size"), size("num_hidden_layers")
    inner = size("moe_intermediate_size", "intermediate_size", default=4 * width)
    experts = size("num_local_experts", "num_experts", "n_routed_experts", default=1)
    return layers * (4 * width**2 + 3 * width * inner * max(1.0, experts)) + 2 * size("vocab_size") * width
