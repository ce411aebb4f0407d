"""From a file to `PairRow`s: which keys a row has, what its prompt is, what is wrong with it. Knows no tokenizer.

Every complaint is one line, `file:line: 'key': what was found, what was expected (the nearest mend)`.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefopt.data.content import file_hash
from prefopt.errors import DataError, did_you_mean
from prefopt.types import Column, PairRow

OnBadRow = Literal["error", "skip"]
Messages = list[dict[str, Any]]

HH_TURN = "\n\nAssistant:"
MAX_ROW_BYTES = 10_000_000
DROP = "drop the row, or --data.on_bad_row skip"
KEYS = ("prompt", "chosen", "rejected", "completion", "messages")
_SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}
_SPLITS |= {"dev": "validation", "eval": "eval"}


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. `reason` is what reports count by; `message` is the whole line for a person."""

    where: str
    reason: str
    message: str


class RowProblem(Exception):
    """Raised on the way from a row to its tokens, caught where rows are counted; never seen by a user as it is.

    Args:
        reason: a few words to count by.
        key: the key at fault, or "" for the row as a whole.
        found, expected: the two halves of the complaint.
        mend: what the user can do about it.
    """

    def __init__(self, reason: str, key: str, found: str, expected: str, mend: str = DROP) -> None:
        super().__init__(reason)
        self.reason, self.key, self.found, self.expected, self.mend = reason, key, found, expected, mend

    def at(self, where: str) -> BadRow:
        key = f"'{self.key}': " if self.key else ""
        return BadRow(where, self.reason, f"{where}: {key}{self.found}, expected {self.expected} ({self.mend})")


@dataclass(frozen=True)
class RowReport:
    """All rows of a file in memory: for small files and for looking at one. Training goes through `encode_file`."""

    rows: list[PairRow]
    bad: list[BadRow]
    formats: Mapping[str, int]

    @property
    def dropped(self) -> dict[str, int]:
        """How many rows were dropped, by reason."""
        return dict(Counter(row.reason for row in self.bad))


def read_rows(
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    need_rejected: bool = True,
    extra: tuple[Column, ...] = (),
    on_bad_row: OnBadRow = "error",
    max_row_bytes: int = MAX_ROW_BYTES,
) -> RowReport:
    """All rows of a file, good ones and bad ones apart.

    Args: see `RowReader`; on_bad_row: `error` stops at the first bad row, `skip` collects them.
    Raises: DataError when the file cannot be read, or at a bad row under `error`.
    """
    reader = RowReader(path, columns=columns, need_rejected=need_rejected, extra=extra, max_row_bytes=max_row_bytes)
    rows: list[PairRow] = []
    bad: list[BadRow] = []
    for row in (items := iter(reader)):
        if isinstance(row, PairRow):
            rows.append(row)
        elif on_bad_row == "error":
            raise first_bad_row(row, items)
        else:
            bad.append(row)
    return RowReport(rows, bad, dict(reader.formats))


def first_bad_row(row: BadRow, rest: Iterator[PairRow | BadRow]) -> DataError:
    """The error for a bad row under `on_bad_row: error`, with the number of bad rows that follow it in the file."""
    more = sum(isinstance(item, BadRow) for item in rest)
    return DataError(row.message + (f"; {more:,} more bad row{'s' * (more > 1)} in the file" if more else ""))


class RowReader:
    """Goes through a file once and gives each row as a `PairRow` or a `BadRow`, holding one row at a time.

    Args:
        path: a JSONL or Parquet file, a folder of them, a folder written by `datasets.save_to_disk`, or a hub id; a
            split is named after a colon (`FOLDER:train`).
        columns: our key -> the file's key.
        need_rejected: whether a row must be a pair. Where it need not and is one all the same, it is checked like any
            pair and its rejected side left out, so that one file gives the same rows to every method.
        extra: numbers that the method reads.
        max_row_bytes: longer lines are bad rows; they are never held in memory.
        prompts_only: whether a row may be a prompt without any completion; its chosen side is then None.
        tokenizer: a hash; rows that carry it in `tokenizer` carry this tokenizer's ids too, which are then read.

    Raises: DataError when there is nothing to read.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        columns: Mapping[str, str] | None = None,
        need_rejected: bool = True,
        extra: tuple[Column, ...] = (),
        max_row_bytes: int = MAX_ROW_BYTES,
        prompts_only: bool = False,
        tokenizer: str | None = None,
    ) -> None:
        self.prompts_only, self.tokenizer = prompts_only, tokenizer
        self.columns, self.need_rejected, self.extra = dict(columns or {}), need_rejected, extra
        self.formats: Counter[str] = Counter()  # of the rows given so far
        known = [*KEYS, *(column.name for column in extra)]
        for key in self.columns:
            if key not in known:
                near = did_you_mean(key, known) or ";"
                raise DataError(f"data.columns: unknown key '{key}'{near} known: {', '.join(known)}")
        self.source = open_source(str(path), max_row_bytes)

    def __iter__(self) -> Iterator[PairRow | BadRow]:
        for where, item in self.source.records():
            try:
                if isinstance(item, RowProblem):
                    raise item
                row, kind = self._parse(item, where)
            except RowProblem as problem:
                yield problem.at(where)
            else:
                self.formats[kind] += 1
                yield row

    def _parse(self, record: object, where: str) -> tuple[PairRow, str]:
        if not isinstance(record, dict):
            raise RowProblem(
                "not an object", "", f"found {_kind(record)}", "a JSON object, one per line", "write the file as JSONL"
            )
        if self.tokenizer is not None and record.get("tokenizer") == self.tokenizer:
            return self._sampled(record, where), "token ids"
        if self.prompts_only and all(self._get(record, key) is None for key in ("chosen", "completion", "messages")):
            return self._prompt_alone(record, where)
        if self.prompts_only and self._get(record, "prompt") is not None:
            try:
                return self._whole(record, where)
            except RowProblem:  # what else the row holds need not be a pair
                return self._prompt_alone(record, where)
        return self._whole(record, where)

    def _prompt_alone(self, record: Mapping[str, Any], where: str) -> tuple[PairRow, str]:
        question = self._side(record, "prompt")
        self._check_question(question)
        return PairRow(question, None, None, {}, where), "prompt alone"

    def _whole(self, record: Mapping[str, Any], where: str) -> tuple[PairRow, str]:
        chosen_key = next(
            (
                key
                for key in ("chosen", "completion", "messages")
                if self._get(record, key) is not None and (key == "chosen" or not self.need_rejected)
            ),
            "chosen",
        )
        chosen = self._side(record, chosen_key)
        rejected = None
        if self.need_rejected or (chosen_key == "chosen" and self._get(record, "rejected") is not None):
            rejected = self._side(record, "rejected")
        if rejected is not None and isinstance(rejected, str) != isinstance(chosen, str):
            raise RowProblem(
                "mixed types",
                self._key("rejected"),
                f"{_kind(rejected)} where '{self._key(chosen_key)}' is {_kind(chosen)}",
                "both sides of one kind",
            )
        prompt: str | Messages | None = None
        if self._get(record, "prompt") is not None:
            prompt = self._side(record, "prompt")
        prompt, chosen, rejected, kind = self._split(prompt, chosen, rejected, chosen_key)
        self._check_completion(chosen, chosen_key)
        if rejected is not None:
            self._check_completion(rejected, "rejected")
            self._check_different(chosen, rejected, chosen_key)
        numbers = {column.name: self._number(record, column) for column in self.extra}
        return PairRow(prompt, chosen, rejected if self.need_rejected else None, numbers, where), kind

    # What the prompt is: five formats.

    def _split(
        self, prompt: str | Messages | None, chosen: str | Messages, rejected: str | Messages | None, chosen_key: str
    ) -> tuple[str | Messages, str | Messages, str | Messages | None, str]:
        if isinstance(prompt, list):
            self._check_question(prompt)
            chosen = _as_turn(chosen) if isinstance(chosen, str) else chosen
            rejected = _as_turn(rejected) if isinstance(rejected, str) else rejected
            return prompt, chosen, rejected, "messages, explicit prompt"
        if isinstance(prompt, str) and isinstance(chosen, str):
            return prompt, chosen, rejected, "text, explicit prompt"
        if isinstance(prompt, str) and isinstance(chosen, list) and chosen and chosen[0]["role"] == "assistant":
            return [{"role": "user", "content": prompt}], chosen, rejected, "messages, explicit prompt text"
        if isinstance(chosen, str):
            head, text = self._dialogue(chosen, chosen_key)
            if isinstance(rejected, str):
                other, rejected = self._dialogue(rejected, "rejected")
                if head != other:
                    raise RowProblem(
                        "different dialogues",
                        self._key("rejected"),
                        f"a dialogue that differs from '{self._key(chosen_key)}' before the last '\\n\\nAssistant:'",
                        "one prompt for both sides",
                    )
            return head, text, rejected, "text, dialogue (prompt up to the last '\\n\\nAssistant:')"
        assert rejected is None or isinstance(rejected, list)
        cut = self._shared_turns(chosen, rejected, chosen_key)
        kind = "messages, implicit prompt" if rejected is not None else "messages, prompt up to the first answer"
        return chosen[:cut], chosen[cut:], rejected and rejected[cut:], kind

    def _dialogue(self, text: str, key: str) -> tuple[str, str]:
        head, turn, completion = text.rpartition(HH_TURN)
        if not turn:
            raise RowProblem(
                "no prompt",
                self._key(key),
                "text without a '\\n\\nAssistant:' turn in a row without a prompt",
                f"a key '{self._key('prompt')}', or a dialogue",
                "add the prompt, or name its key under data.columns",
            )
        return head + turn, completion

    def _shared_turns(self, chosen: Messages, rejected: Messages | None, chosen_key: str) -> int:
        if rejected is None:
            first = (i for i, message in enumerate(chosen) if message["role"] == "assistant")
            cut = next(first, len(chosen))
            if cut in (0, len(chosen)):
                found = "an assistant turn first" if chosen and cut == 0 else "no assistant turn"
                raise RowProblem("no prompt", self._key(chosen_key), found, "a question and then an answer")
            return cut
        self._check_different(chosen, rejected, chosen_key)
        cut = 0
        while cut < min(len(chosen), len(rejected)) and chosen[cut] == rejected[cut]:
            cut += 1
        # Sides that part at a user turn answer different questions; one side may also end where the other goes on.
        parted = {side[cut]["role"] if cut < len(side) else "" for side in (chosen, rejected)}
        if cut == 0 or parted != {"assistant"} or chosen[cut - 1]["role"] == "assistant":
            raise RowProblem(
                "different dialogues",
                self._key("rejected"),
                f"messages that part from '{self._key(chosen_key)}' at turn {cut + 1}, which is not an answer on both "
                "sides to a shared question",
                "the same messages up to two different answers",
            )
        return cut

    # One value of a row.

    def _key(self, key: str) -> str:
        return self.columns.get(key, key)

    def _get(self, record: Mapping[str, Any], key: str) -> Any:
        return record.get(self._key(key))

    def _missing(self, record: Mapping[str, Any], key: str) -> RowProblem:
        keys = sorted(str(name) for name, value in record.items() if value is not None)
        found = f"the row has {', '.join(map(repr, keys[:12])) or 'no keys'}"
        used = {self._key(other) for other in KEYS if other != key}
        near = did_you_mean(self._key(key), [name for name in keys if name not in used])
        what = "a completion" if key in KEYS else "a number"
        return RowProblem("missing key", self._key(key), "missing", f"{what}; {found}{near}", MAP)

    def _side(self, record: Mapping[str, Any], key: str) -> str | Messages:
        value = self._get(record, key)
        name = self._key(key)
        if value is None:
            raise self._missing(record, key)
        if isinstance(value, str):
            _check_text(value, name)
            return value
        if not isinstance(value, list):
            raise RowProblem("not a string", name, f"found {_kind(value)}", "a string or a list of messages")
        return [_message(message, f"{name}[{i}]") for i, message in enumerate(value)]

    def _check_question(self, prompt: str | Messages) -> None:
        if isinstance(prompt, list) and (not prompt or prompt[-1]["role"] == "assistant"):
            raise RowProblem(
                "prompt without a question",
                self._key("prompt"),
                "ends with an assistant turn" if prompt else "an empty list",
                "messages that end with a turn to answer",
            )

    def _sampled(self, record: Mapping[str, Any], where: str) -> PairRow:
        """A row of what a policy was asked and has answered, by its token ids; its texts are for people."""
        keys = ["prompt_ids", "chosen_ids", *(["rejected_ids"] if self.need_rejected else [])]
        for key in keys:
            ids = record.get(key)
            if not (isinstance(ids, list) and ids and all(isinstance(i, int) and i >= 0 for i in ids)):
                raise RowProblem("bad token ids", key, "no list of token ids", "what a round has written")
        numbers = {column.name: self._number(record, column) for column in self.extra}
        texts = [record.get(key) for key in ("prompt", "chosen", "rejected")]
        sides = (texts[0] or "", texts[1] or "", (texts[2] or "") if self.need_rejected else None)
        return PairRow(*sides, numbers, where, tuple(record[key] for key in keys))

    def _check_different(self, chosen: object, rejected: object, chosen_key: str) -> None:
        if chosen == rejected:
            same = f"the same as '{self._key(chosen_key)}'"
            raise RowProblem("chosen equals rejected", self._key("rejected"), same, "two different completions")

    def _check_completion(self, completion: str | Messages, key: str) -> None:
        name = self._key(key)
        if isinstance(completion, str):
            if not completion.strip():
                raise RowProblem("empty completion", name, "empty", "a non-empty completion")
            return
        if not completion:
            raise RowProblem("empty completion", name, "no messages", "a non-empty completion")
        if completion[0]["role"] != "assistant" or completion[-1]["role"] != "assistant":
            end = "begins" if completion[0]["role"] != "assistant" else "ends"
            turn = completion[0 if end == "begins" else -1]["role"]
            raise RowProblem("not an answer", name, f"{end} with a '{turn}' turn", "an assistant turn at both ends")
        for message in completion:
            if message["role"] == "assistant" and not message["content"].strip():
                raise RowProblem("empty completion", name, "an empty assistant turn", "a non-empty completion")

    def _number(self, record: Mapping[str, Any], column: Column) -> float:
        names = [self._key(column.name), *column.aliases]
        name = next((name for name in names if record.get(name) is not None), None)
        if name is None:
            raise self._missing(record, column.name)
        value = record[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RowProblem("bad number", name, f"found {_kind(value)}", "a number")
        if not math.isfinite(value):
            raise RowProblem("bad number", name, f"found {value}", "a finite number")
        if not column.low <= value <= column.high:
            raise RowProblem("bad number", name, f"found {value:g}", f"{column.low:g} to {column.high:g}")
        return float(value)


MAP = "rename it, or name it under data.columns"


def _as_turn(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    names = {"str": "a string", "list": "a list", "dict": "an object", "bytes": "binary data", "tuple": "a map's entry"}
    names |= {"Decimal": f"the decimal {value}", "datetime": "a time", "date": "a date", "timedelta": "a duration"}
    return names.get(type(value).__name__, f"a {type(value).__name__}")


def _check_text(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowProblem("invalid text", name, "half of a surrogate pair", "valid Unicode") from None


def _message(message: object, name: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RowProblem("bad message", name, f"found {_kind(message)}", "an object with 'role' and 'content'")
    out: dict[str, str] = {}
    for key, value in message.items():
        if isinstance(value, str):
            _check_text(value, f"{name}.{key}")
            out[key] = value
        elif value is not None:  # tables fill the keys that a message lacks with null
            raise RowProblem("bad message", f"{name}.{key}", f"found {_kind(value)}", "a string")
    for key in ("role", "content"):
        if key not in out:
            keys = ", ".join(f"'{key}'" for key in sorted(out)) or "nothing"
            raise RowProblem("bad message", name, f"a message with {keys}", "'role' and 'content'")
    return out


# Where rows come from. A source says what its content is (for the cache) and gives (where, record or problem).


class _Files:
    """JSONL and Parquet files."""

    def __init__(self, files: Sequence[tuple[str, Path]], max_row_bytes: int) -> None:
        self.files, self.max_row_bytes = files, max_row_bytes

    def content(self, memory: Path | None = None) -> str:
        """A hash of what the files hold; `memory` as in `file_hash`."""
        hashes = [f"{path.suffix == '.parquet'} {file_hash(path, memory)}" for _, path in self.files]
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def records(self) -> Iterator[tuple[str, object]]:
        for name, path in self.files:
            reader = _parquet if path.suffix == ".parquet" else _jsonl
            for number, item in reader(path, name, self.max_row_bytes):
                yield f"{name}:{number}", item


class _Table:
    """A `datasets.Dataset`, from a folder or from the hub."""

    def __init__(self, name: str, table: Any) -> None:
        self.name, self.table = name, table

    def content(self, memory: Path | None = None) -> str:
        """A hash of the rows: of the files that they are mapped from, where there are such."""
        files = [Path(file["filename"]) for file in self.table.cache_files]
        if files and self.table._indices is None:
            hashes = "\n".join(file_hash(file, memory) for file in files)
            return hashlib.sha256(f"arrow {len(self.table)}\n{hashes}".encode()).hexdigest()
        import pyarrow

        digest = _Digest()
        with pyarrow.ipc.new_stream(pyarrow.PythonFile(digest, mode="w"), self.table.features.arrow_schema) as writer:
            for batch in self._batches():
                writer.write_table(batch)
        return digest.hexdigest()

    def records(self) -> Iterator[tuple[str, object]]:
        number = 0
        for batch in self._batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{self.name}:{number}", row

    def _batches(self) -> Iterator[Any]:
        """Tables of some hundred rows, as they are stored: nothing in them is decoded."""
        return iter(self.table.with_format("arrow").iter(256))


class _Digest(io.RawIOBase):
    """A file that keeps nothing but the hash of what is written to it."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return len(data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _jsonl(path: Path, name: str, max_row_bytes: int) -> Iterator[tuple[int, object]]:
    number, rows = 0, 0
    try:
        with path.open("rb") as file:
            while line := file.readline(max_row_bytes + 1):
                number += 1
                if len(line) > max_row_bytes and not line.endswith(b"\n"):
                    rows += 1
                    size = len(line)
                    while not line.endswith(b"\n") and (line := file.readline(1 << 20)):
                        size += len(line)
                    yield (
                        number,
                        RowProblem(
                            "row too large",
                            "",
                            f"a row of {size / 1e6:.1f} MB",
                            f"at most {max_row_bytes / 1e6:.1f} MB",
                        ),
                    )
                elif line.strip(b"\xef\xbb\xbf \t\r\n"):
                    rows += 1
                    yield number, _json(line)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None
    if not rows:
        raise DataError(f"{name}: the file is empty, expected one JSON object per line")


def _json(line: bytes) -> object:
    try:
        return json.loads(line.rstrip(b"\r\n").decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RowProblem("invalid UTF-8", "", f"byte {error.start + 1} is not UTF-8", "UTF-8 text", CONVERT)
    except json.JSONDecodeError as error:
        return RowProblem("broken JSON", "", f"broken JSON ({error.msg} at column {error.colno})", "one JSON object")
    except (ValueError, RecursionError):
        return RowProblem("broken JSON", "", "JSON that Python cannot read", "one JSON object")


CONVERT = "convert the file, or --data.on_bad_row skip"


def _parquet(path: Path, name: str, max_row_bytes: int) -> Iterator[tuple[int, object]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            names = file.schema_arrow.names
            twice = [key for i, key in enumerate(names) if key in names[:i]]
            if twice:
                raise DataError(f"{name}: two columns are named '{twice[0]}', expected a name of its own for each")
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        place = f" behind row {number:,}" if number else ""
        raise DataError(f"{name}: cannot be read as Parquet{place}: {_line(error)}") from None
    if not number:
        raise DataError(f"{name}: the file has no rows")


def open_source(name: str, max_row_bytes: int = MAX_ROW_BYTES) -> _Files | _Table:
    """What stands at `name`: a file, a folder or a hub id, with `:split` after it where there are several.

    Raises: DataError when nothing is there or nothing in it can be read.
    """
    path, split = Path(name).expanduser(), ""
    if not path.exists() and ":" in name:
        base, split = name.rsplit(":", 1)
        path = Path(base).expanduser()
    if path.is_file():
        if split:
            raise DataError(f"{name}: a file has no splits; name the file alone: {path}")
        return _Files([(name, path)], max_row_bytes)
    if path.is_dir():
        return _folder(name, path, split, max_row_bytes)
    base = name.rsplit(":", 1)[0]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not path.parent.is_dir() and path.suffix not in _SUFFIXES:
        return _hub(name, base, split)
    near = _near_files(path)
    raise DataError(f"{name}: no such file or folder{near}")


_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder '{path.parent}' does not exist either"
    others = [other.name for other in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, others, n=1, cutoff=0.6)
    return f"; did you mean '{path.parent / near[0]}'?" if near else ""


def _folder(name: str, path: Path, split: str, max_row_bytes: int) -> _Files | _Table:
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        import datasets

        try:
            table = datasets.load_from_disk(str(path))
        except Exception as error:
            raise DataError(f"{name}: cannot be read by datasets: {_line(error)}") from None
        return _Table(name, _one_split(name, table, split))
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in _SUFFIXES and file.is_file() and not any(p.startswith(".") for p in file.parts[-2:])
    )
    if not files:
        raise DataError(f"{name}: nothing to read in this folder, expected .jsonl or .parquet files")
    # train.jsonl beside test.jsonl must never be read as one file.
    splits = {file: _split_of(file.relative_to(path)) for file in files}
    known = sorted({s for s in splits.values() if s})
    wanted = _SPLITS.get(split, split)
    if wanted:
        files = [file for file in files if splits[file] == wanted]
        if not files:
            raise DataError(f"{name}: no split '{split}' in this folder; it has {', '.join(known) or 'no splits'}")
    elif len(set(splits.values())) > 1:
        raise DataError(f"{name}: the folder holds several splits ({', '.join(known)}); name one: {path}:{known[-1]}")
    return _Files([(str(file), file) for file in files], max_row_bytes)


def _split_of(file: Path) -> str:
    for part in (file.name, *reversed(file.parts[:-1])):
        word = re.split(r"[^a-z]", part.lower(), maxsplit=1)[0]
        if word in _SPLITS:
            return _SPLITS[word]
    return ""


def _hub(name: str, base: str, split: str) -> _Table:
    import datasets

    try:
        table = datasets.load_dataset(base)
    except Exception as error:
        raise DataError(
            f"{name}: neither a file or folder here nor a dataset that can be reached on the hub ({_line(error)}); "
            f"download it where there is a network (hf download --repo-type dataset {base} --local-dir DIR) and name "
            "DIR here; with HF_HUB_OFFLINE=1 only what was downloaded before is looked for"
        ) from None
    return _Table(name, _one_split(name, table, split))


def _one_split(name: str, table: Any, split: str) -> Any:
    if not hasattr(table, "keys"):
        if split:
            raise DataError(f"{name}: this dataset has no splits; leave ':{split}' out")
        return table
    splits = sorted(table.keys())
    if not split and len(splits) == 1:
        return table[splits[0]]
    if split not in splits:
        found = f"no split '{split}'{did_you_mean(split, splits)}" if split else "several splits"
        raise DataError(f"{name}: {found}; name one of: {', '.join(splits)} (as in {name.split(':')[0]}:{splits[-1]})")
    return table[split]


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
