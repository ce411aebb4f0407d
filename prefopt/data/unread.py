"""Columns and values that are ignored although their names suggest that they matter: one note of the report each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from prefopt.types import PairRow

# Columns that change the meaning of an example, and what to do where one is ignored.
_MEDIA = ("image", "images", "video", "videos", "audio", "audios", "pixel_values")
_TURNS = "put it into the prompt as messages"
_MATTER = {
    "system": _TURNS,
    "system_prompt": _TURNS,
    "instruction": "name it under data.columns.prompt, or remove 'prompt'",
    "input": "it is read only together with 'instruction'",
    "history": _TURNS,
    "context": "put it into the prompt",
    "weight": "set data.weight_column to use it in the loss",
    "functions": "chat templates read 'tools'",
    "template_args": "chat templates read 'chat_template_kwargs'",
    **dict.fromkeys(_MEDIA, "prefopt trains on text only"),
}
_LOSS_KEYS = ("weight", "train", "loss")  # keys of a message by which other libraries mask its turn
_TEMPLATE = ("tools", "documents", "chat_template_kwargs")
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")


class Unread:
    """Counts what was ignored in the examples of a source."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self.dialogues = 0  # text examples that are HH dialogues
        self.folders: list[str] = []  # notes of the source about its folders

    def count(self, record: Mapping[str, Any], used: set[str], row: PairRow, prompt: object, *, paired: bool) -> None:
        """Count what this example has and was ignored.

        Args:
            used: keys of the record that were read.
            prompt: the record's own prompt, None where it has none.
            paired: whether it has a rejected completion, read or not.
        """
        for key, hint in _MATTER.items():
            if key in record and key not in used and _holds_something(record[key]):
                self._counts[f"'{key}' is ignored in {{examples}} ({hint})"] += 1
        sides = [side for side in (row.chosen, row.rejected) if side is not None]
        turns = [turn for side in sides if not isinstance(side, str) for turn in side if turn["role"] == "assistant"]
        for key in _LOSS_KEYS:
            if any(_is_false(turn.get(key)) for turn in turns):
                why = "the loss reads every assistant turn of a completion"
                self._counts[f"'{key}' of a turn is ignored in {{examples}} ({why})"] += 1
        if isinstance(row.prompt, str):
            for key in _TEMPLATE:
                if key not in used and _holds_something(record.get(key)):
                    self._counts[
                        f"'{key}' is ignored in {{examples}} of text (only a chat template reads it: use messages)"
                    ] += 1
            texts = [row.prompt, *(side for side in sides if isinstance(side, str))]
            if any(_MESSAGES.match(text) for text in texts):
                what = "{examples} with text that looks like a list of messages; it is trained on as text"
                self._counts[f"{what} (store lists, not strings)"] += 1
            if prompt is not None and row.prompt.strip() and sides and all(
                isinstance(side, str) and side.lstrip().startswith(row.prompt.strip()) for side in sides
            ):  # fmt: skip
                what = "{examples} whose completions repeat the prompt at the beginning, so that it is trained on"
                self._counts[f"{what} (remove it from one of them)"] += 1
            if any("\r\n" in text for text in texts):
                self._counts["{examples} with CRLF line ends, which become tokens"] += 1
        elif opening := _opening(row.prompt):
            answers = [side[0].get("content") for side in sides if not isinstance(side, str)]
            if answers and all(str(answer or "").lstrip().startswith(opening) for answer in answers):
                what = "{examples} whose completions repeat the beginning of the answer that the prompt ends with"
                self._counts[f"{what} (remove it from one of them)"] += 1
        elif isinstance(prompt, str) and prompt.strip() and not _asks(row.prompt, prompt):
            what = "'prompt' is ignored in {examples}, whose conversation has another question"
            self._counts[f"{what} (remove 'prompt', or the turns before the answer)"] += 1
        if "label" not in used and not paired and row.chosen is not None and _is_false(record.get("label")):
            what = "'label' is ignored: {examples} with a false label are trained on"
            self._counts[f"{what} (drop them, or train with kto, which reads labels)"] += 1

    def notes(self, *, chat: bool) -> list[str]:
        """One note each. Args: chat: whether the tokenizer has a chat template."""
        notes = self.folders + [note.format(examples=_examples(number)) for note, number in self._counts.items()]
        if chat and self.dialogues:
            notes.append(
                f"warning: {_examples(self.dialogues)} with dialogues of '\\n\\nHuman:' and '\\n\\nAssistant:' are "
                "trained on as plain text although the tokenizer has a chat template; --data.dialogues messages "
                "converts them to chat messages"
            )
        return notes


def _examples(number: int) -> str:
    return f"{number:,} example{'s' * (number != 1)}"


def _opening(turns: list[dict[str, Any]]) -> str:
    """The beginning of the answer that a prompt ends with, or ""."""
    last = turns[-1] if turns and turns[-1]["role"] == "assistant" else {}
    return str(last.get("content") or "").strip()


def _holds_something(value: object) -> bool:
    return value is not None and (not isinstance(value, str | list | dict) or bool(value)) and value != "None"


def _asks(turns: list[dict[str, Any]], prompt: str) -> bool:
    """Whether the text of `prompt` is in the conversation: in one of its turns, or in all of them together."""
    wanted = " ".join(prompt.split())
    texts = [" ".join(str(turn["content"] or "").split()) for turn in turns if turn["role"] == "user"]
    return any(wanted in text for text in texts) or all(text in wanted for text in texts)


def _is_false(value: object) -> bool:
    return value is False or value == 0 or (isinstance(value, str) and value.strip().lower() in ("false", "0"))
