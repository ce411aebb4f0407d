"""Encode `PairRow`s as token ids: boundary of prompt and completion, BOS, EOS, truncation.

Prompt and completion are tokenised together, so that training reads the tokens of the whole text. Which special tokens
may be where is checked by `structure`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, Literal

from prefopt.data.bad_rows import DROP, BadRow, RowProblem
from prefopt.data.chat import Rendered, prompt_text, render, texts_in
from prefopt.data.rows import Messages
from prefopt.data.structure import Structure
from prefopt.data.templates import TOO_SLOW, Rendering
from prefopt.errors import DataError
from prefopt.storage import text_hash
from prefopt.types import EncodedPair, PairRow

Overlong = Literal["truncate_prompt", "drop", "truncate_completion"]
TOO_LONG = "longer than data.max_length"  # reason of examples that `overlong: drop` drops
_BATCH = 512  # rows tokenised at a time
_MOST_TIMEOUTS = 3  # template timeouts after which encoding stops


@dataclass(frozen=True)
class CutPair:
    """An encoded pair. `lengths` are those before truncation; the report counts `notes`."""

    pair: EncodedPair
    lengths: tuple[int, ...]  # prompt, chosen and, in pairs, rejected
    cut_prompt: bool
    cut_completion: bool
    unterminated: int  # completions without EOS or end-of-turn token
    notes: tuple[str, ...] = ()


class Encoder:
    """Encodes examples with one tokenizer.

    Args:
        tokenizer: one of transformers'.
        max_length: most tokens of prompt and completion together.
        rendering: arguments of the chat template.
        overlong: whether a longer example is left-truncated in the prompt first, right-truncated in the completion
            first, or dropped.
        special_tokens: special tokens that the text of data may contain.

    Raises: DataError when `max_length` leaves no room for a prompt token and a completion token, or for a chat template
        that does not come to an end.
    """

    form = "completions"  # name of the kind of sequences; part of cache keys
    splits_text = False  # whether a text's completion may be tokenised alone, where it merges with its prompt

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        *,
        rendering: Rendering | None = None,
        overlong: Overlong = "truncate_prompt",
        special_tokens: Sequence[str] = (),
    ) -> None:
        if max_length < 2:
            raise DataError(
                f"data.max_length: found {max_length}, expected at least 2: one prompt token and one completion token"
            )
        self.tokenizer, self.max_length, self.overlong = tokenizer, max_length, overlong
        self.rendering = rendering or Rendering()
        self.structure = Structure(tokenizer, self.rendering, special_tokens)
        self.bos, self.eos = self.structure.added_bos, self.structure.eos
        self.end_tokens = self.structure.end_tokens
        self._slow = 0

    def rows(self, rows: Iterable[PairRow]) -> Iterator[CutPair | BadRow]:
        """Each example encoded, or what is wrong with it, in order. A few hundred are tokenised at a time.

        Raises: DataError when the chat template times out repeatedly.
        """
        rows = iter(rows)
        while batch := list(islice(rows, _BATCH)):
            prepared: list[tuple[Any, list[str]] | BadRow] = []
            for row in batch:
                try:
                    prepared.append(self._prepare(row))
                except RowProblem as problem:
                    self._check_slow(problem, row.where)
                    prepared.append(problem.at(row.where))
            ids = iter(self._tokenize([text for one in prepared if not isinstance(one, BadRow) for text in one[1]]))
            for row, one in zip(batch, prepared, strict=True):
                if isinstance(one, BadRow):
                    yield one
                    continue
                mine = [next(ids) for _ in one[1]]
                try:
                    yield self._checked(self._finish(row, one[0], mine))
                except RowProblem as problem:
                    yield problem.at(row.where)

    def _prepare(self, row: PairRow) -> tuple[Any, list[str]]:
        """(what `_finish` needs, the texts whose ids it needs)."""
        if row.ids is not None:  # sampled by a policy: encoded already
            return None, []
        self._check_texts(row)
        sides = [self._render(row, key, side) for key, side in _sides(row)]
        return sides, [text for side in sides for text in _texts(side)]

    def _finish(self, row: PairRow, prepared: Any, ids: list[list[int]]) -> CutPair:
        if row.ids is not None:
            return self._sampled(row, row.ids)
        following = iter(ids)
        return self._pair(row, prepared, [[next(following) for _ in _texts(side)] for side in prepared])

    def prompt(
        self, prompt: str | Messages, args: Mapping[str, Any] | None = None, *, check: bool = False
    ) -> list[int]:
        """The tokens of a prompt alone, as a policy reads them before it answers.

        Args: args: the example's own arguments of the chat template. check: apply the checks of training data.
        Raises: RowProblem when the chat template refuses it, or it has no tokens.
        """
        if check and not isinstance(prompt, str):
            self._check_text("prompt", texts_in([prompt, args]))
        text = prompt if isinstance(prompt, str) else prompt_text(prompt, self.tokenizer, self.rendering, args)
        ids = self._with_bos(self._tokenize([text])[0])
        if check and (found := self.structure.prompt_problem(ids)):
            raise _misplaced("prompt", found)
        return ids

    def _with_bos(self, prompt: list[int]) -> list[int]:
        """The prompt with BOS exactly once, if this tokenizer adds one."""
        if self.bos is not None:
            begin = next((i for i, token in enumerate(prompt) if token != self.bos), len(prompt))
            prompt = [self.bos, *prompt[begin:]]
        if not prompt:
            raise RowProblem("empty prompt", "prompt", "no token", "at least one (this tokenizer adds no BOS)")
        return prompt

    def pair(self, row: PairRow) -> EncodedPair:
        """One example encoded. Raises: DataError with the error line of a bad one."""
        (encoded,) = self.rows([row])
        if isinstance(encoded, BadRow):
            raise DataError(encoded.message)
        return encoded.pair

    # Checks of the text

    def _check_texts(self, row: PairRow) -> None:
        """Raises: RowProblem where the data's own text contains a special token of the tokenizer.

        A text prompt may contain them: it is written as the model reads it, including the markup of turns.
        """
        if not isinstance(row.prompt, str):
            self._check_text("prompt", texts_in([row.prompt, row.template_args]))
        for key, side in _sides(row):
            if isinstance(side, str):
                end = self.structure.final_end_token(side)
                self._check_text(key, [side[: len(side) - len(end)]])
            else:
                self._check_text(key, texts_in(side))

    def _check_text(self, key: str, texts: Iterable[str]) -> None:
        for text in texts:
            token = self.structure.special_in(text)
            if token is None:
                continue
            if self.structure.final_end_token(token) and key != "prompt":
                found = f"'{token}' inside a completion"
                raise RowProblem("EOS inside the completion", key, found, "it at the end only")
            raise RowProblem(
                "special token in the text",
                key,
                f"'{token}' in the text, a special token of the tokenizer",
                "text without special tokens",
                f"{DROP}; or allow it: --data.special_tokens '{token}'",
            )

    def _check_slow(self, problem: RowProblem, where: str) -> None:
        self._slow += problem.reason == TOO_SLOW
        if self._slow >= _MOST_TIMEOUTS:
            message = problem.at(where).message
            raise DataError(f"{message}; the chat template timed out for {self._slow - 1} examples before")

    def _checked(self, cut: CutPair) -> CutPair:
        side, found = self.structure.problem_of(cut.pair)
        if found:
            raise _misplaced(side, found)
        return cut

    # Text to ids

    def _render(self, row: PairRow, key: str, side: str | Messages) -> Rendered:
        return render(
            row.prompt,
            side,
            self.tokenizer,
            key,
            rendering=self.rendering,
            args=row.template_args,
            structure=self.structure,
        )

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text; repeated texts, such as the prompt of both completions, are tokenised once."""
        if not texts:  # some tokenizers have no fast form and cannot take an empty list
            return []
        once = list(dict.fromkeys(texts))
        bare = {"return_attention_mask": False, "return_token_type_ids": False}
        ids = self.tokenizer(once, add_special_tokens=False, verbose=False, **bare)["input_ids"]
        known = dict(zip(once, ids, strict=True))
        return [known[text] for text in texts]

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _pair(self, row: PairRow, sides: list[Rendered], parts: list[list[list[int]]]) -> CutPair:
        keys = [key for key, _ in _sides(row)]
        encoded = [self._side(*args) for args in zip(keys, sides, parts, strict=True)]
        prompt = encoded[0][0]
        assert all(other == prompt for other, _, _ in encoded), "one prompt text was tokenised in two ways"
        prompt = self._with_bos(prompt)
        completions, masks = [ids for _, ids, _ in encoded], [mask for _, _, mask in encoded]
        whole = [self._ends(ids, side) for ids, side in zip(completions, sides, strict=True)]
        key = text_hash(sides[0].prompt)[:16]
        notes = tuple(dict.fromkeys(note for side in sides for note in side.notes))
        if self.structure.unknown is not None and any(self.structure.unknown in ids for ids in (prompt, *completions)):
            notes = (*notes, "the text contains characters that the tokenizer maps to its unknown token")
        return self._cut(row, key, prompt, completions, masks, whole, notes)

    def _sampled(self, row: PairRow, ids: tuple[list[int], ...]) -> CutPair:
        """An example that a policy sampled, as token ids. A completion that was stopped by its limit gets no EOS."""
        prompt, *completions = ids
        masks = [[True] * len(side) for side in completions]
        whole = [side[-1] in self.end_tokens for side in completions]
        return self._cut(row, text_hash(str(prompt))[:16], prompt, completions, masks, whole)

    def _cut(
        self,
        row: PairRow,
        key: str,
        prompt: list[int],
        completions: list[list[int]],
        masks: list[list[bool]],
        whole: list[bool],
        notes: tuple[str, ...] = (),
    ) -> CutPair:
        """Truncate to `max_length` tokens, and lists of numbers per loss token with them.

        With P prompt tokens and C tokens of the longer completion, `truncate_prompt` leaves
        max(max_length - C, 1) prompt tokens, then right-truncates completions to what remains.

        Args: key: hash of the prompt; whole: whether each completion ends with EOS or an end-of-turn token.
        """
        _check_token_columns(row, masks)
        lengths = (len(prompt), *(len(ids) for ids in completions))
        self._check_length(len(prompt) + max(lengths[1:]))
        # Both completions keep the same prompt, so the longer one determines its length.
        need = 1 if self.overlong == "truncate_completion" else max(lengths[1:])
        room = max(self.max_length - need, 1)
        cut_prompt = len(prompt) > room
        if cut_prompt:
            # left-truncated, without losing BOS
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
            token_columns={key: values[: sum(_mask_of(key, masks))] for key, values in row.token_columns.items()},
        )
        ended = sum(end and not short for end, short in zip(whole, cut, strict=True))
        if cut_prompt and len(prompt) == 1:
            notes = (*notes, "the prompt is truncated to one token because a completion fills data.max_length")
        return CutPair(pair, lengths, cut_prompt, any(cut), len(completions) - ended, notes)

    def _check_length(self, length: int) -> None:
        if self.overlong == "drop" and length > self.max_length:
            raise RowProblem(TOO_LONG, "", f"{length:,} tokens", f"at most {self.max_length:,}", "data.overlong: drop")

    def _ends(self, ids: list[int], side: Rendered) -> bool:
        return side.terminated or (self.eos is not None and ids[-1] == self.eos)

    def _side(self, key: str, side: Rendered, parts: list[list[int]]) -> tuple[list[int], list[int], list[bool]]:
        """(prompt ids, completion ids, mask). Args: parts: ids of the texts that `_texts` lists."""
        ids, marks = parts[-1], [len(part) for part in parts]
        if any(ids[: len(part)] != part for part in parts[:-1]):
            ids, marks = self._apart(key, side, parts)
        boundary = marks[0]
        mask = [False] * (len(ids) - boundary)
        for begin, end in zip(marks[::2], marks[1::2], strict=True):
            if end == begin:
                raise RowProblem("empty completion", key, "no token", "a non-empty completion")
            mask[begin - boundary : end - boundary] = [True] * (end - begin)
        completion = ids[boundary:]
        if not side.terminated and self.eos is not None and completion[-1] != self.eos:
            completion, mask = [*completion, self.eos], [*mask, True]
        return ids[:boundary], completion, mask

    def _apart(self, key: str, side: Rendered, parts: list[list[int]]) -> tuple[list[int], list[int]]:
        """(ids, end of each part) where a token would span a boundary: each part is tokenised alone, as at inference.

        Only for chat, where the template sets the boundary. In text the author sets it, and a boundary inside a token
        is one that no policy can generate from.
        """
        spans = RowProblem(
            "token spans the boundary",
            key,
            "its first characters and the end of the prompt are one token",
            "prompt tokens that are a prefix of the tokens of prompt and completion",
            "move white space from the end of the prompt to the beginning of the completions",
        )
        if not side.chat and not self.splits_text:
            raise spans
        ids, marks = list(parts[0]), [len(parts[0])]
        ends = [mark for span in side.spans for mark in span]
        for (begin, end), whole in zip(pairwise(ends), parts[1:], strict=True):
            # Some tokenizers prepend a space to every text; a lead of known tokens absorbs it.
            for lead in ("", "\n", "a", "."):
                first, both = self._tokenize([lead, lead + side.text[begin:end]])
                joined = [*ids, *both[len(first) :]]
                if both[: len(first)] == first and self._decode(joined) == self._decode(whole):
                    break
            else:
                raise spans
            ids = joined
            marks.append(len(ids))
        return ids, marks


def _mask_of(key: str, masks: list[list[bool]]) -> list[bool]:
    """The loss mask of the completion that a token column belongs to. Args: key: such as `chosen_weights`."""
    return masks[0 if key.startswith("chosen_") else 1]


def _check_token_columns(row: PairRow, masks: list[list[bool]]) -> None:
    """Raises: RowProblem where a list has not one number per loss token of its completion."""
    for key, values in row.token_columns.items():
        tokens = sum(_mask_of(key, masks))
        if len(values) != tokens:
            raise RowProblem(
                "numbers do not match the tokens",
                key,
                f"{len(values):,} numbers",
                f"{tokens:,}, one per loss token of the completion with its end token",
                f"compute them from the same tokenizer's ids, or {DROP}",
            )


def _misplaced(key: str, found: str) -> RowProblem:
    expected = "BOS, EOS and end-of-turn tokens where the tokenizer and its template put them, and nowhere else"
    return RowProblem("misplaced special token", key, found, expected)


def _sides(row: PairRow) -> list[tuple[str, str | Messages]]:
    assert row.chosen is not None, "an example without a completion has no loss tokens"
    return [("chosen", row.chosen)] + ([("rejected", row.rejected)] if row.rejected is not None else [])


def _texts(side: Rendered) -> list[str]:
    """The text up to each boundary of a span: the prompt first, the whole text last."""
    return [side.text[:mark] for span in side.spans for mark in span]


def pad_token(tokenizer: Any, vocab_rows: int | None = None) -> tuple[int, str | None]:
    """(id of the padding token, a note if it is not the tokenizer's own).

    Args: vocab_rows: rows of the model's embedding matrix; the id must be one of them although padding is masked.
    Raises: DataError when the tokenizer has neither a pad token nor EOS.
    """
    if tokenizer.pad_token_id is not None and (vocab_rows is None or tokenizer.pad_token_id < vocab_rows):
        return tokenizer.pad_token_id, None
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has neither a pad token nor an EOS token, expected one of them")
    why = "the tokenizer has no pad token"
    if tokenizer.pad_token_id is not None:
        why = f"the pad token '{tokenizer.pad_token}' ({tokenizer.pad_token_id}) is outside the model's vocabulary"
    return tokenizer.eos_token_id, f"{why}; EOS '{tokenizer.eos_token}' is used for padding"
