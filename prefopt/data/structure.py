"""What every row of token ids must be, whoever made it: BOS, EOS and end-of-turn tokens where they belong.

The encoder refuses a row that is not so, rounds exclude such a candidate before anyone is asked about it, and a run
looks once more before its first step: all by `Structure.problem`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.data.bad_rows import RowProblem
from prefopt.data.rows import Messages
from prefopt.data.templates import TOO_SLOW, Rendering
from prefopt.errors import DataError, did_you_mean
from prefopt.types import EncodedPair


@dataclass(frozen=True)
class Closing:
    """What a chat template writes of its own, seen in the simplest exchange.

    Args:
        end: the token behind an assistant's turn, "" where it writes none.
        inside: tokens that it writes into the part of an assistant's turn that is an answer, before its end.
        written: all special tokens that it writes.
        repeats: whether it writes an answer more than once.
    """

    end: str = ""
    inside: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()
    repeats: bool = False


class Structure:
    """The promises about rows of one tokenizer.

    Args:
        tokenizer: one of transformers'.
        rendering: what its chat template is given.
        allowed: special tokens that a text may hold.
    Raises: DataError when the chat template does not come to an end, or an allowed token is none of the tokenizer's.
    """

    def __init__(self, tokenizer: Any, rendering: Rendering | None = None, allowed: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.bos, self.eos, self.pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        self.added_bos = added_bos(tokenizer)
        more = [token for token in _added_before(tokenizer) if token != self.bos]
        self._before = [str(token) for token in tokenizer.convert_ids_to_tokens(more)]
        # Where BOS or EOS is the unknown token too, nobody can tell which of the two was meant.
        self.unknown = None if tokenizer.unk_token_id in (self.bos, self.eos) else tokenizer.unk_token_id
        added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        unknown = {tokenizer.unk_token} - {tokenizer.bos_token, tokenizer.eos_token}
        self.special = frozenset(special) | frozenset(map(str, tokenizer.all_special_tokens)) - unknown
        self.special -= unknown
        self._added = _alternatives({*added, *self.special} - unknown)
        self.closing = self._closing(rendering or Rendering())
        ends = [tokenizer.convert_tokens_to_ids(self.closing.end)] if self.closing.end else []
        self.terminators = frozenset({self.eos, *ends} - {None})
        for token in allowed:
            if token not in self.special:
                near = did_you_mean(token, self.special)
                raise DataError(f"data.special_tokens: '{token}' is no special token of the tokenizer{near}")
        self._special = _alternatives({*self.special, self.closing.end} - {"", *allowed})
        self._inside = self._ids(self.closing.inside)
        self._written = self._ids(self.closing.written)
        begins = frozenset({self.bos} - {None}) - self.terminators
        pads = frozenset({self.pad} - {None, tokenizer.unk_token_id, self.bos}) - self.terminators
        self._alone = begins | pads  # may stand nowhere inside, unless the template puts them there
        self._scored_never = (self.terminators | self._alone) - self._inside

    def _ids(self, tokens: frozenset[str]) -> frozenset[int]:
        return frozenset(self.tokenizer.convert_tokens_to_ids(list(tokens)))

    def special_in(self, text: str) -> str | None:
        """The first special token that the tokenizer reads in a text, or None."""
        found = self._special.search(text) if self._special is not None else None
        return found[0] if found is not None else None

    def ends_with_terminator(self, text: str) -> str:
        """The EOS or end-of-turn token with which a text ends, or ""."""
        ends = {self.tokenizer.eos_token, self.closing.end} - {None, ""}
        return next((str(end) for end in ends if text.endswith(str(end))), "")

    def text_notes(self, prompt: str) -> tuple[str, ...]:
        """What is to be said of a text prompt: tokens beside BOS that the tokenizer would put before it."""
        if all(token in prompt for token in self._before):
            return ()
        return (
            f"the tokenizer begins a text with '{''.join(self._before)}', left out here (write it into the prompt)",
        )

    def next_special(self, text: str, begin: int) -> str:
        """The special token that stands at a place of a text, with white space before it if any, or ""."""
        at = begin + len(text[begin:]) - len(text[begin:].lstrip())
        found = self._special.match(text, at) if self._special is not None else None
        return text[begin : found.end()] if found is not None else ""

    def last_special(self, text: str, begin: int) -> str:
        """The special token with which a text ends, or ""."""
        found = list(self._special.finditer(text, begin)) if self._special is not None else []
        return found[-1][0] if found and found[-1].end() == len(text) else ""

    # Rows of ids

    def prompt_problem(self, prompt: Sequence[int]) -> str:
        """What is wrong with a prompt, or "": a token; BOS once, first, where the tokenizer adds one; no pad token."""
        if not prompt:
            return "the prompt has no token"
        if self.added_bos is not None and prompt[0] != self.added_bos:
            return f"BOS ({self.added_bos}) is not the first token"
        if self.bos is not None and [*prompt[:2]] == [self.bos, self.bos]:
            return f"BOS ({self.bos}) stands twice at the start"
        return self._misplaced(prompt[0], prompt[1:])

    def problem(self, prompt: Sequence[int], completion: Sequence[int], mask: Sequence[bool] | None = None) -> str:
        """What is wrong with the completion of a prompt, or "".

        A scored token; a mask as long as the completion; BOS and the pad token only where the chat template writes
        them; no EOS or end-of-turn token among the scored tokens but as the last of them.

        Args: prompt: may be left out; then nothing before the completion excuses what it begins with.
            mask: which tokens of the completion are scored; None: all.
        """
        mask = [True] * len(completion) if mask is None else mask
        if not completion or len(mask) != len(completion) or not any(mask):
            return f"{len(completion)} tokens, a mask of {len(mask)}, {sum(mask)} scored"
        if found := self._misplaced(prompt[-1] if prompt else -1, completion):
            return found
        if self._scored_never.isdisjoint(completion):
            return ""
        for i, token in enumerate(completion):
            if not mask[i] or token not in self._scored_never:
                continue
            if token not in self.terminators:
                what = "BOS" if token == self.bos else "the pad token"
                return f"{what} ({token}) inside the completion"
            if i + 1 < len(completion) and mask[i + 1]:
                if i + 2 == len(completion) and completion[-1] in self.terminators - {token}:
                    return f"two terminators ({token}, {completion[-1]})"
                return f"the terminator ({token}) before the end of the completion"
        return ""

    def _misplaced(self, before: int, ids: Sequence[int]) -> str:
        """BOS or the pad token where the template does not write them, among tokens that follow another."""
        if self._alone.isdisjoint(ids):
            return ""
        strangers = self._alone - self._written
        for token in ids:
            # Some chat templates begin each exchange with BOS, after the EOS of the one before.
            if token == self.bos and token in strangers and before not in self.terminators:
                return f"BOS ({token}) inside the row"
            if token == self.pad and token in strangers:
                return f"the pad token ({token}) inside the row"
            before = token
        return ""

    def problem_of(self, pair: EncodedPair) -> tuple[str, str]:
        """(prompt, chosen or rejected, what is wrong with it) of an encoded pair, or ("", "")."""
        if found := self.prompt_problem(pair.prompt_ids):
            return "prompt", found
        sides = [("chosen", pair.chosen_ids, pair.chosen_mask)]
        if pair.rejected_ids is not None:
            sides.append(("rejected", pair.rejected_ids, pair.rejected_mask or []))
        for side, ids, mask in sides:
            if found := self.problem(pair.prompt_ids, ids, mask):
                return side, found
        return "", ""

    # The template

    def _closing(self, rendering: Rendering) -> Closing:
        """What the chat template does with the simplest exchange. A template that refuses it shows nothing."""
        if not getattr(self.tokenizer, "chat_template", None) or self._added is None:
            return Closing()
        question, answer = {"role": "user", "content": "Qx7q"}, {"role": "assistant", "content": "Ax7a"}

        def rendered(messages: Messages, prompt: bool = False) -> str | None:
            try:
                return rendering.render(self.tokenizer, messages, generation_prompt=prompt)
            except RowProblem as problem:
                if problem.reason == TOO_SLOW:
                    raise DataError(f"{problem.found}, even for one short exchange ({problem.mend})") from None
                return None

        whole, before = rendered([question, answer]), rendered([question], prompt=True) or ""
        content, at, behind = (whole or "").rpartition("Ax7a")
        if whole is None or not at:
            return Closing()
        more = rendered([question, answer, question, answer])
        again = (more or "").partition("Ax7a")[2]
        # What follows the answer whether or not more follows is the turn's own; behind the last turn some templates
        # write EOS too.
        shared = _common(behind, again) if more is not None else ""
        named = [token[0] for token in self._added.finditer(shared) if token[0].strip()]
        named = [token for token in named if token in self.special] or named
        end = named[-1] if named else next((t[0] for t in self._added.finditer(behind) if t[0].strip()), "")
        written: list[str] = []
        last = 0
        for token in self._added.finditer(text := more or whole):
            follows = text[last : token.start()] == "" and written[-1:] in ([end], [str(self.tokenizer.eos_token)])
            if token.start() > 0 and not follows:  # first, or after EOS, BOS stands where it always may
                written.append(token[0])
            last = token.end()
        own = behind[: behind.find(end)] if end else behind
        mine = content[len(before) :] + at + own if content.startswith(before) else ""
        inside = [token for token in self._added.findall(mine) if token in self.special]
        ours = frozenset(written) & (self.special | {end})
        return Closing(end, frozenset(inside) - {end}, ours, repeats=at in content)


def _common(one: str, other: str) -> str:
    """What two texts begin with, both of them."""
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def check_row_structure(pair: EncodedPair, structure: Structure) -> str | None:
    """What is wrong with an encoded pair, for a person, or None."""
    side, found = structure.problem_of(pair)
    return f"{side}: {found}" if found else None


def _alternatives(tokens: set[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of the texts, the longest first."""
    texts = sorted(filter(None, tokens), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def added_bos(tokenizer: Any) -> int | None:
    """The BOS id, if this tokenizer puts one before a text by itself; None otherwise."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def _added_before(tokenizer: Any) -> list[int]:
    """The ids that this tokenizer puts before a text by itself."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    begin = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return list(whole[:begin])


def terminators(tokenizer: Any, rendering: Rendering | None = None) -> frozenset[int]:
    """What ends a completion in training: EOS, and the token with which the chat template ends an assistant's turn."""
    if not getattr(tokenizer, "chat_template", None):  # then nothing else than EOS can
        return frozenset({tokenizer.eos_token_id} - {None})
    return Structure(tokenizer, rendering).terminators
