"""The prompts of rounds from a data file: each once, as tokens, and short enough for a completion."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.data.bad_rows import BadRow, BadRows, OnBadRow, RowProblem, first_bad_row
from prefopt.data.chat import Messages
from prefopt.data.encoder import Encoder
from prefopt.data.encoding_report import EXAMPLES
from prefopt.data.rows import Dialogues, RowReader, prompt_key
from prefopt.data.templates import Rendering
from prefopt.errors import DataError
from prefopt.storage import text_hash
from prefopt.types import PairRow, Prompt


@dataclass(frozen=True)
class Prompts:
    """The prompts of a file in its order, and the lines of its report."""

    prompts: list[Prompt]
    report: list[str]


def read_prompts(
    path: str,
    tokenizer: Any,
    *,
    render: Callable[[str | Messages], str | Messages],
    max_prompt: int,
    max_length: int,
    columns: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = "error",
    with_answers: bool = False,
    dialogues: Dialogues = "text",
    rendering: Rendering | None = None,
    special_tokens: Sequence[str] = (),
) -> Prompts:
    """The prompts of a file of pairs, of prompts and completions, or of prompts alone; each is read once.

    Args:
        path, columns, on_bad_row, dialogues, rendering, special_tokens: as in `encode_file`.
        render: from the prompt of the file to the prompt that the policy reads.
        max_prompt: most tokens of a prompt, which must leave room for a completion.
        max_length: most tokens of a prompt and the file's answer together; a longer answer is right-truncated.
        with_answers: whether every example must have a completion.
    Raises: DataError at a bad row, under `error`, or when no example is usable.
    """
    encoder = Encoder(tokenizer, max_length, rendering=rendering, special_tokens=special_tokens)
    reader = RowReader(path, columns=columns, need_rejected=False, prompts_only=not with_answers, dialogues=dialogues)
    items = iter(reader)
    prompts: dict[str, Prompt] = {}
    bad = BadRows(EXAMPLES)
    read = twice = 0
    for row in items:
        read += 1
        found = row if isinstance(row, BadRow) else _prompt(row, encoder, render, max_prompt)
        if isinstance(found, BadRow):
            if on_bad_row == "error":
                raise first_bad_row(found, items)
            bad.add(found)
        elif found.key in prompts:
            twice += 1
        else:
            prompts[found.key] = found
    if not prompts:
        raise bad.none_left(path, read, "has a usable prompt")
    lengths = sorted(len(prompt.ids) for prompt in prompts.values())
    report = [
        f"{path}: {read:,} examples, {len(prompts):,} prompts"
        + (f" ({twice:,} duplicates)" if twice else "")
        + f", {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}"
    ]
    report += [
        f"  dropped: {number:,} {reason} ({', '.join(bad.examples[reason])})" for reason, number in bad.most_common()
    ]
    report += [f"  note: {note}" for note in reader.unread.notes(chat=bool(getattr(tokenizer, "chat_template", None)))]
    return Prompts([*prompts.values()], report)


def _prompt(
    row: PairRow, encoder: Encoder, render: Callable[[str | Messages], str | Messages], most: int
) -> Prompt | BadRow:
    try:
        try:
            asked = render(row.prompt)
        except ValueError as error:
            raise RowProblem("prompt refused", "prompt", str(error), "a prompt that the method accepts") from None
        ids = encoder.prompt(asked, row.template_args, check=True)
        if len(ids) > most:
            raise RowProblem(
                "prompt too long",
                "prompt",
                f"{len(ids)} tokens",
                f"at most {most}: generate.max_tokens must fit in data.max_length beside it",
                "raise data.max_length, lower generate.max_tokens, or --data.on_bad_row skip",
            )
    except RowProblem as problem:
        return problem.at(row.where)
    key = prompt_key(row.prompt)
    if row.template_args:  # the same question with other tools is another prompt
        key = text_hash(f"{key}{json.dumps(row.template_args, sort_keys=True)}")[:16]
    if row.chosen is None:
        return Prompt(row.prompt, tuple(ids), key, row.where)
    (encoded,) = encoder.rows([row])
    if isinstance(encoded, BadRow):
        return encoded
    answer = encoded.pair.chosen_ids[: encoder.max_length - len(ids)]  # so that training does not truncate the prompt
    return Prompt(row.prompt, tuple(ids), key, row.where, answer_text(row.chosen), tuple(answer))


def answer_text(completion: str | Messages) -> str:
    """The reference answer for a judge: the text, or that of the assistant turns."""
    if isinstance(completion, str):
        return completion.strip()
    return "\n".join(turn.get("content") or "" for turn in completion if turn["role"] == "assistant").strip()


def hold_out(prompts: Sequence[Prompt], number: int) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, `number` held-out prompts), by the hash of the prompt, independent of the other prompts."""
    order = sorted(prompts, key=lambda prompt: text_hash(prompt.key))
    held = {prompt.key for prompt in order[:number]}
    return [p for p in prompts if p.key not in held], [p for p in prompts if p.key in held]


def slices(
    prompts: Sequence[Prompt], rounds: int, each: int | None, seed: int, held_out: int = 0
) -> list[list[Prompt]]:
    """The prompts of each round, drawn without replacement.

    Args: each: prompts per round; None: an equal number. held_out: number of held-out prompts, for the error line.

    Raises: DataError when there are too few.
    """
    each = len(prompts) // rounds if each is None else each
    if each < 1 or each * rounds > len(prompts):
        raise DataError(
            f"rounds.prompts: {rounds} rounds of {max(each, 1):,} need {rounds * max(each, 1):,} prompts, found "
            f"{len(prompts):,}"
            + (f" and {held_out:,} held out (rounds.eval_prompts)" if held_out else "")
            + "; each prompt is used once (lower rounds.prompts, rounds.count or rounds.eval_prompts, or add data)"
        )
    order = sorted(prompts, key=lambda prompt: text_hash(f"{seed}:{prompt.key}"))
    return [order[i * each : (i + 1) * each] for i in range(rounds)]
