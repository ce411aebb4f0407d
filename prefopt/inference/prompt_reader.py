"""What a policy is asked: prompts from a file, the command line or the testbed, as tokens, each refused by itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt import storage
from prefopt.data.encoder import Encoder
from prefopt.data.round_prompts import answer_text
from prefopt.data.rows import BadRow, Messages, RowProblem, RowReader, open_source
from prefopt.data.templates import Rendering
from prefopt.errors import DataError, did_you_mean
from prefopt.storage import text_hash
from prefopt.thoughts import ThoughtFormat
from prefopt.types import Prompt

_TEXT = ".txt"
NO_TEMPLATE = "chat messages, and the tokenizer has no chat template, expected one (--chat_template FILE)"


@dataclass(frozen=True)
class Refused:
    """A prompt that cannot be asked. Args: where: of it. prompt: as it was read, None where it could not be.
    message: the line for a person."""

    where: str
    prompt: str | Messages | None
    message: str


def check_file(path: str) -> None:
    """Refuse a file that is not there, before any model is opened. Raises: DataError."""
    if Path(path).suffix == _TEXT:
        _lines(path)
    elif Path(path).suffix or path.startswith((".", "/", "~")):
        open_source(path)


class Reader:
    """Turns what a user gives into prompts as a policy reads them.

    Args:
        tokenizer: the policy's.
        thought: puts a thought prompt around them, where the policy thinks first.
        context: positions of the policy, None where it has no end.
        as_chat: whether a text is a user's turn; None: typed ones are, where there is a chat template.
        rendering: what the chat template is given.
    """

    def __init__(
        self,
        tokenizer: Any,
        thought: ThoughtFormat,
        context: int | None = None,
        as_chat: bool | None = None,
        rendering: Rendering | None = None,
    ) -> None:
        self.encoder = Encoder(tokenizer, 2**31, rendering=rendering)
        self.thought, self.context, self.as_chat = thought, context, as_chat
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self._seen: Counter[str] = Counter()

    def typed(self, text: str, where: str = "--prompt") -> Prompt | Refused:
        """A prompt that was typed."""
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes of the terminal that are no UTF-8
            return Refused(where, None, f"{where}: is not text, expected UTF-8")
        chat = self.has_template if self.as_chat is None else self.as_chat
        return self.prompt([{"role": "user", "content": text}] if chat else text, where)

    def file(self, path: str) -> Iterator[Prompt | Refused]:
        """Those of a file, in its order.

        Raises: DataError when there is nothing to read.
        """
        if Path(path).suffix == _TEXT:
            for number, line in enumerate(_lines(path), 1):
                if line.strip():
                    yield self.typed(line.strip(), f"{path}:{number}")
            return
        for row in RowReader(path, need_rejected=False, prompts_only=True):
            if isinstance(row, BadRow):
                yield Refused(row.where, None, row.message)
                continue
            turn = isinstance(row.prompt, str) and bool(self.as_chat)
            text: Any = row.prompt
            answer = None if row.chosen is None else answer_text(row.chosen)
            yield self.prompt(
                [{"role": "user", "content": text}] if turn else text, row.where, answer, row.template_args
            )

    def prompt(
        self, prompt: str | Messages, where: str, answer: str | None = None, args: Mapping[str, Any] | None = None
    ) -> Prompt | Refused:
        """One prompt. Asked again it has another key, so that it draws other answers.

        Args: args: its own arguments of the chat template.
        """
        if not isinstance(prompt, str) and not self.has_template:
            return Refused(where, prompt, f"{where}: 'prompt': {NO_TEMPLATE}")
        try:
            ids = self.encoder.prompt(self.thought.render(prompt), args)
        except RowProblem as problem:
            return Refused(where, prompt, problem.at(where).message)
        except ValueError as error:
            return Refused(where, prompt, f"{where}: 'prompt': {error}, expected one without it (leave it out)")
        if self.context is not None and len(ids) >= self.context:
            return Refused(
                where,
                prompt,
                f"{where}: 'prompt': {len(ids)} tokens leave no room for an answer, expected fewer than the model's "
                f"{self.context} positions (shorten it)",
            )
        content = json.dumps([prompt, args] if args else prompt, sort_keys=True)
        again = self._seen[content]
        self._seen[content] += 1
        key = text_hash(content + (f":{again}" if again else ""))[:16]
        return Prompt(prompt, tuple(ids), key, where, answer)


def split(found: Iterable[Prompt | Refused], limit: int | None = None) -> tuple[list[Prompt], list[Refused]]:
    """(prompts, those that were refused), of the first `limit`.

    Raises: DataError where none is left, with the first reason.
    """
    prompts: list[Prompt] = []
    refused: list[Refused] = []
    for number, one in enumerate(found):
        if number == limit:
            break
        if isinstance(one, Prompt):
            prompts.append(one)
        else:
            refused.append(one)
    if not prompts:
        raise DataError(refused[0].message if refused else "--prompts: the file holds none")
    return prompts, refused


def _lines(path: str) -> list[str]:
    file = Path(path)
    try:
        return storage.read_text(file).split("\n")  # no other separator that Unicode knows ends a line
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not text, expected one prompt per line in UTF-8") from None
    except OSError as error:
        near = [str(other) for other in file.parent.glob("*")] if file.parent.is_dir() else []
        raise DataError(f"{path}: {str(error.strerror).lower()}{did_you_mean(path, near)}") from None
