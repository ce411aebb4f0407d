"""What a data file holds and nobody reads, though its name says that it should matter: one line of the report each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from prefopt.types import PairRow

# Columns that change what a row means, and what to do where one is not read.
_MEDIA = ("image", "images", "video", "videos", "audio", "audios", "pixel_values")
_TURNS = "put it into the prompt as messages"
_MATTER = {
    "system": _TURNS,
    "system_prompt": _TURNS,
    "instruction": "name it under data.columns.prompt, or leave 'prompt' out",
    "input": "it is read beside 'instruction' alone",
    "history": _TURNS,
    "context": "put it into the prompt",
    "weight": "pairs are weighed alike",
    "functions": "a chat template takes 'tools'",
    "template_args": "a chat template takes 'chat_template_kwargs'",
    **dict.fromkeys(_MEDIA, "only text is trained on"),
}
_SCORED = ("weight", "train", "loss")  # keys of a message that say elsewhere whether its turn is scored
_TEMPLATE = ("tools", "documents", "chat_template_kwargs")
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")


class Unread:
    """Counts, row by row, what was not read of it."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self.dialogues = 0  # rows of text that are HH dialogues
        self.folders: list[str] = []  # what the source says of where its files lie

    def count(self, record: Mapping[str, Any], used: set[str], row: PairRow, prompt: object, *, paired: bool) -> None:
        """Args: used: keys of the record that were read; prompt: the record's own prompt, None where it has none;
        paired: whether the row has a rejected side, read or not."""
        for key, hint in _MATTER.items():
            if key in record and key not in used and _holds_something(record[key]):
                self._counts[f"'{key}' is not read in {{rows}} ({hint})"] += 1
        sides = [side for side in (row.chosen, row.rejected) if side is not None]
        turns = [turn for side in sides if not isinstance(side, str) for turn in side if turn["role"] == "assistant"]
        for key in _SCORED:
            if any(_is_false(turn.get(key)) for turn in turns):
                self._counts[f"'{key}' of a turn is not read in {{rows}} (all answers of a completion are scored)"] += 1
        if isinstance(row.prompt, str):
            for key in _TEMPLATE:
                if key not in used and _holds_something(record.get(key)):
                    self._counts[
                        f"'{key}' is not read in {{rows}} of text (a chat template takes it: use messages)"
                    ] += 1
            texts = [row.prompt, *(side for side in sides if isinstance(side, str))]
            if any(_MESSAGES.match(text) for text in texts):
                what = "{rows} with text that looks like a list of messages, which is trained on as text"
                self._counts[f"{what} (store lists, not strings)"] += 1
            if prompt is not None and row.prompt.strip() and sides and all(
                isinstance(side, str) and side.lstrip().startswith(row.prompt.strip()) for side in sides
            ):  # fmt: skip
                what = "{rows} with the prompt repeated at the beginning of the completions, where it is trained on"
                self._counts[f"{what} again (leave it out of one of them)"] += 1
            if any("\r\n" in text for text in texts):
                self._counts["{rows} with line ends of two characters (CRLF), which become tokens"] += 1
        elif opening := _opening(row.prompt):
            answers = [side[0].get("content") for side in sides if not isinstance(side, str)]
            if answers and all(str(answer or "").lstrip().startswith(opening) for answer in answers):
                what = (
                    "{rows} with the beginning of the answer repeated in the completions, where it is trained on again"
                )
                self._counts[f"{what} (leave it out of one of them)"] += 1
        elif isinstance(prompt, str) and prompt.strip() and not _asks(row.prompt, prompt):
            what = "in {rows} the conversation does not ask what 'prompt' holds, which is not read"
            self._counts[f"{what} (leave 'prompt' out, or the turns before the answer)"] += 1
        if not paired and row.chosen is not None and _is_false(record.get("label")):
            what = "trained on all the same: {rows} with a label that is false"
            self._counts[f"{what} (drop them, or make pairs of them)"] += 1

    def notes(self, *, chat: bool) -> list[str]:
        """One sentence each. Args: chat: whether the tokenizer has a chat template."""
        notes = self.folders + [note.format(rows=_rows(number)) for note, number in self._counts.items()]
        if chat and self.dialogues:
            notes.append(
                f"warning: {_rows(self.dialogues)} with dialogues of '\\n\\nHuman:' and '\\n\\nAssistant:' that are "
                "trained on as plain text, though the tokenizer has a chat template; --data.dialogues messages makes "
                "turns of them"
            )
        return notes


def _rows(number: int) -> str:
    return f"{number:,} row{'s' * (number != 1)}"


def _opening(turns: list[dict[str, Any]]) -> str:
    """The beginning of the answer with which a prompt ends, or ""."""
    last = turns[-1] if turns and turns[-1]["role"] == "assistant" else {}
    return str(last.get("content") or "").strip()


def _holds_something(value: object) -> bool:
    return value is not None and (not isinstance(value, str | list | dict) or bool(value)) and value != "None"


def _asks(turns: list[dict[str, Any]], prompt: str) -> bool:
    """Whether the text of a row's prompt is in the conversation: in one of its turns, or in all of them together."""
    wanted = " ".join(prompt.split())
    texts = [" ".join(str(turn["content"] or "").split()) for turn in turns if turn["role"] == "user"]
    return any(wanted in text for text in texts) or all(text in wanted for text in texts)


def _is_false(value: object) -> bool:
    return value is False or value == 0 or (isinstance(value, str) and value.strip().lower() in ("false", "0"))
