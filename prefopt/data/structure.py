"""The structure of encoded examples: which special tokens may occur where.

`Structure.problem` defines it for all users: the encoder rejects examples that violate it, rounds exclude such
candidates before they are judged, and a run checks again before its first step.
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
class TemplateTokens:
    """Special tokens that a chat template writes, determined by rendering one short exchange.

    Args:
        end: the end-of-turn token of an assistant turn; "" if the template writes none.
        inside: tokens that the template writes inside an answer, before its end.
        written: all special tokens that the template writes.
        repeats: whether the template renders an answer more than once.
    """

    end: str = ""
    inside: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()
    repeats: bool = False


class Structure:
    """The structure of examples that are encoded with one tokenizer.

    Args:
        tokenizer: a tokenizer of transformers.
        rendering: arguments of its chat template.
        allowed: special tokens that a text may contain.
    Raises: DataError when rendering the chat template exceeds the time limit, or an allowed token is not special.
    """

    def __init__(self, tokenizer: Any, rendering: Rendering | None = None, allowed: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.bos, self.eos, self.pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        self.added_bos = added_bos(tokenizer)
        more = [token for token in _added_before(tokenizer) if token != self.bos]
        self._before = [str(token) for token in tokenizer.convert_ids_to_tokens(more)]
        # If BOS or EOS is also the unknown token, the two cannot be told apart.
        self.unknown = None if tokenizer.unk_token_id in (self.bos, self.eos) else tokenizer.unk_token_id
        added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        unknown = {tokenizer.unk_token} - {tokenizer.bos_token, tokenizer.eos_token}
        self.special = frozenset(special) | frozenset(map(str, tokenizer.all_special_tokens)) - unknown
        self.special -= unknown
        self._added = _alternatives({*added, *self.special} - unknown)
        self.template_tokens = self._template_tokens(rendering or Rendering())
        ends = [tokenizer.convert_tokens_to_ids(self.template_tokens.end)] if self.template_tokens.end else []
        self.end_tokens = frozenset({self.eos, *ends} - {None})
        for token in allowed:
            if token not in self.special:
                near = did_you_mean(token, self.special)
                raise DataError(f"data.special_tokens: '{token}' is not a special token of the tokenizer{near}")
        self._special = _alternatives({*self.special, self.template_tokens.end} - {"", *allowed})
        self._inside = self._ids(self.template_tokens.inside)
        self._written = self._ids(self.template_tokens.written)
        begins = frozenset({self.bos} - {None}) - self.end_tokens
        pads = frozenset({self.pad} - {None, tokenizer.unk_token_id, self.bos}) - self.end_tokens
        self._bos_and_pad = begins | pads  # not allowed inside a sequence, unless the template writes them there
        self._never_in_loss = (self.end_tokens | self._bos_and_pad) - self._inside

    def _ids(self, tokens: frozenset[str]) -> frozenset[int]:
        return frozenset(self.tokenizer.convert_tokens_to_ids(list(tokens)))

    def special_in(self, text: str) -> str | None:
        """The first special token in a text, or None."""
        found = self._special.search(text) if self._special is not None else None
        return found[0] if found is not None else None

    def final_end_token(self, text: str) -> str:
        """The EOS or end-of-turn token that a text ends with, or ""."""
        ends = {self.tokenizer.eos_token, self.template_tokens.end} - {None, ""}
        return next((str(end) for end in ends if text.endswith(str(end))), "")

    def text_notes(self, prompt: str) -> tuple[str, ...]:
        """A note if the tokenizer would prepend tokens other than BOS, since prefopt does not prepend them."""
        if all(token in prompt for token in self._before):
            return ()
        return (
            f"the tokenizer prepends '{''.join(self._before)}' to a text, prefopt does not (write it into the prompt)",
        )

    def next_special(self, text: str, begin: int) -> str:
        """The special token at a position of a text, with white space before it, or ""."""
        at = begin + len(text[begin:]) - len(text[begin:].lstrip())
        found = self._special.match(text, at) if self._special is not None else None
        return text[begin : found.end()] if found is not None else ""

    def last_special(self, text: str, begin: int) -> str:
        """The special token that a text ends with, or ""."""
        found = list(self._special.finditer(text, begin)) if self._special is not None else []
        return found[-1][0] if found and found[-1].end() == len(text) else ""

    # Checks of token ids

    def prompt_problem(self, prompt: Sequence[int]) -> str:
        """What is wrong with a prompt, or "".

        A valid prompt has at least one token, has BOS exactly once and first if the tokenizer adds it, and has no pad
        token, unless the chat template writes one.
        """
        if not prompt:
            return "the prompt has no token"
        if self.added_bos is not None and prompt[0] != self.added_bos:
            return f"BOS ({self.added_bos}) is not the first token"
        if self.bos is not None and [*prompt[:2]] == [self.bos, self.bos]:
            return f"BOS ({self.bos}) is twice at the start"
        return self._misplaced(prompt[0], prompt[1:])

    def problem(self, prompt: Sequence[int], completion: Sequence[int], mask: Sequence[bool] | None = None) -> str:
        """What is wrong with the completion of a prompt, or "".

        A valid completion has at least one loss token and a mask of its length. BOS and the pad token occur only where
        the chat template writes them, EOS and end-of-turn tokens only as the last loss token.

        Args:
            prompt: token ids; may be empty if unknown.
            mask: which tokens of the completion are loss tokens; None: all.
        """
        mask = [True] * len(completion) if mask is None else mask
        if not completion or len(mask) != len(completion) or not any(mask):
            return f"{len(completion)} tokens, a mask of {len(mask)}, {sum(mask)} loss tokens"
        if found := self._misplaced(prompt[-1] if prompt else -1, completion):
            return found
        if self._never_in_loss.isdisjoint(completion):
            return ""
        for i, token in enumerate(completion):
            if not mask[i] or token not in self._never_in_loss:
                continue
            if token not in self.end_tokens:
                what = "BOS" if token == self.bos else "the pad token"
                return f"{what} ({token}) inside the completion"
            if i + 1 < len(completion) and mask[i + 1]:
                if i + 2 == len(completion) and completion[-1] in self.end_tokens - {token}:
                    return f"two EOS or end-of-turn tokens ({token}, {completion[-1]})"
                return f"EOS or an end-of-turn token ({token}) before the end of the completion"
        return ""

    def _misplaced(self, before: int, ids: Sequence[int]) -> str:
        """An error if BOS or the pad token occurs where the template does not write it, or "".

        Args: before: the token before `ids`; -1 if there is none.
        """
        if self._bos_and_pad.isdisjoint(ids):
            return ""
        disallowed = self._bos_and_pad - self._written
        for token in ids:
            # Some chat templates begin every exchange with BOS, after the EOS of the previous one.
            if token == self.bos and token in disallowed and before not in self.end_tokens:
                return f"BOS ({token}) inside the sequence"
            if token == self.pad and token in disallowed:
                return f"the pad token ({token}) inside the sequence"
            before = token
        return ""

    def problem_of(self, pair: EncodedPair) -> tuple[str, str]:
        """(`prompt`, `chosen` or `rejected`; what is wrong with it) of an encoded pair, or ("", "")."""
        if found := self.prompt_problem(pair.prompt_ids):
            return "prompt", found
        sides = [("chosen", pair.chosen_ids, pair.chosen_mask)]
        if pair.rejected_ids is not None:
            sides.append(("rejected", pair.rejected_ids, pair.rejected_mask or []))
        for side, ids, mask in sides:
            if found := self.problem(pair.prompt_ids, ids, mask):
                return side, found
        return "", ""

    # The chat template

    def _template_tokens(self, rendering: Rendering) -> TemplateTokens:
        """The template's special tokens, from one short exchange; an empty result if the template rejects it."""
        if not getattr(self.tokenizer, "chat_template", None) or self._added is None:
            return TemplateTokens()
        question, answer = {"role": "user", "content": "Qx7q"}, {"role": "assistant", "content": "Ax7a"}

        def rendered(messages: Messages, prompt: bool = False) -> str | None:
            try:
                return rendering.render(self.tokenizer, messages, generation_prompt=prompt)
            except RowProblem as problem:
                if problem.reason == TOO_SLOW:
                    raise DataError(f"{problem.found}, even for one short exchange ({problem.hint})") from None
                return None

        whole, before = rendered([question, answer]), rendered([question], prompt=True) or ""
        content, at, behind = (whole or "").rpartition("Ax7a")
        if whole is None or not at:
            return TemplateTokens()
        more = rendered([question, answer, question, answer])
        again = (more or "").partition("Ax7a")[2]
        # The end of the turn is what follows the answer in both renderings: after the last turn of a conversation,
        # some templates also write EOS.
        shared = _common(behind, again) if more is not None else ""
        named = [token[0] for token in self._added.finditer(shared) if token[0].strip()]
        named = [token for token in named if token in self.special] or named
        end = named[-1] if named else next((t[0] for t in self._added.finditer(behind) if t[0].strip()), "")
        written: list[str] = []
        last = 0
        for token in self._added.finditer(text := more or whole):
            follows = text[last : token.start()] == "" and written[-1:] in ([end], [str(self.tokenizer.eos_token)])
            if token.start() > 0 and not follows:  # BOS is always allowed at the start and after EOS
                written.append(token[0])
            last = token.end()
        own = behind[: behind.find(end)] if end else behind
        mine = content[len(before) :] + at + own if content.startswith(before) else ""
        inside = [token for token in self._added.findall(mine) if token in self.special]
        ours = frozenset(written) & (self.special | {end})
        return TemplateTokens(end, frozenset(inside) - {end}, ours, repeats=at in content)


def _common(one: str, other: str) -> str:
    """The common prefix of two texts."""
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def check_row_structure(pair: EncodedPair, structure: Structure) -> str | None:
    """One line on what is wrong with an encoded pair, or None."""
    side, found = structure.problem_of(pair)
    return f"{side}: {found}" if found else None


def _alternatives(tokens: set[str]) -> re.Pattern[str] | None:
    """A pattern that matches any of the texts and prefers longer ones; None without texts."""
    texts = sorted(filter(None, tokens), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def added_bos(tokenizer: Any) -> int | None:
    """The BOS id if this tokenizer prepends it to a text; None otherwise."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def _added_before(tokenizer: Any) -> list[int]:
    """The ids that this tokenizer prepends to a text."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    begin = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return list(whole[:begin])


def completion_end_tokens(tokenizer: Any, rendering: Rendering | None = None) -> frozenset[int]:
    """The tokens that end a completion in training: EOS, and the chat template's end-of-turn token."""
    if not getattr(tokenizer, "chat_template", None):  # then only EOS
        return frozenset({tokenizer.eos_token_id} - {None})
    return Structure(tokenizer, rendering).end_tokens
