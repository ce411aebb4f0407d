"""Two completions in one sequence, for a judge that reads both: the prompt, then the first one, then the second one.

The text is `PROMPT` FIRST `completion` SECOND `completion` and EOS. Its parts are tokenised one by one, so a completion
has the same tokens in either position. A conversation is written as plain text, without the chat template.
"""

from __future__ import annotations

from typing import Any

from prefopt.data.encoder import CutPair, Encoder
from prefopt.data.rows import Messages, RowProblem
from prefopt.errors import DataError
from prefopt.storage import text_hash
from prefopt.types import EncodedPair, Needs, PairRow

FIRST, SECOND = "\n\n[Response A]\n", "\n\n[Response B]\n"
PROMPT_FRACTION = 1224 / 2048  # of the tokens, under truncation: PairRM's limits are 1224 and twice 412


def encoder_for(needs: Needs) -> type[Encoder]:
    """The encoder whose sequences a method reads."""
    return BothOrders if needs.sequences == "both_orders" else Encoder


def plain_text(turns: str | Messages) -> str:
    """A prompt or a completion as text: one turn as it is, several turns with their roles before them."""
    if isinstance(turns, str):
        return turns
    if len(turns) == 1:
        return turns[0].get("content") or ""
    return "\n\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in turns)


class BothOrders(Encoder):
    """Encodes a pair as two sequences of the prompt and both completions: chosen first, and rejected first.

    Under truncation the prompt is left-truncated to `PROMPT_FRACTION` of the tokens, or to what the completions leave;
    the completions get the rest, half each (a shorter one leaves its unused part to the other), right-truncated.

    `overlong: truncate_completion` is the same as `truncate_prompt` here.

    Args: as of Encoder. Raises: DataError when `max_length` leaves no token for each of the three.
    """

    form = f"both orders, {FIRST!r} and {SECOND!r}"

    def __init__(self, tokenizer: Any, max_length: int, **more: Any) -> None:
        super().__init__(tokenizer, max_length, **more)
        self._first, self._second = self._tokenize([FIRST, SECOND])
        self._end = [] if self.eos is None else [self.eos]
        least = len(self._first) + len(self._second) + len(self._end) + 4
        if max_length < least:
            raise DataError(
                f"data.max_length: found {max_length}, expected at least {least}: a sequence holds the prompt and both "
                "completions"
            )

    def reread(self, pair: EncodedPair) -> EncodedPair:
        """Both orders of a pair that was encoded as two completions."""
        assert pair.rejected_ids is not None
        row = PairRow("", "", "", pair.columns, pair.where, prompt_key=pair.raw_prompt_key)
        return self._join(row, pair.prompt_key, pair.prompt_ids, [pair.chosen_ids, pair.rejected_ids]).pair

    def _prepare(self, row: PairRow) -> tuple[Any, list[str]]:
        assert row.chosen is not None
        assert row.rejected is not None
        self._check_texts(row)
        prompt, *sides = (plain_text(part) for part in (row.prompt, row.chosen, row.rejected))
        return prompt, [prompt, *(side.strip() for side in sides)]

    def _finish(self, row: PairRow, prepared: Any, ids: list[list[int]]) -> CutPair:
        key = text_hash(prepared)[:16]
        return self._join(row, key, self._with_bos(ids[0]), ids[1:])

    def _join(self, row: PairRow, key: str, prompt: list[int], sides: list[list[int]]) -> CutPair:
        one, other = (self._bare(name, ids) for name, ids in zip(("chosen", "rejected"), sides, strict=True))
        fixed = len(self._first) + len(self._second) + len(self._end)
        length = len(one) + len(other) + fixed
        room = self.max_length - fixed
        self._check_length(len(prompt) + length)
        limit = max(int(room * PROMPT_FRACTION), room - len(one) - len(other), 2)
        kept = prompt
        if len(prompt) > limit:
            kept = prompt[:1] + prompt[len(prompt) - limit + 1 :] if self.bos is not None else prompt[-limit:]
        left = room - len(kept)
        cut = [ids[: max(left // 2, left - len(rest))] for ids, rest in ((one, other), (other, one))]
        orders = [[*self._first, *a, *self._second, *b, *self._end] for a, b in (cut, cut[::-1])]
        pair = EncodedPair(
            prompt_ids=kept,
            chosen_ids=orders[0],
            rejected_ids=orders[1],
            chosen_mask=[True] * len(orders[0]),
            rejected_mask=[True] * len(orders[1]),
            columns=row.columns,
            where=row.where,
            prompt_key=key,
            raw_prompt_key=row.prompt_key,
        )
        shorter = [len(a) < len(b) for a, b in zip(cut, (one, other), strict=True)]
        return CutPair(pair, (len(prompt), length, length), kept is not prompt, any(shorter), 0 if self._end else 2)

    def _bare(self, key: str, ids: list[int]) -> list[int]:
        """A completion without EOS at its end."""
        ids = ids[:-1] if ids and ids[-1] == self.eos else ids
        if not ids:
            raise RowProblem("empty completion", key, "no token", "a non-empty completion")
        if self.eos in ids:
            text = self.tokenizer.convert_ids_to_tokens(self.eos)
            raise RowProblem("EOS inside the completion", key, f"'{text}' inside a completion", "it at the end only")
        return ids
