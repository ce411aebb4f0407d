"""A data file as token ids: encoded once per content of file, tokenizer and settings, then memory-mapped."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from prefopt import storage
from prefopt.data.bad_rows import BadRow, BadRows, OnBadRow, first_bad_row
from prefopt.data.encoder import TOO_LONG, Encoder, Overlong, pad_token
from prefopt.data.encoding_report import EXAMPLES, DataReport
from prefopt.data.pairs import BLOCK, Concatenated, PairView
from prefopt.data.rows import MAX_ROW_BYTES, Dialogues, RowReader
from prefopt.data.structure import added_bos
from prefopt.data.templates import Rendering
from prefopt.errors import DataError
from prefopt.storage import Damaged, Unreadable, locked, running_hash, text_hash, text_number
from prefopt.types import Column, EncodedPair, PairRow, TokenColumn

FORMAT_VERSION = 6  # raise it whenever the same file and settings would give other ids, masks or counts
_ROWS, _REPORT = "rows.arrow", "report.json"  # of a folder of the cache
_NAME = "\0"  # in a cached note, stands for the data's base path, which may differ when the cache is read
_BATCH = 4096  # rows per record batch of the cache file


class MappedPairs(PairView):
    """The encoded pairs of a cache folder, memory-mapped: none is held in memory, and reading one takes microseconds.

    Args:
        folder: one written by `encode_file`.
        path: the data's base path, a prefix of each `where`.
    """

    def __init__(self, folder: Path, path: str) -> None:
        import pyarrow

        self.folder, self.path = folder, path
        self._starts, self._chunks, rows = [], [], 0
        with pyarrow.ipc.open_stream(pyarrow.memory_map(str(folder / _ROWS))) as stream:
            for batch in stream:
                if batch.num_rows:
                    self._starts.append(rows)
                    self._chunks.append({name: _view(batch.column(name)) for name in batch.schema.names})
                    rows += batch.num_rows
            names = stream.schema.names
        self._names = [name.removeprefix("column.") for name in names if name.startswith("column.")]
        self._token_keys = [name.removeprefix("tokens.") for name in names if name.startswith("tokens.")]
        self._len = rows

    def __len__(self) -> int:
        return self._len

    def _at(self, i: int) -> EncodedPair:
        at = bisect_right(self._starts, i) - 1
        chunk, i = self._chunks[at], i - self._starts[at]
        rejected = _ids(chunk["rejected_ids"], i)
        chosen = _ids(chunk["chosen_ids"], i)
        return EncodedPair(
            prompt_ids=_ids(chunk["prompt_ids"], i),
            chosen_ids=chosen,
            rejected_ids=rejected or None,
            chosen_mask=_mask(chunk["chosen_mask"], i, len(chosen)),
            rejected_mask=_mask(chunk["rejected_mask"], i, len(rejected)) if rejected else None,
            columns={name: float(chunk["column." + name][i]) for name in self._names},
            where=self.path + chunk["where"][i].as_py(),
            prompt_key=f"{chunk['prompt_key'][i]:016x}",
            raw_prompt_key=f"{chunk['raw_prompt_key'][i]:016x}",
            token_columns={key: _ids(chunk["tokens." + key], i) for key in self._token_keys},
        )

    def metadata(self, name: str, begin: int, end: int) -> np.ndarray:
        """See `pairs.pair_metadata`; read from the offsets and columns of the mapped file."""
        found = [np.empty(0, np.int64)]
        for at in range(max(bisect_right(self._starts, begin) - 1, 0), bisect_left(self._starts, end)):
            start, size = self._starts[at], len(self._chunks[at]["where"])
            found.append(_metadata(self._chunks[at], name, max(begin - start, 0), min(end - start, size)))
        return np.concatenate(found[1:] or found)

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedPairs, (self.folder, self.path)


def _view(column: Any) -> Any:
    """A column of one record batch as numpy arrays over the mapped file; strings stay in arrow."""
    import pyarrow

    if pyarrow.types.is_list(column.type):
        return column.offsets.to_numpy(), column.values.to_numpy()
    return column if pyarrow.types.is_string(column.type) else column.to_numpy()


def _metadata(chunk: Mapping[str, Any], name: str, begin: int, end: int) -> np.ndarray:
    """One number for each of the pairs `begin` to `end` of a chunk, see `pairs.pair_metadata`."""
    if name in ("prompt", "chosen", "rejected"):
        lengths: np.ndarray = np.diff(chunk[f"{name}_ids"][0][begin : end + 1]).astype(np.int64)
        return lengths
    if name in ("chosen_loss_tokens", "rejected_loss_tokens"):
        side = name.removesuffix("_loss_tokens")
        offsets, marks = chunk[f"{side}_mask"]
        before = np.concatenate(([0], marks[offsets[begin] : offsets[end]].cumsum(dtype=np.int64)))
        at = offsets[begin : end + 1] - offsets[begin]
        # no mask is stored where all tokens are loss tokens
        return np.where(np.diff(at) > 0, np.diff(before[at]), _metadata(chunk, side, begin, end))
    values: np.ndarray = chunk[name][begin:end]
    return values


def _ids(view: tuple[np.ndarray, np.ndarray], i: int) -> list[Any]:
    offsets, values = view
    return values[offsets[i] : offsets[i + 1]].tolist()


def _mask(view: tuple[np.ndarray, np.ndarray], i: int, length: int) -> list[bool]:
    stored = _ids(view, i)  # no mask is stored where all tokens are loss tokens
    return [bool(value) for value in stored] if stored else [True] * length


@dataclass(frozen=True)
class Encoded:
    """An encoded data file. `fingerprint` is a hash of the encoded content, independent of the path."""

    pairs: Sequence[EncodedPair]
    report: DataReport
    fingerprint: str


@dataclass(frozen=True)
class Joined:
    """Several data files as one set of pairs. `fingerprint` is a hash of theirs, in their order."""

    pairs: Sequence[EncodedPair]
    fingerprint: str


def joined(sources: Sequence[Encoded]) -> Joined:
    """Concatenate data files; a single one keeps its fingerprint."""
    if len(sources) == 1:
        return Joined(sources[0].pairs, sources[0].fingerprint)
    fingerprint = text_hash("\n".join(one.fingerprint for one in sources))
    return Joined(Concatenated([one.pairs for one in sources]), fingerprint)


def encode_file(
    path: str | Path,
    tokenizer: Any,
    *,
    max_length: int,
    kind: type[Encoder] = Encoder,
    need_rejected: bool = True,
    extra: tuple[Column, ...] = (),
    extra_tokens: tuple[TokenColumn, ...] = (),
    columns: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = "error",
    vocab_rows: int | None = None,
    cache_dir: str | Path,
    max_row_bytes: int = MAX_ROW_BYTES,
    dialogues: Dialogues = "text",
    rendering: Rendering | None = None,
    overlong: Overlong = "truncate_prompt",
    special_tokens: Sequence[str] = (),
    labelled: bool = False,
) -> Encoded:
    """Read, tokenise and truncate a data file, or map the cache of an earlier call with the same content.

    Of several processes on a machine one encodes and the others wait for it.

    Args:
        path, columns, need_rejected, extra, extra_tokens, max_row_bytes, dialogues, labelled: as `RowReader`.
        tokenizer, max_length, rendering, overlong, special_tokens: as `Encoder`.
        kind: which encoder.
        on_bad_row: `error` stops at the first bad row; `skip` drops and counts them.
        vocab_rows: rows of the model's embedding matrix; more rows than tokens is normal, fewer is refused.
        cache_dir: folder of encoded files.

    Raises: DataError.
    """
    name = str(path)
    encoder = kind(tokenizer, max_length, rendering=rendering, overlong=overlong, special_tokens=special_tokens)
    reader = RowReader(
        name,
        columns=columns,
        need_rejected=need_rejected,
        extra=extra,
        extra_tokens=extra_tokens,
        max_row_bytes=max_row_bytes,
        tokenizer=tokenizer_content(tokenizer),
        dialogues=dialogues,
        labelled=labelled,
    )
    settings = [
        kind.form,
        max_length,
        need_rejected,
        repr(extra),
        sorted(reader.columns.items()),
        on_bad_row,
        max_row_bytes,
        dialogues,
        overlong,
        sorted(special_tokens),
        encoder.rendering.key(tokenizer),
        *(["labelled"] if labelled else []),
        *reader.token_keys,
    ]
    key = _cache_key(reader.source.content(Path(cache_dir).expanduser() / "hashes"), tokenizer, settings)
    folder = Path(cache_dir).expanduser() / key
    base = reader.source.base
    loaded, wrong = _load(folder, name, base)
    if loaded is None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(folder.with_suffix(".lock")):
                loaded, wrong = _load(folder, name, base)  # another process may have been faster
                if loaded is None:
                    _write(folder, reader, encoder, name, on_bad_row)
                    loaded, _ = _load(folder, name, base)
        except OSError as error:
            raise DataError(f"{cache_dir}: cannot store the encoded data here: {error.strerror or error}") from None
    if loaded is None:
        raise DataError(f"{folder}: the encoded data cannot be read back; is the disk full?")
    encoded, largest = loaded
    if wrong is not None:
        note = f"the encoded data in {folder} was damaged ({wrong}) and was encoded again"
        encoded = replace(encoded, report=replace(encoded.report, notes=(*encoded.report.notes, note)))
    if vocab_rows is not None and largest >= vocab_rows:
        raise _no_vocab_row(encoded.pairs, vocab_rows, tokenizer)
    return encoded


def _no_vocab_row(pairs: Sequence[EncodedPair], rows: int, tokenizer: Any) -> DataError:
    for pair in pairs:
        for token in (*pair.prompt_ids, *pair.chosen_ids, *(pair.rejected_ids or ())):
            if token >= rows:
                text = tokenizer.convert_ids_to_tokens(token)
                return DataError(
                    f"{pair.where}: token {token} ('{text}') is outside the model's vocabulary: the tokenizer has "
                    f"{len(tokenizer):,} tokens, the model's embedding {rows:,} rows (use the model's own tokenizer)"
                )
    raise AssertionError("the largest id of the file is in none of its rows")


def _cache_key(content: str, tokenizer: Any, settings: list[Any]) -> str:
    import tokenizers
    import transformers

    versions = [FORMAT_VERSION, transformers.__version__, tokenizers.__version__]
    parts = [content, versions, settings, tokenizer_content(tokenizer)]
    return text_hash(json.dumps(parts, default=str))[:32]


def tokenizer_content(tokenizer: Any) -> str:
    """A hash of everything that determines the token ids of a text."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        model = json.loads(backend.to_str())
        # These two change with every call that pads or truncates; neither is used here.
        model.pop("truncation", None), model.pop("padding", None)
    else:
        model = sorted(tokenizer.get_vocab().items())
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, added_bos(tokenizer)]
    parts = [type(tokenizer).__name__, model, ids, tokenizer.chat_template, tokenizer.special_tokens_map]
    return text_hash(json.dumps(parts, sort_keys=True, default=str))


def _load(folder: Path, name: str, base: str) -> tuple[tuple[Encoded, int] | None, str | None]:
    """(content of a cache folder, None if missing or damaged; what is wrong with a damaged one).

    The content is hashed at every start, because one flipped bit would be another token. Places get the prefix `base`.

    Raises: Unreadable.
    """
    if not storage.is_there(folder):
        return None, None
    try:
        kept = storage.read_sealed(folder / _REPORT)
        if kept is None:
            return None, f"{_REPORT} is missing"
        wrong = storage.difference(folder / _ROWS, kept["bytes"], kept["rows"])
        if wrong is not None:
            return None, wrong
        pairs = MappedPairs(folder, base)
        report = DataReport.from_json(kept["report"])
    except Unreadable:
        raise
    except Damaged:
        return None, f"{_REPORT} does not match its own hash"
    except Exception as error:  # written by another version
        return None, f"{type(error).__name__}: {error}"
    examples = {reason: tuple(base + place for place in places) for reason, places in report.examples.items()}
    notes = tuple(note.replace(_NAME, base) for note in report.notes)
    report = replace(report, path=name, examples=examples, notes=notes)
    encoded = Encoded(pairs, report, kept["fingerprint"])
    return (encoded, kept["largest"]), None


def _write(folder: Path, reader: RowReader, encoder: Encoder, name: str, on_bad_row: OnBadRow) -> None:
    """Create a cache folder atomically: it is built in a scratch folder and renamed. The caller holds the lock."""
    with storage.built_beside(folder, alone=True) as scratch:
        _build(scratch, reader, encoder, name, on_bad_row)
        storage.remove_ours(folder)  # a damaged one, or there is none
        storage.put_in_place(scratch, folder)


def _build(folder: Path, reader: RowReader, encoder: Encoder, name: str, on_bad_row: OnBadRow) -> None:
    """Write `rows.arrow` and `report.json` with a few thousand rows in memory. Places are stored without the base."""
    import pyarrow

    count: Counter[str] = Counter()
    bad = BadRows(EXAMPLES)
    base = reader.source.base
    noted: Counter[str] = Counter()
    first: dict[str, str] = {}  # place of the first example of each note
    sides = ["completion"] if reader.labelled else ["chosen", "rejected"] if reader.need_rejected else ["chosen"]
    lengths: dict[str, Counter[int]] = {side: Counter() for side in ("prompt", *sides)}
    seen = array("Q")
    content = running_hash()
    items = iter(reader)
    schema = _schema(reader.extra, reader.token_keys)

    def drop(row: BadRow) -> None:
        if on_bad_row == "error" and row.reason != TOO_LONG:
            raise first_bad_row(row, items)
        count["read"] += 1
        bad.add(row)

    def good_rows() -> Iterator[PairRow]:
        for item in items:
            if isinstance(item, BadRow):
                drop(item)
            else:
                yield item

    with (folder / _ROWS).open("wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        pending: list[dict[str, Any]] = []
        for encoded in encoder.rows(good_rows()):
            if isinstance(encoded, BadRow):
                drop(encoded)
                continue
            pair = encoded.pair
            count.update(read=1, kept=1, cut_prompts=encoded.cut_prompt, cut_completions=encoded.cut_completion)
            count.update(unterminated=encoded.unterminated, completions=len(encoded.lengths) - 1)
            count["identical"] += pair.chosen_ids == pair.rejected_ids
            count["cut"] += encoded.cut_prompt or encoded.cut_completion
            for note in encoded.notes:
                if note not in noted:
                    first[note] = pair.where.removeprefix(base)
                noted[note] += 1
            for side, length in zip(lengths, encoded.lengths, strict=True):
                lengths[side][length] += 1
            count["largest"] = max(
                count["largest"], max(pair.prompt_ids), max(pair.chosen_ids), max(pair.rejected_ids or (0,))
            )
            record = _record(pair, base)
            ids = repr([record[key] for key in ("prompt_key", "prompt_ids", "chosen_ids", "rejected_ids")])
            seen.append(text_number(ids))
            masks = [record["chosen_mask"], record["rejected_mask"], sorted(pair.columns.items())]
            tokens = sorted(pair.token_columns.items())
            content.update(f"{ids}{masks}{tokens or ''}".encode())
            pending.append(record)
            if len(pending) == _BATCH:
                writer.write_batch(pyarrow.RecordBatch.from_pylist(pending, schema))
                pending = []
        writer.write_batch(pyarrow.RecordBatch.from_pylist(pending, schema))
    if not count["kept"]:
        raise bad.none_left(name, count["read"])

    notes = [note for note in [pad_token(encoder.tokenizer)[1]] if note]
    if encoder.eos is None:
        notes.append("the tokenizer has no EOS token, so completions do not end with one")
    if count["cut"] > 0.01 * count["kept"]:
        percent = 100 * count["cut"] / count["kept"]
        notes.append(f"warning: {percent:.1f}% of the pairs are truncated; raise data.max_length, or see data.overlong")
    for note, number in noted.most_common():
        notes.append(f"{note}: {number:,} example{'s' * (number != 1)}, the first {_NAME}{first[note]}")
    notes += reader.unread.notes(chat=bool(getattr(encoder.tokenizer, "chat_template", None)))
    report = DataReport(
        path="",
        max_length=encoder.max_length,
        formats=dict(reader.formats.most_common()),
        read=count["read"],
        kept=count["kept"],
        dropped=dict(bad.counts),
        examples={
            reason: tuple(place.removeprefix(base) for place in places) for reason, places in bad.examples.items()
        },
        lengths={side: _percentiles(values) for side, values in lengths.items()},
        cut_prompts=count["cut_prompts"],
        cut_completions=count["cut_completions"],
        completions=count["completions"],
        unterminated=count["unterminated"],
        duplicates=_repeated(seen),
        identical=count["identical"],
        notes=tuple(notes),
    )
    kept = {"report": report.to_json(), "fingerprint": content.hexdigest(), "largest": count["largest"]}
    entry = storage.flushed(folder / _ROWS)
    storage.write_sealed(folder / _REPORT, kept | {"bytes": entry["bytes"], "rows": entry["sha256"]})


def _percentiles(counted: Mapping[int, int]) -> tuple[int, int, int, int]:
    """p5, p50, p95 and max of a counted multiset, by the nearest rank."""
    values = sorted(counted)
    cumulative = [*accumulate(counted[value] for value in values)]  # cumulative counts
    p5, p50, p95, top = (
        values[bisect_right(cumulative, round((cumulative[-1] - 1) * quantile))] for quantile in (0.05, 0.5, 0.95, 1)
    )
    return p5, p50, p95, top


def _repeated(seen: array[int]) -> int:
    """Number of repeated hashes; sorts them in place."""
    hashes = np.frombuffer(seen, np.uint64)
    hashes.sort()
    return sum(
        int((hashes[i + 1 : i + BLOCK + 1] == hashes[i : i + BLOCK][: len(hashes) - i - 1]).sum())
        for i in range(0, len(hashes), BLOCK)
    )


def _schema(extra: tuple[Column, ...], token_keys: Sequence[str]) -> Any:
    import pyarrow

    ids, mask = pyarrow.list_(pyarrow.int32()), pyarrow.list_(pyarrow.uint8())
    fields = {"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids, "chosen_mask": mask, "rejected_mask": mask}
    fields |= {"where": pyarrow.string(), "prompt_key": pyarrow.uint64(), "raw_prompt_key": pyarrow.uint64()}
    fields |= {f"column.{column.name}": pyarrow.float64() for column in extra}
    fields |= {f"tokens.{key}": pyarrow.list_(pyarrow.float64()) for key in token_keys}
    return pyarrow.schema(list(fields.items()))


def _record(pair: EncodedPair, base: str) -> dict[str, Any]:
    def packed(mask: list[bool] | None) -> list[int]:
        return [] if mask is None or all(mask) else [int(value) for value in mask]

    return {
        "prompt_ids": pair.prompt_ids,
        "chosen_ids": pair.chosen_ids,
        "rejected_ids": pair.rejected_ids or [],
        "chosen_mask": packed(pair.chosen_mask),
        "rejected_mask": packed(pair.rejected_mask),
        "where": pair.where.removeprefix(base),
        "prompt_key": int(pair.prompt_key, 16),
        "raw_prompt_key": int(pair.raw_prompt_key or pair.prompt_key, 16),
        **{f"column.{column}": value for column, value in pair.columns.items()},
        **{f"tokens.{key}": values for key, values in pair.token_columns.items()},
    }
