"""Rows of one file: JSON lines, JSON arrays, CSV, Parquet, compressed or not. Independent of the format of a row.

The file type is detected from the first bytes; the name only distinguishes CSV and TSV. At most one row is in memory.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from prefopt.data.bad_rows import RowProblem, Stored
from prefopt.errors import DataError

SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".csv", ".tsv")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
MAX_ROW_BYTES = 10_000_000

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}
_HEAD = 1 << 16  # bytes from which the file type is detected
_CHUNK = 1 << 18
CONVERT = "convert the file, or --data.on_bad_row skip"


class TextRow(dict[str, Any]):
    """A row of a file format in which every value is text."""


class TwiceNamed(dict[str, Any]):
    """A JSON object with repeated keys; it has the last value of each."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.twice = {key for key, number in Counter(key for key, _ in pairs).items() if number > 1}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    return out if len(out) == len(pairs) else TwiceNamed(pairs)


@dataclass(frozen=True)
class Container:
    """The type of a file. Args: layout: `lines`, `array`, `values`, `csv`, `tsv` or `parquet`; compression: or ""."""

    path: Path
    name: str
    layout: str
    compression: str

    def __str__(self) -> str:
        return f"{self.compression} {self.layout}".strip()

    def records(self, max_row_bytes: int) -> Iterator[tuple[int, object]]:
        """(number from 1, the row or what is wrong with it).

        The number is that of the line in JSON lines and CSV, and that of the row in all other formats.

        Raises: DataError where the file cannot be read, or has no rows.
        """
        number = 0
        try:
            rows = _parquet(self.path, self.name) if self.layout == "parquet" else self._text(max_row_bytes)
            for number, item in rows:
                yield number, item
        except _UNREADABLE as error:
            place = f" after row {number:,}" if number else ""
            as_what = f" as {self.compression}" if self.compression else ""
            raise DataError(f"{self.name}: cannot be read{as_what}{place}: {error_line(error)}") from None
        if not number:
            empty = "the file has no rows" if self.layout != "lines" else "the file is empty"
            raise DataError(f"{self.name}: {empty}" + ", expected one JSON object per line" * (self.layout == "lines"))

    def _text(self, max_row_bytes: int) -> Iterator[tuple[int, object]]:
        with _opened(self.path, self.compression) as file:
            if self.layout in ("csv", "tsv"):
                yield from _table(file, self.name, self.layout == "tsv", max_row_bytes)
            elif self.layout == "lines":
                yield from _lines(file, max_row_bytes)
            else:
                for number, value in enumerate(_values(file, self.name, self.layout == "array", max_row_bytes), 1):
                    yield number, value if isinstance(value, RowProblem) else _json(value)


_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError)


def container(path: Path, name: str) -> Container:
    """The type of the file at `path`, from its first bytes.

    Raises: DataError where it cannot be read, or is of an unsupported type, which the error names.
    """
    try:
        with path.open("rb") as file:
            compression = _compression(file.read(8))
        with _opened(path, compression) as stream:
            head = stream.read(_HEAD)
    except _UNREADABLE as error:
        raise DataError(f"{name}: cannot be read: {error_line(error)}") from None
    plain_name = path.name.lower()
    if compression:
        for suffix in COMPRESSED:
            plain_name = plain_name.removesuffix(suffix)
    layout = _layout(head, Path(plain_name).suffix, name)
    if layout == "parquet" and compression:
        raise DataError(f"{name}: a Parquet file inside {compression}: decompress it first")
    return Container(path, name, layout, compression)


def _compression(head: bytes) -> str:
    return next((what for magic, what in _MAGIC.items() if head.startswith(magic)), "")


def _layout(head: bytes, suffix: str, name: str) -> str:
    if head.startswith(b"PAR1") or suffix == ".parquet":
        return "parquet"
    if twice := _compression(head):
        raise DataError(f"{name}: {twice} inside a compressed file: decompress it first")
    if head.startswith(b"ARROW1") or suffix == ".arrow":
        raise DataError(f"{name}: a single Arrow file; give the folder that datasets.save_to_disk has written")
    if head[257:262] == b"ustar":
        raise DataError(f"{name}: a tar archive: unpack it and give the file or folder")
    encoding = json.detect_encoding(head).replace("-le", "le").replace("-be", "be") if head else "utf-8"
    if not encoding.startswith("utf-8"):
        raise DataError(f"{name}: {encoding.upper()} text, expected UTF-8 (iconv -f {encoding.upper()} -t UTF-8)")
    if suffix in (".csv", ".tsv"):
        return suffix[1:]
    lines = head.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n", 2)
    if lines[0].startswith(b"["):
        return "array"
    # An object over several lines, as json.dump(indent=2) and jq write it: its first line is not JSON and the next one
    # does not begin an object.
    multi_line = len(lines) > 1 and lines[0].startswith(b"{") and not lines[1].lstrip().startswith(b"{")
    return "values" if multi_line and isinstance(_json(lines[0]), RowProblem) and lines[1].strip() else "lines"


def _opened(path: Path, compression: str) -> Any:  # a binary file of one of several classes
    """The file's bytes, decompressed."""
    if compression == "gzip":
        return gzip.open(path)
    if compression == "bzip2":
        return bz2.open(path)
    if compression == "xz":
        return lzma.open(path)
    if compression in ("zstd", "lz4"):
        import pyarrow

        stream = pyarrow.input_stream(str(path), compression=compression)
        return io.BufferedReader(stream, _CHUNK)
    if compression == "zip":
        archive = zipfile.ZipFile(path)
        members = [one for one in archive.namelist() if not one.endswith("/") and not one.startswith("__MACOSX")]
        if len(members) != 1:
            raise zipfile.BadZipFile(f"a zip archive of {len(members)} files: unpack it and give the file or folder")
        try:
            return archive.open(members[0])
        except RuntimeError as error:  # it is encrypted
            raise zipfile.BadZipFile(str(error)) from None
    return path.open("rb")


# JSON


def _lines(file: IO[bytes], max_row_bytes: int) -> Iterator[tuple[int, object]]:
    number = 0
    while line := file.readline(max_row_bytes + 1):
        number += 1
        if len(line) > max_row_bytes and not line.endswith(b"\n"):
            size = len(line)
            while not line.endswith(b"\n") and (line := file.readline(1 << 20)):
                size += len(line)
            yield number, _too_large(size, max_row_bytes)
        elif line.strip(b"\xef\xbb\xbf \t\r\n"):
            yield number, _json(line)


def _too_large(size: int, most: int) -> RowProblem:
    return RowProblem("row too large", "", f"a row of {size / 1e6:.1f} MB", f"at most {most / 1e6:.1f} MB")


def _json(text: bytes) -> object:
    """Parse one JSON value; returns a RowProblem where it is broken."""
    try:
        return json.loads(text.strip(b"\r\n").decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return RowProblem("invalid UTF-8", "", f"byte {error.start + 1} is not UTF-8", "UTF-8 text", CONVERT)
    except json.JSONDecodeError as error:
        if b"\r" in text.strip() and b"\n" not in text.strip():
            found = "lines that end with a carriage return only"
            return RowProblem("broken JSON", "", found, "line feeds (LF or CRLF)", CONVERT)
        return RowProblem("broken JSON", "", f"broken JSON ({error.msg} at column {error.colno})", "one JSON object")
    except RecursionError:
        return RowProblem("nested too deeply", "", "JSON nested too deeply", "fewer levels of lists and objects")
    except ValueError:  # Python parses integers up to a limit of digits
        most = f"{sys.get_int_max_str_digits():,}"
        return RowProblem("number too long", "", f"an integer of more than {most} digits", f"at most {most} digits")


_OUTSIDE, _INSIDE = re.compile(rb'["{}\[\],]'), re.compile(rb'["\\]')  # of a string


def _values(file: IO[bytes], name: str, array: bool, max_row_bytes: int) -> Iterator[bytes | RowProblem]:
    """The elements of a JSON array, or of concatenated objects, as text, one at a time.

    Only quotes, brackets and commas are parsed, so an element that is broken or too large does not affect the next one.
    Raises: DataError where an array does not end, or where text follows it.
    """
    base = 1 if array else 0  # nesting depth between two elements
    depth, inside, escaped = 0, False, False
    parts: list[bytes] = []
    size = 0

    def keep(piece: bytes) -> None:
        nonlocal size
        size += len(piece)
        if size <= max_row_bytes:
            parts.append(piece)
        else:
            parts.clear()

    def element() -> Iterator[bytes | RowProblem]:
        nonlocal size
        text = b"".join(parts).strip()
        if size > max_row_bytes:
            yield _too_large(size, max_row_bytes)
        elif text:
            yield text
        parts.clear()
        size = 0

    ended, first = False, True
    while chunk := file.read(_CHUNK):
        if first:
            chunk, first = chunk.removeprefix(b"\xef\xbb\xbf"), False
        at = start = 0
        while True:
            if inside:
                at, escaped = (at + 1, False) if escaped else (at, False)
                mark = _INSIDE.search(chunk, at)
                if mark is None:
                    break
                at = mark.end()
                if mark[0] == b'"':
                    inside = False
                elif at == len(chunk):
                    escaped = True
                    break
                else:
                    at += 1
                continue
            mark = _OUTSIDE.search(chunk, at)
            if mark is None:
                break
            at, what = mark.end(), mark[0]
            if ended:
                raise DataError(f"{name}: more text after the JSON array, expected one array, or one object per line")
            if what == b'"':
                inside = True
            elif what in b"[{":
                depth += 1
                if array and depth == base:
                    start = at
            elif what == b",":
                if array and depth == base:
                    keep(chunk[start : mark.start()])
                    yield from element()
                    start = at
            else:
                depth -= 1
                if array and depth == 0:
                    keep(chunk[start : mark.start()])
                    yield from element()
                    start, ended = at, True
                elif not array and depth <= 0:
                    keep(chunk[start:at])
                    yield from element()
                    start, depth = at, 0
        keep(chunk[start:])
    if (array and not ended) or (inside or depth):
        raise DataError(f"{name}: the JSON ends too early, in its last element: is the file complete?")
    if size and not b"".join(parts).isspace():
        if array:
            raise DataError(f"{name}: more text after the JSON array, expected one array, or one object per line")
        yield from element()


# CSV


def _table(file: IO[bytes], name: str, tabs: bool, max_row_bytes: int) -> Iterator[tuple[int, object]]:
    """Rows of CSV or TSV as `TextRow`s with the names of the header, each with its first line number."""
    csv.field_size_limit(max(csv.field_size_limit(), max_row_bytes))
    begin = 1

    def lines() -> Iterator[str]:
        while line := text.readline(max_row_bytes + 1):
            if len(line) > max_row_bytes:
                raise csv.Error(f"a line of more than {max_row_bytes / 1e6:.1f} MB")
            yield line

    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        source = lines()
        blank, first = next(((i, line) for i, line in enumerate(source) if line.strip()), (0, ""))
        delimiter = "\t" if tabs else max(",;\t|", key=first.count)
        reader = csv.reader(chain([first], source), delimiter=delimiter, strict=True)
        names = next(reader, [])
        twice = [key for i, key in enumerate(names) if key in names[:i]]
        if twice:
            raise DataError(f"{name}: two columns are named '{twice[0]}', expected unique names")
        begin = blank + reader.line_num + 1
        for row in reader:
            size = sum(map(len, row))
            if size > max_row_bytes:
                yield begin, _too_large(size, max_row_bytes)
            elif row and len(row) != len(names):
                expected = f"{len(names):,}, as in the first line"
                yield begin, RowProblem("wrong number of fields", "", f"{len(row):,} fields", expected)
            elif any(_ESCAPED.search(value) for value in row):
                yield begin, RowProblem("invalid UTF-8", "", "bytes that are not UTF-8", "UTF-8 text", CONVERT)
            elif row:
                yield begin, TextRow(zip(names, row, strict=True))
            begin = blank + reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{name}:{begin}: broken CSV ({error}), expected rows whose quotes are closed") from None
    finally:
        text.close()


_ESCAPED = re.compile("[\udc80-\udcff]")  # surrogateescape: bytes that are not UTF-8


# Arrow


def _parquet(path: Path, name: str) -> Iterator[tuple[int, object]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            names = file.schema_arrow.names
            twice = [key for i, key in enumerate(names) if key in names[:i]]
            if twice:
                raise DataError(f"{name}: two columns are named '{twice[0]}', expected unique names")
            for batch in file.iter_batches(batch_size=256):
                for row in rows_of(batch):
                    number += 1
                    yield number, row
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        place = f" after row {number:,}" if number else ""
        raise DataError(f"{name}: cannot be read as Parquet{place}: {error_line(error)}") from None


def rows_of(batch: Any) -> Iterator[object]:
    """The rows of an Arrow table as objects.

    Columns of type `arrow.json`, which `datasets` writes for values of mixed types, are decoded, in lists and structs
    too. A value of any other extension type becomes `Stored`. Null fields of a struct are removed, since tables store
    missing keys as null.
    """
    decoders = {field.name: decoder for field in batch.schema if (decoder := _decoder(field)) is not None}
    for row in batch.to_pylist():
        try:
            for key, decode in decoders.items():
                row[key] = decode(row[key])
        except RowProblem as problem:
            yield problem
        else:
            yield row


def _decoder(field: Any) -> Callable[[Any], Any] | None:
    """The function that decodes values of an Arrow field; None where none is needed."""
    import pyarrow

    kind = field.type
    metadata = field.metadata or {}
    name = getattr(kind, "extension_name", None) or metadata.get(b"ARROW:extension:name", b"").decode()
    if name == "arrow.json":
        return lambda value: None if value is None else _decoded(value, field.name)
    if name:
        return lambda value: None if value is None else Stored(name)
    types = pyarrow.types
    if types.is_struct(kind):
        parts = {kind.field(i).name: _decoder(kind.field(i)) for i in range(kind.num_fields)}

        def struct(value: Any) -> Any:
            if value is None:
                return None
            return {
                key: part if (decode := parts[key]) is None else decode(part)
                for key, part in value.items()
                if part is not None
            }

        return struct
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or _is_view(kind):
        item = _decoder(kind.value_field)
        return None if item is None else lambda value: None if value is None else [item(one) for one in value]
    if types.is_map(kind):
        of = _decoder(kind.item_field)
        return None if of is None else lambda value: None if value is None else [(key, of(one)) for key, one in value]
    return None


def _is_view(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_list_view(kind) or pyarrow.types.is_large_list_view(kind))


def _decoded(text: Any, name: str) -> object:
    value = _json(text.encode(errors="surrogatepass") if isinstance(text, str) else bytes(text))
    if isinstance(value, RowProblem):
        value.key = name
        raise value
    return value


def error_line(error: BaseException) -> str:
    """The first line of an exception's message, at most 200 characters."""
    message = getattr(error, "strerror", None) or str(error)
    return (str(message).strip().splitlines() or [type(error).__name__])[0][:200]
