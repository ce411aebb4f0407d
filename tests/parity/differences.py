"""The ids and masks that two encoders give the same rows, and the kinds of difference between them."""

import json
from collections import Counter

from prefopt.data.encoder import Encoder
from prefopt.data.rows import BadRow, RowReader
from tests.parity.trajectory import row

SAME = "the same ids and masks"


class Begun(dict):
    """A row whose prompt ends with the beginning of the answer."""


def ours(rows, tokenizer, folder, max_length=512):
    """Per row: {side: (ids, which are scored)}, or the `BadRow` with the reason why it was refused."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = list(RowReader(file))
    encoded = iter(Encoder(tokenizer, max_length).rows(row for row in read if not isinstance(row, BadRow)))
    out = []
    for item in read:
        cut = item if isinstance(item, BadRow) else next(encoded)
        if not isinstance(cut, BadRow):
            pair = cut.pair
            head = [False] * len(pair.prompt_ids)
            cut = {
                "chosen": row(pair.prompt_ids + pair.chosen_ids, head + pair.chosen_mask),
                "rejected": row(pair.prompt_ids + pair.rejected_ids, head + pair.rejected_mask),
            }
            if not isinstance(item.prompt, str) and item.prompt[-1]["role"] == "assistant":
                cut = Begun(cut)
        out.append(cut)
    return out


def count(ours, theirs, tokenizer):
    """How many rows show each kind of difference; a row may show several."""
    return Counter(kind for mine, other in zip(ours, theirs, strict=True) for kind in row_kinds(mine, other, tokenizer))


def table(counts):
    """`{column: {kind: rows}}` as a Markdown table."""
    kinds = sorted({kind for column in counts.values() for kind in column}, key=lambda kind: (kind != SAME, kind))
    lines = [f"| rows | {' | '.join(counts)} |", "|---|" + "---|" * len(counts)]
    lines += [f"| {kind} | {' | '.join(str(column.get(kind, 0)) for column in counts.values())} |" for kind in kinds]
    return "\n".join(lines) + "\n"


def row_kinds(mine, other, tokenizer):
    if isinstance(mine, BadRow):
        return {f"refused: {mine.reason}"}
    if isinstance(mine, Begun) and mine != other:
        return {"answer begun in the prompt"}
    found = {kind for side in mine for kind in _side_kinds(mine[side], other[side], tokenizer)}
    return found or {SAME}


def _side_kinds(mine, other, tokenizer):
    (ids, scored), (other_ids, other_scored) = mine, other
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and other_ids[:2] == (bos, bos):
        yield "BOS twice"
        other_ids, other_scored = other_ids[1:], other_scored[1:]
    elif bos is not None and ids[0] == bos != other_ids[0]:
        yield "no BOS"
        ids, scored = ids[1:], scored[1:]
    if len(other_ids) > len(ids) and other_ids[: len(ids)] == ids:
        assert any(other_scored[len(ids) :])
        yield "EOS twice" if other_ids[len(ids) :] == (eos,) == ids[-1:] else "loss after the end of turn"
        other_ids, other_scored = other_ids[: len(ids)], other_scored[: len(ids)]
    if ids != other_ids:
        yield "other ids"
        return
    boundary = scored.index(True)
    if any(other_scored[:boundary]):
        yield "end of the prompt in the loss"
    if any(theirs and not our for our, theirs in zip(scored[boundary:], other_scored[boundary:], strict=True)):
        yield "user turns in the loss"
    if any(our and not theirs for our, theirs in zip(scored, other_scored, strict=True)):
        yield "beginning of the completion masked"


def cuts(rows, whole, eos):
    """Counts of the effects of truncation on rows that are untruncated in `whole`; None in `rows` is a dropped row."""
    kept = [(short, full) for short, full in zip(rows, whole, strict=True) if short is not None]
    sides = [(short[side], full[side]) for short, full in kept for side in short]
    return {
        "rows dropped": len(rows) - len(kept),
        "prompts truncated from the left": sum(_prompt(s["chosen"]) < _prompt(f["chosen"]) for s, f in kept),
        "completions truncated from the right": sum(ids[-1] != eos for (ids, _), _ in sides),
        "completion tokens that remain": sum(sum(scored) for (_, scored), _ in sides),
    }


def _prompt(side):
    return side[1].index(True)
