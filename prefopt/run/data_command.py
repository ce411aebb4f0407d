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

    from prefopt.data.encode import joined
    from prefopt.data.encoder import pad_token
    from prefopt.data.preview import page, preview_pair, spread, terminal
    from prefopt.data.templates import Rendering
    from prefopt.run.encoding import encode_source
    from prefopt.training import model_checks, model_sources, models

    vocab_rows = None
    if config.model.path is not None:
        start = model_sources.find(config.model.path, config.model)
        vocab_rows = model_checks.vocabulary_size(models.load_config(start.base, start.base_settings(config.model)))
        path, at = model_sources.tokenizer_path(start, config.model)
        tokenizer = models.load_tokenizer(path, at, config.data.chat_template)
    else:
        assert config.tokenizer is not None
        tokenizer = models.load_tokenizer(config.tokenizer, config.model, config.data.chat_template, key="tokenizer")
    tokenizer.pad_token_id, _ = pad_token(tokenizer, vocab_rows)
    rendering = Rendering.of(config.data, tokenizer)
    needs = Needs(reference="none") if config.method is None else registry.get(config.method)().needs
    sources = [encode_source(name, tokenizer, config.data, needs, rendering, vocab_rows) for name in config.sources]
    lines = [*rendering.lines(tokenizer), *(line for source in sources for line in source.report.lines())]
    report = [printable(line) for line in lines]
    pairs = joined(sources).pairs
    rows = [preview_pair(pairs[i], tokenizer) for i in spread(config.examples, len(pairs))]
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
