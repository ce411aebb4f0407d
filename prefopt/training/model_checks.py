"""Checks of a model against its data and its reference: vocabulary, token ids, number of positions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.errors import TrainError
from prefopt.settings import ModelConfig
from prefopt.training import models

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from prefopt.data.encoding_report import DataReport


def vocabulary(config: PretrainedConfig) -> int:
    """Rows of the embedding, as the config declares them."""
    return int(config.get_text_config().vocab_size)


def check_same_vocabulary(policy: PretrainedConfig, reference: PretrainedConfig, path: str) -> None:
    """Raises: TrainError when the reference scores another vocabulary than the policy."""
    mine, other = vocabulary(policy), vocabulary(reference)
    if mine != other:
        raise TrainError(
            f"reference.path: '{path}' has a vocabulary of {other} tokens, the policy {mine}; "
            "KL and log-ratios need the same one (name a reference of the policy's family)"
        )


def check_same_tokens(policy: PreTrainedTokenizerBase, path: str, settings: ModelConfig) -> None:
    """Hold the policy's tokenizer to that in a reference's folder, which may have none: it reads the policy's ids.

    Raises: TrainError where a token that both know has another id in the reference, which then reads other text.
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
            f"{mine[moved]}; KL and log-ratios need the same ids (name a reference of the policy's family)"
        )


def check_positions(config: PretrainedConfig, report: DataReport, max_length: int) -> None:
    """Raises: TrainError when rows of this file may be longer than the model has positions."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(p[-1] for name, p in report.lengths.items() if name != "prompt") + report.lengths["prompt"][-1]
    needed = min(longest, max_length)
    if limit is not None and needed > limit:
        raise TrainError(
            f"data.max_length: found {max_length}, and {report.path} has rows of up to {needed} tokens, but the model "
            f"has {limit} positions; use --data.max_length {limit}"
        )
