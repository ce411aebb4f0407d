"""The report of a data file that is printed before training, and a batch decoded with its masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from prefopt.data.layouts import positions_of
from prefopt.redaction import escaped
from prefopt.types import PairBatch

EXAMPLES = 3  # places listed for each reason


@dataclass(frozen=True)
class DataReport:
    """Counts of one file. Lengths are in tokens and before truncation, as a basis for choosing `max_length`.

    Args:
        path: the file, as given.
        max_length: tokens per sequence, prompt and completion.
        formats: number of examples of each format.
        read, kept: number of examples.
        dropped: number of dropped examples, by reason.
        examples: `file:line` of the first examples dropped for each reason.
        lengths: p5, p50, p95 and max for prompt, chosen and, in pairs, rejected.
        cut_prompts: pairs whose prompt was left-truncated.
        cut_completions: pairs with a right-truncated completion.
        unterminated: completions without EOS or an end-of-turn token, of `completions`.
        duplicates: pairs that repeat an earlier one.
        identical: pairs whose two completions are the same tokens, after truncation.
        notes: further remarks, one sentence each.
    """

    path: str
    max_length: int
    formats: Mapping[str, int]
    read: int
    kept: int
    dropped: Mapping[str, int]
    examples: Mapping[str, tuple[str, ...]]
    lengths: Mapping[str, tuple[int, int, int, int]]
    cut_prompts: int
    cut_completions: int
    completions: int
    unterminated: int
    duplicates: int
    identical: int
    notes: tuple[str, ...] = field(default=())

    def lines(self) -> list[str]:
        """The report as lines of text."""
        dropped = self.read - self.kept
        out = [f"data {self.path}: {self.read:,} examples read, {self.kept:,} kept, {dropped:,} dropped"]
        many = len(self.formats) > 1
        formats = (name + (f" ({count:,} examples)" if many else "") for name, count in self.formats.items())
        out.append(f"  format      {'; '.join(formats)}")
        for reason, count in sorted(self.dropped.items(), key=lambda item: -item[1]):
            shown = ", ".join(place.rsplit("/", 1)[-1] for place in self.examples.get(reason, ()))
            out.append(f"  dropped     {count:,} {reason}: {shown}{', ...' if count > EXAMPLES else ''}")
        out.append(f"  {'tokens':<10}{'p5':>8}{'p50':>8}{'p95':>8}{'max':>8}")
        for name, values in self.lengths.items():
            out.append(f"  {name:<10}{''.join(f'{value:>8,}' for value in values)}")
        of_kept = [f"{n:,} ({100 * n / max(self.kept, 1):.1f}%)" for n in (self.cut_prompts, self.cut_completions)]
        out.append(
            f"  truncated   to {self.max_length:,} tokens: {of_kept[0]} with a left-truncated prompt, "
            f"{of_kept[1]} with a right-truncated completion"
        )
        out.append(
            f"  unfinished  {self.unterminated:,} of {self.completions:,} completions have no EOS or end-of-turn token"
        )
        out.append(
            f"  duplicates  {self.duplicates:,}"
            + (f"; chosen == rejected: {self.identical:,}" if "rejected" in self.lengths else "")
        )
        return out + [f"  note        {note}" for note in self.notes]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DataReport:
        value = dict(value)
        value["examples"] = {key: tuple(rows) for key, rows in value["examples"].items()}
        value["lengths"] = {key: tuple(numbers) for key, numbers in value["lengths"].items()}
        return cls(**{**value, "notes": tuple(value["notes"])})


def show_batch(batch: PairBatch, tokenizer: Any, *, pairs: int = 2, color: bool = False) -> str:
    """The first pairs of a batch as text, with the loss tokens in brackets (or bold green).

    The text is decoded from the batch's own score index, labels and segments, so it shows what the loss reads.
    """
    lines: list[str] = []
    width = batch.input_ids.shape[1]
    tokens, real = batch.input_ids.flatten().tolist(), batch.attention_mask.flatten().tolist()
    opened, closed = ("\x1b[1;32m", "\x1b[0m") if color else ("⟦", "⟧")
    sides = ("chosen",) if batch.rejected_lengths is None else ("chosen", "rejected")
    for pair in range(min(pairs, batch.pairs)):
        lines.append(f"pair {pair} of {batch.pairs}, {batch.where[pair]}")
        for offset, side in enumerate(sides):
            sequence = offset * batch.pairs + pair
            if batch.segments is None:
                positions = list(range(sequence * width, (sequence + 1) * width))
            else:
                positions = positions_of(batch.segments, sequence, len(sides) * batch.pairs).tolist()
            behind = dict(pairwise(positions))
            mine = batch.sequence_index == sequence
            at = [behind.get(position, position + 1) for position in batch.loss_index[mine].tolist()]
            labels = dict(zip(at, batch.labels[mine].tolist(), strict=True))
            runs: list[tuple[bool, list[int]]] = []
            for position in positions:
                if not real[position] and position not in labels:
                    continue
                if not runs or runs[-1][0] != (position in labels):
                    runs.append((position in labels, []))
                runs[-1][1].append(labels.get(position, tokens[position]))
            text = "".join(
                f"{opened}{_decode(tokenizer, ids)}{closed}" if scored else _decode(tokenizer, ids)
                for scored, ids in runs
            )
            known = sum(real[position] for position in positions)
            if batch.segments is None:
                place = f"{width - known} of padding"
            else:
                skipped = positions[-1] + 1 - positions[0] - len(positions)
                place = f"row {positions[0] // width} from column {positions[0] % width}"
                place += f", prompt shared, {skipped} tokens of the other side unseen" if skipped else ""
            lines.append(f"  {side}: {known} tokens, {len(labels)} scored, {place}")
            lines += [f"    {line}" for line in text.split("\n")]
        lines += [f"  {name} = {values[pair].item():g}" for name, values in batch.columns.items()]
    return "\n".join(lines) if lines else "an empty batch"


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return escaped(text, lines=True)
