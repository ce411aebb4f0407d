"""From `PairRow`s to token ids: boundary, BOS, EOS, truncation.

Prompt and completion are tokenised together, so a token never differs from what the model would have seen. What every
row must be is `structure`'s to say.
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
TOO_LONG = "longer than data.max_length"  # the reason of rows that `overlong: drop` drops
_BATCH = 512  # rows tokenised at a time
_SLOW = 3  # rows that may take their template too long before it is given up


@dataclass(frozen=True)
class CutPair:
    """An encoded pair and what truncation did to it. Lengths are those before it. `notes` are to be counted."""

    pair: EncodedPair
    lengths: tuple[int, ...]  # prompt, chosen and, in pairs, rejected
    cut_prompt: bool
    cut_completion: bool
    unterminated: int  # completions without EOS or an end-of-turn token
    notes: tuple[str, ...] = ()


class Encoder:
    """Turns rows into token ids with one tokenizer.

    Args:
        tokenizer: one of transformers'.
        max_length: the most tokens that prompt and completion may have together.
        rendering: what the chat template is given.
        overlong: of a longer row, whether the prompt's head goes first, the completion's tail, or all of it.
        special_tokens: special tokens that the text of data may hold.

    Raises: DataError when `max_length` leaves no room for a prompt token and a completion token, or for a chat template
        that does not come to an end.
    """

    form = "completions"  # of the sequences that it makes
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
                f"data.max_length: found {max_length}, expected at least 2: a prompt token and a scored one"
            )
        self.tokenizer, self.max_length, self.overlong = tokenizer, max_length, overlong
        self.rendering = rendering or Rendering()
        self.structure = Structure(tokenizer, self.rendering, special_tokens)
        self.bos, self.eos = self.structure.added_bos, self.structure.eos
        self.terminators = self.structure.terminators
        self._slow = 0

    def rows(self, rows: Iterable[PairRow]) -> Iterator[CutPair | BadRow]:
        """Each row encoded, or what is wrong with it, in order. Rows are tokenised a few hundred at a time.

        Raises: DataError when one row after the other takes the chat template too long.
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
        """(what `_finish` is to be told, the texts whose ids it is to be given)."""
        if row.ids is not None:  # a row that carries its ids needs no text
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

        Args: args: the row's own arguments of the chat template. check: hold it to what training holds rows to.
        Raises: RowProblem when the chat template refuses it, or nothing is left of it.
        """
        if check and not isinstance(prompt, str):
            self._check_text("prompt", texts_in([prompt, args]))
        text = prompt if isinstance(prompt, str) else prompt_text(prompt, self.tokenizer, self.rendering, args)
        ids = self._with_bos(self._tokenize([text])[0])
        if check and (found := self.structure.prompt_problem(ids)):
            raise _misplaced("prompt", found)
        return ids

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

    # What a row may hold

    def _check_texts(self, row: PairRow) -> None:
        """Raises: RowProblem where the data's own text holds what the tokenizer would read as a control token.

        A text prompt may: it is written as the model reads it, turns and all.
        """
        if not isinstance(row.prompt, str):
            self._check_text("prompt", texts_in([row.prompt, row.template_args]))
        for key, side in _sides(row):
            if isinstance(side, str):
                end = self.structure.ends_with_terminator(side)
                self._check_text(key, [side[: len(side) - len(end)]])
            else:
                self._check_text(key, texts_in(side))

    def _check_text(self, key: str, texts: Iterable[str]) -> None:
        for text in texts:
            token = self.structure.special_in(text)
            if token is None:
                continue
            if self.structure.ends_with_terminator(token) and key != "prompt":
                raise RowProblem("terminator inside", key, f"'{token}' inside a completion", "it at the end only")
            raise RowProblem(
                "special token in the text",
                key,
                f"'{token}' in the text, a special token of the tokenizer",
                "text without special tokens",
                f"{DROP}; or let it be read as that token: --data.special_tokens '{token}'",
            )

    def _check_slow(self, problem: RowProblem, where: str) -> None:
        self._slow += problem.reason == TOO_SLOW
        if self._slow >= _SLOW:
            raise DataError(f"{problem.at(where).message}; so did {self._slow - 1} rows before it")

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
        """The ids of each text; one that stands there twice, as the prompt of both sides, is tokenised once."""
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
        assert all(other == prompt for other, _, _ in encoded), "one prompt text has given two lists of ids"
        prompt = self._with_bos(prompt)
        completions, masks = [ids for _, ids, _ in encoded], [mask for _, _, mask in encoded]
        whole = [self._ends(ids, side) for ids, side in zip(completions, sides, strict=True)]
        key = text_hash(sides[0].prompt)[:16]
        notes = tuple(dict.fromkeys(note for side in sides for note in side.notes))
        if self.structure.unknown is not None and any(self.structure.unknown in ids for ids in (prompt, *completions)):
            notes = (*notes, "the tokenizer has no token for some of the text, and reads its unknown token there")
        return self._cut(row, key, prompt, completions, masks, whole, notes)

    def _sampled(self, row: PairRow, ids: tuple[list[int], ...]) -> CutPair:
        """A row that carries its ids. A completion that was not ended stays so: nothing is added to it."""
        prompt, *completions = ids
        masks = [[True] * len(side) for side in completions]
        whole = [side[-1] in self.terminators for side in completions]
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
        """At most `max_length` tokens of it. Args: key: of the prompt; whole: whether each completion is terminated."""
        lengths = (len(prompt), *(len(ids) for ids in completions))
        self._check_length(len(prompt) + max(lengths[1:]))
        # Both sides keep one prompt: the longer of them decides what is left for it.
        need = 1 if self.overlong == "truncate_completion" else max(lengths[1:])
        room = max(self.max_length - need, 1)
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
        if cut_prompt and len(prompt) == 1:
            notes = (*notes, "the prompt is cut to one token, since a completion fills data.max_length")
        return CutPair(pair, lengths, cut_prompt, any(cut), len(completions) - ended, notes)

    def _check_length(self, length: int) -> None:
        if self.overlong == "drop" and length > self.max_length:
            raise RowProblem(TOO_LONG, "", f"{length:,} tokens", f"at most {self.max_length:,}", "data.overlong: drop")

    def _ends(self, ids: list[int], side: Rendered) -> bool:
        return side.terminated or (self.eos is not None and ids[-1] == self.eos)

    def _side(self, key: str, side: Rendered, parts: list[list[int]]) -> tuple[list[int], list[int], list[bool]]:
        """(prompt ids, completion ids, mask): `parts` are the ids of the texts that `_texts` names."""
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
        """(ids, where each part ends) where a token would span a boundary: each stretch is tokenised alone.

        So it is at inference, where a policy reads the prompt's tokens and answers with others. In text the writer
        chooses where the white space stands, and has chosen the place that no policy can answer from.
        """
        spans = RowProblem(
            "token over the boundary",
            key,
            "its first characters merge with the end of the prompt into one token",
            "a prompt that is a token prefix of the whole",
            "move white space from the end of the prompt to the beginning of the completions",
        )
        if not side.chat and not self.splits_text:
            raise spans
        ids, marks = list(parts[0]), [len(parts[0])]
        ends = [mark for span in side.spans for mark in span]
        for (begin, end), whole in zip(pairwise(ends), parts[1:], strict=True):
            # Some tokenizers put a space before whatever they are given: then it is given something before it.
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


def _misplaced(key: str, found: str) -> RowProblem:
    expected = "BOS, EOS and end-of-turn tokens where the tokenizer and its template put them, and nowhere else"
    return RowProblem("misplaced special token", key, found, expected)


def _sides(row: PairRow) -> list[tuple[str, str | Messages]]:
    assert row.chosen is not None, "a row without any completion has nothing to score"
    return [("chosen", row.chosen)] + ([("rejected", row.rejected)] if row.rejected is not None else [])


def _texts(side: Rendered) -> list[str]:
    """The beginnings whose ends are the boundaries of spans: the prompt first, the whole last."""
    return [side.text[:mark] for span in side.spans for mark in span]


def pad_token(tokenizer: Any, vocab_rows: int | None = None) -> tuple[int, str | None]:
    """(the id to pad with, a sentence to say once where it is not the tokenizer's own).

    Args: vocab_rows: rows of the model's embedding, in which what pads needs one; it is masked whatever it is.
    Raises: DataError when the tokenizer has neither a pad token nor EOS.
    """
    if tokenizer.pad_token_id is not None and (vocab_rows is None or tokenizer.pad_token_id < vocab_rows):
        return tokenizer.pad_token_id, None
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has neither a pad token nor an EOS token, expected one of them")
    why = "the tokenizer has no pad token"
    if tokenizer.pad_token_id is not None:
        why = f"the pad token '{tokenizer.pad_token}' ({tokenizer.pad_token_id}) has no row in the model"
    return tokenizer.eos_token_id, f"{why}; EOS '{tokenizer.eos_token}' pads instead"
