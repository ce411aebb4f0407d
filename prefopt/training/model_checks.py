"""Checks that a model fits its data and its reference: vocabulary size, token ids, number of positions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.errors import TrainError
from prefopt.settings import ModelConfig
from prefopt.training import models

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from prefopt.data.encoding_report import DataReport


def vocabulary_size(config: PretrainedConfig) -> int:
    """Number of rows of the embedding according to the config."""
    return int(config.get_text_config().vocab_size)


def check_same_vocabulary(policy: PretrainedConfig, reference: PretrainedConfig, path: str) -> None:
    """Raises: TrainError when the reference's vocabulary size differs from the policy's."""
    mine, other = vocabulary_size(policy), vocabulary_size(reference)
    if mine != other:
        raise TrainError(
            f"reference.path: '{path}' has a vocabulary of {other} tokens, the policy {mine}; "
            "KL and log-ratios need the same vocabulary (use a reference of the policy's family)"
        )


def check_same_tokens(policy: PreTrainedTokenizerBase, path: str, settings: ModelConfig) -> None:
    """Compare the policy's tokenizer with that in the reference's folder, if there is one.

    The reference receives token ids of the policy's tokenizer.

    Raises: TrainError when a token has different ids in the two tokenizers, so the reference would read other text.
    """
    from transformers import AutoTokenizer

    if not any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return
    try:
        reference = AutoTokenizer.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
    except Exception as error:
        raise models.load_error("reference.path", path, error, "a tokenizer") from error
    mine, other = policy.get_vocab(), reference.get_vocab()
    moved = next((token for token in sorted(mine.keys() & other.keys()) if mine[token] != other[token]), None)
    if moved is not None:
        raise TrainError(
            f"reference.path: the tokenizer of '{path}' has {moved!r} as token {other[moved]}, the policy's as token "
            f"{mine[moved]}; KL and log-ratios need the same ids (use a reference of the policy's family)"
        )


def check_positions(config: PretrainedConfig, report: DataReport, max_length: int) -> None:
    """Raises: TrainError when examples of this file may be longer than the model's number of positions."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(p[-1] for name, p in report.lengths.items() if name != "prompt") + report.lengths["prompt"][-1]
    needed = min(longest, max_length)
    if limit is not None and needed > limit:
        raise TrainError(
            f"data.max_length: found {max_length}, and {report.path} has sequences of up to {needed} tokens, but the "
            f"model has {limit} positions; use --data.max_length {limit}"
        )
