"""Data files encoded by the settings of a run, as training and the `data` command both read them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prefopt.data.comparison import encoder_for
from prefopt.data.encode import Encoded, encode_file
from prefopt.data.templates import Rendering
from prefopt.data.unpaired import Mismatched
from prefopt.settings import DataConfig
from prefopt.settings.data import PreviewDataConfig
from prefopt.testbed.cache import cache_root
from prefopt.types import Needs


def encode_source(
    name: str,
    tokenizer: Any,
    data: DataConfig | PreviewDataConfig,
    needs: Needs,
    rendering: Rendering,
    vocab_rows: int | None,
) -> Encoded:
    """The pairs of a file, folder or hub dataset as token ids, from the cache where they were encoded before.

    Args:
        needs: what the method reads of a pair.
        vocab_rows: rows of the model's embedding; None where no model is given.
    Raises: DataError.
    """
    encoded = encode_file(
        name,
        tokenizer,
        max_length=data.max_length,
        kind=encoder_for(needs),
        need_rejected=needs.rows == "pairs",
        extra=needs.columns,
        extra_tokens=needs.token_columns,
        columns=data.columns,
        on_bad_row=data.on_bad_row,
        vocab_rows=vocab_rows,
        cache_dir=cache_root() / "encoded",
        dialogues=data.dialogues,
        rendering=rendering,
        overlong=data.overlong,
        special_tokens=data.special_tokens,
        labelled=needs.rows == "unpaired",
    )
    if not needs.mismatched:
        return encoded
    pairs = Mismatched(encoded.pairs, data.max_length, name)
    return replace(encoded, pairs=pairs, fingerprint=f"{encoded.fingerprint}-mismatched")
