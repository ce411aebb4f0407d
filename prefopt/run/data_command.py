"""The `data` command: what training would report of the data, and some pairs with their masks."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.errors import TrainError
from prefopt.redaction import hidden, printable
from prefopt.storage import write_whole
from prefopt.testbed.cache import cache_root
from prefopt.training import weight_files

if TYPE_CHECKING:
    from prefopt.settings.data import PreviewConfig


def preview_data(config: PreviewConfig) -> int:
    """Print the report of the data and some examples, or write them as an HTML page. Returns: 0."""
    from prefopt import registry
    from prefopt.data.rows import open_source
    from prefopt.types import Needs

    if config.model.path is not None:
        weight_files.check_path("model.path", config.model.path)
    if config.tokenizer is not None:
        weight_files.check_path("tokenizer", config.tokenizer)
    for name in config.sources:
        if Path(name).suffix or name.startswith((".", "/", "~")):
            open_source(name)

    from prefopt.data.comparison import encoder_for
    from prefopt.data.encode import encode_file, joined
    from prefopt.data.encoder import pad_token
    from prefopt.data.preview import page, shown, spread, terminal
    from prefopt.data.templates import Rendering
    from prefopt.training import model_checks, model_sources, models

    vocab_rows = None
    if config.model.path is not None:
        start = model_sources.find(config.model.path, config.model)
        vocab_rows = model_checks.vocabulary(models.load_config(start.base, start.base_settings(config.model)))
        path, at = model_sources.tokenizer_path(start, config.model)
        tokenizer = models.load_tokenizer(path, at, config.data.chat_template)
    else:
        assert config.tokenizer is not None
        tokenizer = models.load_tokenizer(config.tokenizer, config.model, config.data.chat_template, key="tokenizer")
    tokenizer.pad_token_id, _ = pad_token(tokenizer, vocab_rows)
    rendering = Rendering.of(config.data, tokenizer)
    needs = Needs(reference="none") if config.method is None else registry.get(config.method)().needs
    sources = [
        encode_file(
            name,
            tokenizer,
            max_length=config.data.max_length,
            kind=encoder_for(needs),
            need_rejected=needs.rows == "pairs",
            extra=needs.columns,
            columns=config.data.columns,
            on_bad_row=config.data.on_bad_row,
            vocab_rows=vocab_rows,
            cache_dir=cache_root() / "encoded",
            dialogues=config.data.dialogues,
            rendering=rendering,
            overlong=config.data.overlong,
            special_tokens=config.data.special_tokens,
        )
        for name in config.sources
    ]
    lines = [*rendering.lines(tokenizer), *(line for source in sources for line in source.report.lines())]
    report = [printable(line) for line in lines]
    pairs = joined(sources).pairs
    rows = [shown(pairs[i], tokenizer) for i in spread(config.examples, len(pairs))]
    if config.html is not None:
        try:
            write_whole(Path(config.html), [hidden(page(", ".join(config.sources), report, rows))])
        except OSError as error:
            raise TrainError(f"--html: '{config.html}' cannot be written: {error.strerror}") from None
        print("\n".join([*report, printable(f"written: {config.html}")]))
        return 0
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    with contextlib.suppress(BrokenPipeError):
        print("\n".join([*report, *(["", terminal(rows, color=color)] if rows else [])]))
    return 0
