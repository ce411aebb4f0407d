"""From `PairRow`s to token ids: boundary, BOS, terminator, truncation; encoded once per content, then memory-mapped.

Prompt and completion are tokenised together, so a token never differs from what the model would have seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from prefopt import storage
from prefopt.data.bad_rows import BadRow, BadRows, OnBadRow, RowProblem, first_bad_row
from prefopt.data.chat import Rendered, end_tokens, render, render_prompt
from prefopt.data.pairs import BLOCK, Concatenated, View
from prefopt.data.report import EXAMPLES, DataReport
from prefopt.data.rows import MAX_ROW_BYTES, Dialogues, Messages, RowReader
from prefopt.errors import DataError
from prefopt.storage import Damaged, Lock, Unreadable
from prefopt.types import Column, EncodedPair, PairRow

FORMAT_VERSION = 4  # raise it whenever the same file and settings would give other ids, masks or counts
_ROWS, _REPORT = "rows.arrow", "report.json"  # of a folder of the cache
_BATCH = 512  # rows tokenised at a time
_WRITTEN = 4096  # rows in one piece of the cache file


# One row.


@dataclass(frozen=True)
class CutPair:
    """An encoded pair and what truncation did to it. Lengths are those before it."""

    pair: EncodedPair
    lengths: tuple[int, ...]  # prompt, chosen and, in pairs, rejected
    cut_prompt: bool
    cut_completion: bool
    unterminated: int  # completions without a terminator


class Encoder:
    """Turns rows into token ids with one tokenizer.

    Args:
        tokenizer: one of transformers'.
        max_length: the most tokens that prompt and completion may have together.

    Raises: DataError when `max_length` leaves no room for a prompt token and a completion token.
    """

    form = "completions"  # of the sequences that it makes

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        if max_length < 2:
            raise DataError(
                f"data.max_length: found {max_length}, expected at least 2: a prompt token and a scored one"
            )
        self.tokenizer, self.max_length = tokenizer, max_length
        self.bos, self.eos, self.ends = added_bos(tokenizer), tokenizer.eos_token_id, end_tokens(tokenizer)
        self.terminators = terminators(tokenizer)

    def rows(self, rows: Iterable[PairRow]) -> Iterator[CutPair | BadRow]:
        """Each row encoded, or what is wrong with it, in order. Rows are tokenised a few hundred at a time."""
        rows = iter(rows)
        while batch := list(islice(rows, _BATCH)):
            prepared: list[tuple[Any, list[str]] | BadRow] = []
            for row in batch:
                try:
                    prepared.append(self._prepare(row))
                except RowProblem as problem:
                    prepared.append(problem.at(row.where))
            ids = iter(self._tokenize([text for one in prepared if not isinstance(one, BadRow) for text in one[1]]))
            for row, one in zip(batch, prepared, strict=True):
                if isinstance(one, BadRow):
                    yield one
                    continue
                mine = [next(ids) for _ in one[1]]
                try:
                    yield self._finish(row, one[0], mine)
                except RowProblem as problem:
                    yield problem.at(row.where)

    def _prepare(self, row: PairRow) -> tuple[Any, list[str]]:
        """(what `_finish` is to be told, the texts whose ids it is to be given)."""
        if row.ids is not None:  # a row that carries its ids needs no text
            return None, []
        sides = [self._render(row, key, side) for key, side in _sides(row)]
        return sides, [text for side in sides for text in _texts(side)]

    def _finish(self, row: PairRow, prepared: Any, ids: list[list[int]]) -> CutPair:
        if row.ids is not None:
            return self._sampled(row, row.ids)
        following = iter(ids)
        return self._pair(row, prepared, [[next(following) for _ in _texts(side)] for side in prepared])

    def prompt(self, prompt: str | Messages) -> list[int]:
        """The tokens of a prompt alone, as a policy reads them before it answers.

        Raises: RowProblem when the chat template refuses it, or nothing is left of it.
        """
        text = prompt if isinstance(prompt, str) else render_prompt(prompt, self.tokenizer)
        return self._with_bos(self._tokenize([text])[0])

    def _with_bos(self, prompt: list[int]) -> list[int]:
        """BOS exactly once, where this tokenizer adds one."""
        if self.bos is not None:
            begin = next((i for i, token in enumerate(prompt) if token != self.bos), len(prompt))
            prompt = [self.bos, *prompt[begin:]]
        if not prompt:
            raise RowProblem("empty prompt", "prompt", "no token", "at least one (this tokenizer adds no BOS)")
        return prompt

    def pair(self, row: PairRow) -> EncodedPair:
        """One row encoded. Raises: DataError with the complaint when it is a bad row."""
        (encoded,) = self.rows([row])
        if isinstance(encoded, BadRow):
            raise DataError(encoded.message)
        return encoded.pair

    def _render(self, row: PairRow, key: str, side: str | Messages) -> Rendered:
        return render(row.prompt, side, self.tokenizer, key, ends=self.ends)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text; one that stands there twice, as the prompt of both sides, is tokenised once."""
        if not texts:  # some tokenizers have no fast form and cannot take an empty list
            return []
        once = list(dict.fromkeys(texts))
        bare = {"return_attention_mask": False, "return_token_type_ids": False}
        ids = self.tokenizer(once, add_special_tokens=False, verbose=False, **bare)["input_ids"]
        known = dict(zip(once, ids, strict=True))
        return [known[text] for text in texts]

    def _pair(self, row: PairRow, sides: list[Rendered], parts: list[list[list[int]]]) -> CutPair:
        keys = [key for key, _ in _sides(row)]
        encoded = [self._side(*args) for args in zip(keys, sides, parts, strict=True)]
        prompt = encoded[0][0]
        assert all(other == prompt for other, _, _ in encoded), "one prompt text has given two lists of ids"
        prompt = self._with_bos(prompt)
        completions, masks = [ids for _, ids, _ in encoded], [mask for _, _, mask in encoded]
        whole = [self._ends(ids, side) for ids, side in zip(completions, sides, strict=True)]
        key = hashlib.sha256(sides[0].prompt.encode()).hexdigest()[:16]
        return self._cut(row, key, prompt, completions, masks, whole)

    def _sampled(self, row: PairRow, ids: tuple[list[int], ...]) -> CutPair:
        """A row that carries its ids. A completion that was not ended stays so: nothing is added to it."""
        prompt, *completions = ids
        masks = [[True] * len(side) for side in completions]
        whole = [side[-1] in self.terminators for side in completions]
        return self._cut(row, hashlib.sha256(str(prompt).encode()).hexdigest()[:16], prompt, completions, masks, whole)

    def _cut(
        self,
        row: PairRow,
        key: str,
        prompt: list[int],
        completions: list[list[int]],
        masks: list[list[bool]],
        whole: list[bool],
    ) -> CutPair:
        """At most `max_length` tokens of it. Args: key: of the prompt; whole: whether each completion is terminated."""
        lengths = (len(prompt), *(len(ids) for ids in completions))
        # The prompt's head goes first, cut by the longer side so that both sides keep one prompt; then the tails.
        room = max(self.max_length - max(lengths[1:]), 1)
        cut_prompt = len(prompt) > room
        if cut_prompt:
            prompt = prompt[:1] + prompt[len(prompt) - room + 1 :] if self.bos is not None else prompt[-room:]
        left = self.max_length - len(prompt)
        cut = [len(ids) > left for ids in completions]
        completions, masks = [ids[:left] for ids in completions], [mask[:left] for mask in masks]
        pair = EncodedPair(
            prompt_ids=prompt,
            chosen_ids=completions[0],
            rejected_ids=completions[1] if len(completions) > 1 else None,
            chosen_mask=masks[0],
            rejected_mask=masks[1] if len(completions) > 1 else None,
            columns=row.columns,
            where=row.where,
            prompt_key=key,
            raw_prompt_key=row.prompt_key,
        )
        ended = sum(end and not short for end, short in zip(whole, cut, strict=True))
        return CutPair(pair, lengths, cut_prompt, any(cut), len(completions) - ended)

    def _ends(self, ids: list[int], side: Rendered) -> bool:
        return side.terminated or (self.eos is not None and ids[-1] == self.eos)

    def _side(self, key: str, side: Rendered, parts: list[list[int]]) -> tuple[list[int], list[int], list[bool]]:
        """(prompt ids, completion ids, mask): `parts` are the ids of the texts that `_texts` names."""
        ids = parts[-1]
        for part in parts[:-1]:
            if ids[: len(part)] != part:
                raise RowProblem(
                    "token over the boundary",
                    key,
                    "its first characters merge with the end of the prompt into one token",
                    "a prompt that is a token prefix of the whole",
                    "move white space from the end of the prompt to the beginning of the completions",
                )
        marks = [len(part) for part in parts]
        boundary = marks[0]
        mask = [False] * (len(ids) - boundary)
        for begin, end in zip(marks[::2], marks[1::2], strict=True):
            if end == begin:
                raise RowProblem("empty completion", key, "no token", "a non-empty completion")
            mask[begin - boundary : end - boundary] = [True] * (end - begin)
            last = ids[end - 1]
            stop = last if side.terminated else self.eos
            if stop is not None and stop in ids[begin : end - 1]:
                text = self.tokenizer.convert_ids_to_tokens(stop)
                raise RowProblem("terminator inside", key, f"'{text}' inside a completion", "it at the end only")
        completion = ids[boundary:]
        if not side.terminated and self.eos is not None and completion[-1] != self.eos:
            completion, mask = [*completion, self.eos], [*mask, True]
        return ids[:boundary], completion, mask


def _sides(row: PairRow) -> list[tuple[str, str | Messages]]:
    assert row.chosen is not None, "a row without any completion has nothing to score"
    return [("chosen", row.chosen)] + ([("rejected", row.rejected)] if row.rejected is not None else [])


def _texts(side: Rendered) -> list[str]:
    """The beginnings whose ends are the boundaries of spans: the prompt first, the whole last."""
    return [side.text[:mark] for span in side.spans for mark in span]


def added_bos(tokenizer: Any) -> int | None:
    """The BOS id, if this tokenizer puts one before a text by itself; None otherwise."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def terminators(tokenizer: Any) -> frozenset[int]:
    """What ends a completion in training: EOS, and the token with which the chat template ends an assistant's turn."""
    found = {tokenizer.eos_token_id}
    if getattr(tokenizer, "chat_template", None):
        with suppress(RowProblem):  # a template that refuses the simplest of exchanges has no end to show
            turn = render([{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}], tokenizer)
            if turn.terminated:
                found.add(tokenizer(turn.text, add_special_tokens=False)["input_ids"][-1])
    return frozenset(found - {None})


def pad_token(tokenizer: Any) -> tuple[int, str | None]:
    """(the id to pad with, a sentence to say once where it is not the tokenizer's own).

    Raises: DataError when the tokenizer has neither a pad token nor EOS.
    """
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id, None
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has neither a pad token nor an EOS token, expected one of them")
    return tokenizer.eos_token_id, f"the tokenizer has no pad token; EOS '{tokenizer.eos_token}' pads instead"


def check_row_structure(pair: EncodedPair, tokenizer: Any) -> str | None:
    """What is wrong with an encoded pair, or None: an independent look at what `Encoder` promises.

    BOS once, at the start, where the tokenizer adds one; a prompt token and a scored completion token on each side;
    masks as long as completions; no pad token inside; one terminator at most.
    """
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    special = {*tokenizer.convert_tokens_to_ids(list(end_tokens(tokenizer))), eos}
    prompt = pair.prompt_ids
    if not prompt:
        return "the prompt has no token"
    if (bos_added := added_bos(tokenizer)) is not None and prompt[0] != bos_added:
        return f"BOS ({bos_added}) is not the first token"
    for side, ids, mask in (
        ("chosen", pair.chosen_ids, pair.chosen_mask),
        ("rejected", pair.rejected_ids, pair.rejected_mask),
    ):
        if ids is None or mask is None:
            continue
        if not ids or len(mask) != len(ids) or not any(mask):
            return f"{side}: {len(ids)} tokens, a mask of {len(mask)}, {sum(mask)} scored"
        whole = prompt + ids
        if bos is not None and whole[:2] == [bos, bos]:
            return f"{side}: BOS ({bos}) stands twice at the start"
        # Some chat templates begin each exchange with BOS, after the EOS of the one before.
        if bos is not None and bos != eos and any(b == bos and a != eos for a, b in pairwise(whole)):
            return f"{side}: BOS ({bos}) inside the row"
        if pad is not None and pad not in (eos, bos, tokenizer.unk_token_id) and pad in whole:
            return f"{side}: the pad token ({pad}) inside the row"
        if eos is not None and all(mask) and eos in ids[:-1]:
            return f"{side}: the terminator ({eos}) before the end of the completion"
        if len(ids) > 1 and ids[-1] == eos and ids[-2] in special:
            return f"{side}: two terminators ({ids[-2]}, {ids[-1]})"
    return None


# A file, in the cache.


class MappedPairs(View):
    """The encoded pairs of a cache folder, memory-mapped: any number of them costs no memory, one costs microseconds.

    Args:
        folder: one written by `encode_file`.
        path: the data's base, put before each row's place in `where`.
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
        )

    def facts(self, name: str, begin: int, end: int) -> np.ndarray:
        """See `pairs.facts`: read from the file's own tables of lengths, numbers and keys."""
        found = [np.empty(0, np.int64)]
        for at in range(max(bisect_right(self._starts, begin) - 1, 0), bisect_left(self._starts, end)):
            start, size = self._starts[at], len(self._chunks[at]["where"])
            found.append(_fact(self._chunks[at], name, max(begin - start, 0), min(end - start, size)))
        return np.concatenate(found[1:] or found)

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedPairs, (self.folder, self.path)


def _view(column: Any) -> Any:
    """A column of one record batch as numpy arrays over the mapped file; strings stay in arrow."""
    import pyarrow

    if pyarrow.types.is_list(column.type):
        return column.offsets.to_numpy(), column.values.to_numpy()
    return column if pyarrow.types.is_string(column.type) else column.to_numpy()


def _fact(chunk: Mapping[str, Any], name: str, begin: int, end: int) -> np.ndarray:
    """One fact of the rows `begin` to `end` of a chunk, see `pairs.facts`."""
    if name in ("prompt", "chosen", "rejected"):
        lengths: np.ndarray = np.diff(chunk[f"{name}_ids"][0][begin : end + 1]).astype(np.int64)
        return lengths
    if name in ("chosen_scored", "rejected_scored"):
        side = name.removesuffix("_scored")
        offsets, marks = chunk[f"{side}_mask"]
        before = np.concatenate(([0], marks[offsets[begin] : offsets[end]].cumsum(dtype=np.int64)))
        at = offsets[begin : end + 1] - offsets[begin]
        # nothing is stored where all tokens are scored
        return np.where(np.diff(at) > 0, np.diff(before[at]), _fact(chunk, side, begin, end))
    values: np.ndarray = chunk[name][begin:end]
    return values


def _ids(view: tuple[np.ndarray, np.ndarray], i: int) -> list[int]:
    offsets, values = view
    return values[offsets[i] : offsets[i + 1]].tolist()


def _mask(view: tuple[np.ndarray, np.ndarray], i: int, length: int) -> list[bool]:
    stored = _ids(view, i)  # nothing is stored where all tokens are scored
    return [bool(value) for value in stored] if stored else [True] * length


@dataclass(frozen=True)
class Encoded:
    """A data file ready to train on. `fingerprint` is a hash of the encoded content, wherever the file lies."""

    pairs: Sequence[EncodedPair]
    report: DataReport
    fingerprint: str


@dataclass(frozen=True)
class Joined:
    """Several data files as one set of pairs. `fingerprint` is a hash of theirs, in their order."""

    pairs: Sequence[EncodedPair]
    fingerprint: str


def joined(sources: Sequence[Encoded]) -> Joined:
    """Data files one after the other. One alone is what it was."""
    if len(sources) == 1:
        return Joined(sources[0].pairs, sources[0].fingerprint)
    fingerprint = hashlib.sha256("\n".join(one.fingerprint for one in sources).encode()).hexdigest()
    return Joined(Concatenated([one.pairs for one in sources]), fingerprint)


def encode_file(
    path: str | Path,
    tokenizer: Any,
    *,
    max_length: int,
    kind: type[Encoder] = Encoder,
    need_rejected: bool = True,
    extra: tuple[Column, ...] = (),
    columns: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = "error",
    vocab_rows: int | None = None,
    cache_dir: str | Path,
    max_row_bytes: int = MAX_ROW_BYTES,
    dialogues: Dialogues = "text",
) -> Encoded:
    """Reads, tokenises and cuts a data file, or maps what an earlier call has made of the same content.

    Of several processes on a machine one works and the others wait for it.

    Args:
        path, columns, need_rejected, extra, max_row_bytes, dialogues: as `RowReader`.
        tokenizer, max_length: as `Encoder`.
        kind: which encoder.
        on_bad_row: `error` stops at the first bad row; `skip` drops and counts them.
        vocab_rows: rows of the model's embedding; more rows than tokens is normal, fewer is refused.
        cache_dir: where encoded files are kept.

    Raises: DataError.
    """
    name = str(path)
    encoder = kind(tokenizer, max_length)
    reader = RowReader(
        name,
        columns=columns,
        need_rejected=need_rejected,
        extra=extra,
        max_row_bytes=max_row_bytes,
        tokenizer=tokenizer_content(tokenizer),
        dialogues=dialogues,
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
    ]
    key = _cache_key(reader.source.content(Path(cache_dir).expanduser() / "hashes"), tokenizer, settings)
    folder = Path(cache_dir).expanduser() / key
    base = reader.source.base
    loaded, wrong = _load(folder, name, base)
    if loaded is None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _lock(folder.with_suffix(".lock")):
                loaded, wrong = _load(folder, name, base)  # another process may have been faster
                if loaded is None:
                    _write(folder, reader, encoder, name, on_bad_row)
                    loaded, _ = _load(folder, name, base)
        except OSError as error:
            raise DataError(f"{cache_dir}: cannot keep the encoded data here: {error.strerror or error}") from None
    if loaded is None:
        raise DataError(f"{folder}: the encoded data cannot be read back; is the disk full?")
    encoded, largest = loaded
    if wrong is not None:
        note = f"the encoded data in {folder} was damaged ({wrong}) and has been made again"
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
                    f"{pair.where}: token {token} ('{text}') has no row in the model: the tokenizer has "
                    f"{len(tokenizer):,} tokens, the model {rows:,} rows (use the model's own tokenizer)"
                )
    raise AssertionError("the largest id of the file is in none of its rows")


def _cache_key(content: str, tokenizer: Any, settings: list[Any]) -> str:
    import tokenizers
    import transformers

    versions = [FORMAT_VERSION, transformers.__version__, tokenizers.__version__]
    parts = [content, versions, settings, tokenizer_content(tokenizer)]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]


def tokenizer_content(tokenizer: Any) -> str:
    """A hash of all that decides which ids a text gets."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        model = json.loads(backend.to_str())
        # These two change with every call that pads or truncates; neither is used here.
        model.pop("truncation", None), model.pop("padding", None)
    else:
        model = sorted(tokenizer.get_vocab().items())
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, added_bos(tokenizer)]
    parts = [type(tokenizer).__name__, model, ids, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    lock = Lock(path)
    lock.wait()
    try:
        yield
    finally:
        lock.release()


def _load(folder: Path, name: str, base: str) -> tuple[tuple[Encoded, int] | None, str | None]:
    """(what stands in a cache folder, None where it is missing or damaged; what is wrong with a damaged one).

    All of it is hashed, at every start: a single other bit would be another token. Places are put behind `base`.

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
    encoded = Encoded(pairs, replace(report, path=name, examples=examples), kept["fingerprint"])
    return (encoded, kept["largest"]), None


def _write(folder: Path, reader: RowReader, encoder: Encoder, name: str, on_bad_row: OnBadRow) -> None:
    """Makes a cache folder in one step: it is built beside its place and renamed. The caller holds the lock."""
    for left in folder.parent.glob(f"{folder.name}.*.tmp"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        _build(temporary, reader, encoder, name, on_bad_row)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one, or there is none
        os.replace(temporary, folder)
        storage.flush_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _build(folder: Path, reader: RowReader, encoder: Encoder, name: str, on_bad_row: OnBadRow) -> None:
    """Writes `rows.arrow` and `report.json`, a few thousand rows in memory at a time. Places are kept bare."""
    import pyarrow

    count: Counter[str] = Counter()
    bad = BadRows(EXAMPLES)
    base = reader.source.base
    lengths: dict[str, Counter[int]] = {
        side: Counter() for side in ("prompt", "chosen", *(["rejected"] if reader.need_rejected else []))
    }
    seen = array("Q")
    content = hashlib.sha256()
    items = iter(reader)
    schema = _schema(reader.extra)

    def drop(row: BadRow) -> None:
        if on_bad_row == "error":
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
            for side, length in zip(lengths, encoded.lengths, strict=True):
                lengths[side][length] += 1
            count["largest"] = max(
                count["largest"], max(pair.prompt_ids), max(pair.chosen_ids), max(pair.rejected_ids or (0,))
            )
            record = _record(pair, base)
            ids = repr([record[key] for key in ("prompt_key", "prompt_ids", "chosen_ids", "rejected_ids")])
            seen.append(int.from_bytes(hashlib.sha256(ids.encode()).digest()[:8], "big"))
            masks = [record["chosen_mask"], record["rejected_mask"], sorted(pair.columns.items())]
            content.update(f"{ids}{masks}".encode())
            pending.append(record)
            if len(pending) == 4096:
                writer.write_batch(pyarrow.RecordBatch.from_pylist(pending, schema))
                pending = []
        writer.write_batch(pyarrow.RecordBatch.from_pylist(pending, schema))
    if not count["kept"]:
        raise bad.none_left(name, count["read"])

    notes = [note for note in [pad_token(encoder.tokenizer)[1]] if note]
    if encoder.eos is None:
        notes.append("the tokenizer has no EOS token, so nothing ends a completion")
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
    """p5, p50, p95 and the largest of numbers that were counted: values among them, nearest to the share."""
    values = sorted(counted)
    behind = [*accumulate(counted[value] for value in values)]  # how many are at most as large
    p5, p50, p95, top = (
        values[bisect_right(behind, round((behind[-1] - 1) * share))] for share in (0.05, 0.5, 0.95, 1)
    )
    return p5, p50, p95, top


def _repeated(seen: array[int]) -> int:
    """How many of the numbers are there already; sorts them in place."""
    hashes = np.frombuffer(seen, np.uint64)
    hashes.sort()
    return sum(
        int((hashes[i + 1 : i + BLOCK + 1] == hashes[i : i + BLOCK][: len(hashes) - i - 1]).sum())
        for i in range(0, len(hashes), BLOCK)
    )


def _schema(extra: tuple[Column, ...]) -> Any:
    import pyarrow

    ids, mask = pyarrow.list_(pyarrow.int32()), pyarrow.list_(pyarrow.uint8())
    fields = {"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids, "chosen_mask": mask, "rejected_mask": mask}
    fields |= {"where": pyarrow.string(), "prompt_key": pyarrow.uint64(), "raw_prompt_key": pyarrow.uint64()}
    fields |= {f"column.{column.name}": pyarrow.float64() for column in extra}
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
    }
