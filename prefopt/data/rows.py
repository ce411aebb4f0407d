"""Parse records of a file into `PairRow`s: format, prompt, completions, errors. No tokenizer.

Every error is one line, `file:line: 'key': what was found, what was expected (a fix)`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefopt.data.bad_rows import DROP, BadRow, OnBadRow, RowProblem, check_text, first_bad_row, kind, plain, short
from prefopt.data.containers import MAX_ROW_BYTES, TextRow, TwiceNamed
from prefopt.data.labelled import as_two, label_of
from prefopt.data.messages import (
    HH_TURN,
    Messages,
    as_turn,
    decoded,
    dialogue_turns,
    is_dialogue_prompt,
    is_turn,
    read_messages,
)
from prefopt.data.numbers import list_of_numbers, number
from prefopt.data.sources import open_source
from prefopt.data.unread import Unread
from prefopt.errors import DataError, did_you_mean
from prefopt.settings import RESERVED_ARGS
from prefopt.storage import digest
from prefopt.types import LABEL, Column, PairRow, TokenColumn

__all__ = [
    "DROP",
    "MAX_ROW_BYTES",
    "BadRow",
    "Dialogues",
    "Messages",
    "OnBadRow",
    "RowProblem",
    "RowReader",
    "RowReport",
    "first_bad_row",
    "open_source",
    "prompt_key",
    "read_rows",
]

Dialogues = Literal["text", "messages"]

KEYS = ("prompt", "chosen", "rejected", "completion", "messages", "conversations", "instruction", "input", "output")
_COMPLETIONS = ("chosen", "completion", "messages", "conversations", "output")  # in this order
_TEMPLATE_ARGS = ("tools", "documents", "chat_template_kwargs")
MAP = "rename it, or map it with data.columns"


@dataclass(frozen=True)
class RowReport:
    """All examples of a file in memory: for small files and inspection. Training uses `encode_file`."""

    rows: list[PairRow]
    bad: list[BadRow]
    formats: Mapping[str, int]

    @property
    def dropped(self) -> dict[str, int]:
        """Number of dropped examples, by reason."""
        return dict(Counter(row.reason for row in self.bad))


def read_rows(path: str | Path, *, on_bad_row: OnBadRow = "error", **settings: Any) -> RowReport:
    """Read all examples of a file; good and bad ones are returned separately.

    Args: settings: see `RowReader`; on_bad_row: `error` stops at the first bad row, `skip` collects them.
    Raises: DataError when the file cannot be read, or at a bad row under `error`.
    """
    reader = RowReader(path, **settings)
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


def prompt_key(prompt: str | Messages) -> str:
    """16 hexadecimal digits that identify a prompt, independent of tokenizer and template."""
    return digest(prompt)[:16]


class RowReader:
    """Iterates over a source once; yields each example as a `PairRow` or a `BadRow`, with one in memory at a time.

    Args:
        path: a file, a folder of them, a folder written by `datasets.save_to_disk`, or a hub id; a split follows a
            colon (`FOLDER:train`).
        columns: prefopt's key -> the file's key.
        need_rejected: whether an example must be a pair. Without it a pair is checked like any other and its rejected
            completion dropped, so that a file gives the same examples to every method.
        extra: numbers that the method reads.
        extra_tokens: lists of numbers that it reads, one number per loss token.
        max_row_bytes: longer rows are bad ones; they are never in memory.
        prompts_only: whether an example may be a prompt without completion; `chosen` is then None.
        tokenizer: a hash; examples with this value of `tokenizer` contain token ids of this tokenizer, which are used.
        dialogues: whether HH dialogues remain text, or are converted to messages.
        labelled: whether examples are single completions with a label, as which a pair is two of them; see `labelled`.

    Raises: DataError when there is nothing to read.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        columns: Mapping[str, str] | None = None,
        need_rejected: bool = True,
        extra: tuple[Column, ...] = (),
        extra_tokens: tuple[TokenColumn, ...] = (),
        max_row_bytes: int = MAX_ROW_BYTES,
        prompts_only: bool = False,
        tokenizer: str | None = None,
        dialogues: Dialogues = "text",
        labelled: bool = False,
    ) -> None:
        self.labelled = labelled
        self.prompts_only, self.tokenizer, self.dialogues = prompts_only, tokenizer, dialogues
        self.columns, self.need_rejected, self.extra = dict(columns or {}), need_rejected, extra
        self.formats: Counter[str] = Counter()  # of the examples yielded so far
        self.unread = Unread()  # likewise
        self.token_keys = [key for column in extra_tokens for key in column.keys[: 1 + need_rejected]]
        known = [*KEYS, *(column.name for column in extra), *self.token_keys]
        for key in self.columns:
            if key not in known:
                near = did_you_mean(key, known) or ";"
                raise DataError(f"data.columns: unknown key '{key}'{near} known: {', '.join(known)}")
        names = (name for column in extra for name in (self._key(column.name), *column.aliases))
        self._read = {*map(self._key, (*KEYS, *self.token_keys)), *_TEMPLATE_ARGS, *names}
        self.source = open_source(str(path), max_row_bytes)
        self.unread.folders = self.source.notes()

    def __iter__(self) -> Iterator[PairRow | BadRow]:
        for where, item in self.source.records():
            try:
                if isinstance(item, RowProblem):
                    raise item
                if self.labelled and isinstance(item, dict):  # then a pair is read as such, and becomes two examples
                    self.need_rejected = item.get("rejected_ids", self._get(item, "rejected")) is not None
                row, form = self._parse(item, where)
            except RowProblem as problem:
                yield problem.at(where)
            else:
                self.formats[form] += 1
                yield from as_two(row) if self.labelled and self.need_rejected else [row]

    def _parse(self, record: object, where: str) -> tuple[PairRow, str]:
        if not isinstance(record, dict):
            raise RowProblem(
                "not an object", "", f"found {kind(record)}", "a JSON object, one per line", "write the file as JSONL"
            )
        if isinstance(record, TwiceNamed) and (twice := sorted(record.twice & self._read)):
            raise RowProblem("key twice", twice[0], "is in the example twice", "each key once")
        if self.tokenizer is not None and record.get("tokenizer") == self.tokenizer:
            return self._sampled(record, where), "token ids"
        prompt = self._prompt(record)
        if self.prompts_only:
            if all(self._get(record, key) is None for key in _COMPLETIONS):
                return self._prompt_alone(record, prompt, where)
            if prompt is not None:
                try:
                    return self._whole(record, prompt, where)
                except RowProblem:  # the other keys need not form a pair
                    return self._prompt_alone(record, prompt, where)
        return self._whole(record, prompt, where)

    def _prompt(self, record: Mapping[str, Any]) -> str | Messages | None:
        """The explicit prompt of an example; None where it is part of the completions."""
        if self._get(record, "prompt") is not None:
            return self._side(record, "prompt")
        if self._get(record, "instruction") is not None:
            instruction = self._side(record, "instruction")
            if not isinstance(instruction, str):
                raise RowProblem("not a string", self._key("instruction"), f"found {kind(instruction)}", "a string")
            more = self._get(record, "input")
            if more is not None and not isinstance(more, str):
                raise RowProblem("not a string", self._key("input"), f"found {kind(more)}", "a string")
            check_text(more or "", self._key("input"))
            asked = "\n\n".join(text for text in (instruction, more) if text and text.strip())
            return [{"role": "user", "content": asked}]
        return None

    def _prompt_alone(
        self, record: Mapping[str, Any], prompt: str | Messages | None, where: str
    ) -> tuple[PairRow, str]:
        asked = self._side(record, "prompt") if prompt is None else prompt
        self._check_question(asked)
        row, _ = self._row(record, asked, None, None, where)
        return row, "prompt alone"

    def _whole(self, record: Mapping[str, Any], prompt: str | Messages | None, where: str) -> tuple[PairRow, str]:
        wanted = ("chosen",) if self.need_rejected else _COMPLETIONS
        chosen_key = next((key for key in wanted if self._get(record, key) is not None), "chosen")
        if prompt is None and chosen_key == "chosen" and self._get(record, "conversations") is not None:
            prompt = self._side(record, "conversations")  # ShareGPT preferences: a conversation, and two answers to it
        chosen = self._side(record, chosen_key)
        rejected = None
        if self.need_rejected or (chosen_key == "chosen" and self._get(record, "rejected") is not None):
            rejected = self._side(record, "rejected")
        if rejected is not None and isinstance(rejected, str) != isinstance(chosen, str):
            raise RowProblem(
                "mixed types",
                self._key("rejected"),
                f"found {kind(rejected)}, but '{self._key(chosen_key)}' is {kind(chosen)}",
                "both completions of the same type",
            )
        asked, chosen, rejected, form = self._split(prompt, chosen, rejected, chosen_key)
        self._check_completion(chosen, chosen_key)
        if rejected is not None:
            self._check_completion(rejected, "rejected")
            self._check_different(chosen, rejected, chosen_key)
        row, turned = self._row(record, asked, chosen, rejected, where)
        return row, f"messages, from {form}" if turned else form

    def _row(
        self,
        record: Mapping[str, Any],
        prompt: str | Messages,
        chosen: str | Messages | None,
        rejected: str | Messages | None,
        where: str,
    ) -> tuple[PairRow, bool]:
        """(the example, whether its text was converted to messages). Counts ignored keys."""
        key, turned = prompt_key(prompt), False
        if isinstance(prompt, str) and is_dialogue_prompt(prompt):
            if self.dialogues == "messages":
                prompt, turned = self._turns(prompt), True
                chosen, rejected = self._answer(chosen, "chosen"), self._answer(rejected, "rejected")
                if rejected is not None:
                    self._check_different(chosen, rejected, "chosen")
            else:
                self.unread.dialogues += 1
        row = PairRow(
            prompt,
            chosen,
            rejected if self.need_rejected else None,
            {} if chosen is None else {column.name: self._number(record, column) for column in self.extra},
            where,
            template_args=self._template_args(record) if isinstance(prompt, list) else {},
            prompt_key=key,
            token_columns={} if chosen is None else self._token_columns(record),
        )
        used = {self._key(key) for key in ("prompt", "chosen", "rejected", *(column.name for column in self.extra))}
        if self._get(record, "prompt") is None:
            used |= {self._key("instruction"), self._key("input")}
        self.unread.count(record, used, row, self._get(record, "prompt"), paired=rejected is not None)
        return row, turned

    # The prompt

    def _split(
        self, prompt: str | Messages | None, chosen: str | Messages, rejected: str | Messages | None, chosen_key: str
    ) -> tuple[str | Messages, str | Messages, str | Messages | None, str]:
        if isinstance(prompt, list):
            self._check_question(prompt)
            opened = ", the prompt begins the answer" if prompt[-1]["role"] == "assistant" else ""
            chosen = as_turn(chosen) if isinstance(chosen, str) else chosen
            rejected = as_turn(rejected) if isinstance(rejected, str) else rejected
            sides = [chosen] if rejected is None else [chosen, rejected]
            if all(len(side) > len(prompt) and side[: len(prompt)] == prompt for side in sides):
                cut = len(prompt)
                return prompt, chosen[cut:], rejected and rejected[cut:], "messages, prompt repeated in the completions"
            return prompt, chosen, rejected, f"messages, explicit prompt{opened}"
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
        form = "messages, implicit prompt" if rejected is not None else "messages, prompt up to the first answer"
        return chosen[:cut], chosen[cut:], rejected and rejected[cut:], form

    def _dialogue(self, text: str, key: str) -> tuple[str, str]:
        head, turn, completion = text.rpartition(HH_TURN)
        if not turn:
            crlf = "\r\n\r\nAssistant:" in text
            raise RowProblem(
                "no prompt",
                self._key(key),
                "a dialogue with CRLF line ends"
                if crlf
                else "text without a '\\n\\nAssistant:' turn in an example without a prompt",
                "LF line ends" if crlf else f"a key '{self._key('prompt')}', or a dialogue",
                "convert them" if crlf else "add the prompt, or map its key with data.columns",
            )
        return head + turn, completion

    def _turns(self, prompt: str) -> Messages:
        turns = dialogue_turns(prompt.removesuffix(HH_TURN), self._key("prompt"))
        if turns[-1]["role"] == "assistant":
            found, expected = "two assistant turns at its end", "a human turn before the last one"
            raise RowProblem("prompt without a question", self._key("prompt"), found, expected)
        return turns

    def _answer(self, side: str | Messages | None, key: str) -> Messages | None:
        """The completion of a dialogue as an assistant turn."""
        if not isinstance(side, str):
            return side
        if "\n\nHuman:" in side or HH_TURN in side:
            found = "a completion with another turn after the answer"
            raise RowProblem("not an answer", self._key(key), found, "the assistant's answer only")
        return as_turn(side.strip())

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
        # Completions that first differ in a user turn answer different questions; one may also be a prefix of another.
        parted = {side[cut]["role"] if cut < len(side) else "" for side in (chosen, rejected)}
        if cut == 0 or parted != {"assistant"} or chosen[cut - 1]["role"] == "assistant":
            raise RowProblem(
                "different dialogues",
                self._key("rejected"),
                f"messages that differ from '{self._key(chosen_key)}' at turn {cut + 1}, which is not an answer in "
                "both to a shared question",
                "the same messages up to two different answers",
            )
        return cut

    # Single values

    def _key(self, key: str) -> str:
        return self.columns.get(key, key)

    def _get(self, record: Mapping[str, Any], key: str) -> Any:
        return record.get(self._key(key))

    def _missing(self, record: Mapping[str, Any], key: str) -> RowProblem:
        keys = sorted(str(name) for name, value in record.items() if value is not None)
        found = f"the example has {', '.join(repr(short(name, 60)) for name in keys[:12]) or 'no keys'}"
        used = {self._key(other) for other in KEYS if other != key}
        near = did_you_mean(self._key(key), [name for name in keys if name not in used])
        what = "a completion" if key in KEYS else "a list of numbers" if key in self.token_keys else "a number"
        return RowProblem("missing key", self._key(key), "missing", f"{what}; {found}{near}", MAP)

    def _side(self, record: Mapping[str, Any], key: str) -> str | Messages:
        value = self._get(record, key)
        name = self._key(key)
        if value is None:
            raise self._missing(record, key)
        if isinstance(value, str):
            check_text(value, name)
            return value
        if is_turn(value):
            value = [value]
        if not isinstance(value, list):
            raise RowProblem("not a string", name, f"found {kind(value)}", "a string or a list of messages")
        return read_messages(value, name)

    def _check_question(self, prompt: str | Messages) -> None:
        """Check that a prompt can be answered. It may end with an assistant turn, which the completions continue."""
        if isinstance(prompt, list) and (not prompt or "tool_calls" in prompt[-1]):
            raise RowProblem(
                "prompt without a question",
                self._key("prompt"),
                "ends with a tool call without a result" if prompt else "an empty list",
                "messages that end with a turn to answer, or with the beginning of the answer",
            )

    def _sampled(self, record: Mapping[str, Any], where: str) -> PairRow:
        """An example that a policy sampled, as token ids; its texts are not used in training."""
        keys = ["prompt_ids", "chosen_ids", *(["rejected_ids"] if self.need_rejected else [])]
        for key in keys:
            ids = record.get(key)
            if not (isinstance(ids, list) and ids and all(type(i) is int and 0 <= i < 2**31 for i in ids)):
                raise RowProblem("bad token ids", key, "not a list of token ids", "a list as rounds write it")
        numbers = {column.name: self._number(record, column) for column in self.extra}
        texts = [record.get(key) for key in ("prompt", "chosen", "rejected")]
        sides = (texts[0] or "", texts[1] or "", (texts[2] or "") if self.need_rejected else None)
        key = prompt_key(plain(texts[0], "prompt")) if texts[0] else ""
        ids = tuple(record[key] for key in keys)
        return PairRow(*sides, numbers, where, ids, prompt_key=key, token_columns=self._token_columns(record))

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
            if (
                message["role"] == "assistant"
                and not (message["content"] or "").strip()
                and "tool_calls" not in message
            ):
                raise RowProblem("empty completion", name, "an empty assistant turn", "a non-empty completion")

    def _template_args(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The example's own arguments of the chat template."""
        args: dict[str, Any] = {}
        for key, shape in (("tools", list), ("documents", list), ("chat_template_kwargs", dict)):
            value = record.get(key)
            value = decoded(value, key, key) if isinstance(value, str) else value
            if value is None:
                continue
            if not isinstance(value, shape) or (shape is list and not all(isinstance(one, dict) for one in value)):
                expected = "a list of objects" if shape is list else "an object"
                raise RowProblem(f"bad {key}", key, f"found {kind(value)}", f"{expected}, as JSON or as text")
            value = plain(value, key)
            args |= value if shape is dict else {key: value} if value else {}
        taken = [key for key in args if key in RESERVED_ARGS]
        if taken:
            found = f"found '{taken[0]}'"
            raise RowProblem(
                "bad template argument", "chat_template_kwargs", found, "arguments that the template reads"
            )
        return args

    def _token_columns(self, record: Mapping[str, Any]) -> dict[str, list[float]]:
        """The lists of numbers per loss token; their lengths are checked once the completions are encoded."""
        found = {}
        for key in self.token_keys:
            if self._get(record, key) is None:
                raise self._missing(record, key)
            found[key] = list_of_numbers(self._get(record, key), self._key(key))
        return found

    def _number(self, record: Mapping[str, Any], column: Column) -> float:
        if column == LABEL and self.labelled:
            if self.need_rejected:
                return 1.0  # a pair needs no label
            key = self._key(LABEL.name)
            if record.get(key) is None:
                raise RowProblem(
                    "no label", key, "missing", "true or false beside 'completion', or a pair ('chosen', 'rejected')"
                )
            return label_of(record[key], key)
        names = [self._key(column.name), *column.aliases]
        name = next((name for name in names if record.get(name) is not None), None)
        if name is None:
            raise self._missing(record, column.name)
        return number(record[name], name, column, text=isinstance(record, TextRow))
