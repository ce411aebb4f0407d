"""Checks that the sizes in a model's config are plausible, before anything is allocated from them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prefopt.errors import TrainError

# (pattern of a setting's name, minimum, maximum). The maxima are about ten times those of current models.
_SIZE_LIMITS = (
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
_MAX_WEIGHTS = 1e14


def check_config_values(config: Mapping[str, Any], file: str, key: str) -> None:
    """Check the sizes in a config file before transformers reads it: some families allocate lists of these lengths.

    Args: config: the content of the file.
    Raises: TrainError naming `key` and the setting.
    """
    for name, value in config.items():
        if isinstance(value, dict):
            check_config_values(value, file, key)
        known = next((limits for pattern, *limits in _SIZE_LIMITS if re.fullmatch(pattern, name)), None)
        if known is None or value is None or isinstance(value, (list, dict)):
            continue
        minimum, maximum = known
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise TrainError(f"{key}: '{file}' has {name} {value!r}, expected a number from {minimum} to {maximum:,}")


def check_sizes(config: Any, path: str, key: str) -> None:
    """Raises: TrainError for a config of more than 1e14 weights, or with a negative attention window."""
    window = getattr(config.get_text_config(), "sliding_window", None)
    if isinstance(window, int) and window < 0:  # every position would be masked, without any error
        raise TrainError(
            f"{key}: the config of '{path}' has sliding_window {window}, expected a number above 0, or null"
        )
    found = estimated_weights(config)
    if found > _MAX_WEIGHTS:
        raise TrainError(
            f"{key}: the config of '{path}' describes a model of {found:.1e} weights, expected at most "
            f"{_MAX_WEIGHTS:.0e}"
        )


def estimated_weights(config: Any) -> float:
    """A rough number of weights of a model with this config: attention and MLP matrices, embedding and head."""
    text = config.get_text_config()

    def size(*names: str, default: float = 0) -> float:
        found = (getattr(text, name, None) for name in names)
        return float(next((value for value in found if isinstance(value, int)), default))

    width, layers = size("hidden_size"), size("num_hidden_layers")
    inner = size("moe_intermediate_size", "intermediate_size", default=4 * width)
    experts = size("num_local_experts", "num_experts", "n_routed_experts", default=1)
    return layers * (4 * width**2 + 3 * width * inner * max(1.0, experts)) + 2 * size("vocab_size") * width
