"""Preview of encoded pairs, in a terminal or as an HTML page: prompt, loss tokens, special tokens."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from prefopt.redaction import escaped, printable
from prefopt.types import LABEL, EncodedPair

Kind = Literal["prompt", "scored", "unscored"]
_KINDS: dict[str, str] = {
    "prompt": "prompt",
    "scored": "completion, read by the loss",
    "unscored": "completion, masked",
}
_MOST_IDS = 8  # tokens of one piece: a character has at most 4 bytes, but invalid bytes could continue without end


@dataclass(frozen=True)
class Piece:
    """The text of one token, or of several tokens that form one character.

    Args: ids: the tokens; position: of the first one in its sequence; special: whether it is a special token.
    """

    text: str
    ids: tuple[int, ...]
    position: int
    kind: Kind
    special: bool


@dataclass(frozen=True)
class PreviewedPair:
    """A pair as pieces of text; `rejected` is empty where there is none."""

    where: str
    prompt: list[Piece]
    chosen: list[Piece]
    rejected: list[Piece]
    columns: dict[str, float]

    @property
    def sides(self) -> list[tuple[str, list[Piece]]]:
        unpaired = LABEL.name in self.columns
        names = ("completion", "mismatched completion") if unpaired else ("chosen", "rejected")
        return [(name, side) for name, side in zip(names, (self.chosen, self.rejected), strict=True) if side]


def preview_pair(pair: EncodedPair, tokenizer: Any) -> PreviewedPair:
    """Decode a pair token by token."""
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {*tokenizer.all_special_ids}
    first = len(pair.prompt_ids)

    def side(ids: list[int] | None, mask: list[bool] | None) -> list[Piece]:
        kinds: list[Kind] = ["scored" if scored else "unscored" for scored in mask or ()]
        return _pieces(tokenizer, ids or [], kinds, special, first)

    return PreviewedPair(
        where=pair.where,
        prompt=_pieces(tokenizer, pair.prompt_ids, ["prompt"] * first, special, 0),
        chosen=side(pair.chosen_ids, pair.chosen_mask),
        rejected=side(pair.rejected_ids, pair.rejected_mask),
        columns=dict(pair.columns),
    )


def _pieces(tokenizer: Any, ids: list[int], kinds: Sequence[Kind], special: set[int], first: int) -> list[Piece]:
    """Tokens with the text that each adds to the previous piece; tokens that share a character are one piece."""

    def text_of(some: list[int]) -> str:
        return str(tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    out: list[Piece] = []
    previous = begin = 0
    before = ""  # the text of ids[previous:begin]
    for i, token in enumerate(ids):
        whole = text_of(ids[previous : i + 1])
        last = i + 1 == len(ids) or token in special or ids[i + 1] in special or kinds[i + 1] != kinds[i]
        if whole.endswith("\ufffd") and not last and i + 1 - begin < _MOST_IDS:
            continue
        alone = text_of(ids[begin : i + 1])
        # else the decoder changes earlier text
        text = whole[len(before) :] if whole.startswith(before) else alone
        out.append(Piece(text, tuple(ids[begin : i + 1]), first + begin, kinds[i], token in special))
        previous, begin, before = begin, i + 1, alone
    return out


def spread(number: int, of: int) -> list[int]:
    """`number` indices spread evenly over `of`, beginning with the first."""
    number = min(number, of)
    return [i * of // number for i in range(number)]


def _counts(name: str, side: list[Piece]) -> str:
    tokens = sum(len(piece.ids) for piece in side)
    scored = sum(len(piece.ids) for piece in side if piece.kind == "scored")
    return f"{name} {tokens:,} tokens" + ("" if name == "prompt" else f", {scored:,} loss tokens")


# Terminal -------------------------------------------------------------------------------------------------------------

_COLOURS = {"prompt": "36", "scored": "1;32", "unscored": "33"}


def terminal(pairs: Sequence[PreviewedPair], *, color: bool) -> str:
    """The pairs as lines for a terminal. Control characters are escaped, so a data file cannot control the terminal.

    Args: color: use colours; else loss tokens are in ⟦brackets⟧ and special tokens in ‹angle quotes›.
    """

    def paint(text: str, code: str) -> str:
        return "\n".join(f"\x1b[{code}m{line}\x1b[0m" if line else "" for line in text.split("\n"))

    def text_of(side: list[Piece]) -> str:
        out: list[str] = []
        for kind, run in groupby(side, key=lambda piece: piece.kind):
            parts = [
                (special, printable("".join(piece.text for piece in same), lines=True))
                for special, same in groupby(run, key=lambda piece: piece.special)
            ]
            if color:
                out += [paint(text, f"{_COLOURS[kind]};7" if special else _COLOURS[kind]) for special, text in parts]
            else:
                text = "".join(f"‹{text}›" if special else text for special, text in parts)
                out.append(f"⟦{text}⟧" if kind == "scored" else text)
        return "".join(out)

    legend = [paint(name, _COLOURS[kind]) for kind, name in _KINDS.items()]
    lines = ["  ".join([*legend, paint("special", "7")]) if color else "⟦read by the loss⟧  ‹special token›"]
    for pair in pairs:
        lines += ["", f"{printable(pair.where)}: {_counts('prompt', pair.prompt)}"]
        lines += [f"  {line}".rstrip() for line in text_of(pair.prompt).split("\n")]
        for name, side in pair.sides:
            lines.append(f" {_counts(name, side)}")
            lines += [f"  {line}".rstrip() for line in text_of(side).split("\n")]
        lines += [f" {name} = {value:g}" for name, value in pair.columns.items()]
    return "\n".join(lines)


# HTML page ------------------------------------------------------------------------------------------------------------

_STYLE = """
:root { --ink: #1c2126; --soft: #5c6670; --paper: #f6f5f1; --card: #ffffff; --line: #dcd9d0;
  --prompt: #dbe7f5; --scored: #cdeccd; --unscored: #f5e3b8; --special: #6a3d9a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e8; --soft: #9aa4ad; --paper: #16191c; --card: #1f2327;
  --line: #353b41; --prompt: #24384f; --scored: #1f4a2a; --unscored: #54431a; --special: #c9a2f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 74rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
pre, .text { font: 13px/1.7 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 1rem; overflow-x: auto;
  line-height: 1.45; }
.legend { position: sticky; top: 0; background: var(--paper); padding: .6rem 0; display: flex; flex-wrap: wrap;
  gap: .5rem 1rem; border-bottom: 1px solid var(--line); }
.legend span { padding: 0 .4rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 6px; margin-top: 1.25rem;
  padding: 1rem 1.1rem; }
h2 { font-size: 1rem; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h3 { font-size: .82rem; font-weight: 600; color: var(--soft); margin: .75rem 0 .35rem; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 1.25rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.t { border-radius: 2px; padding: .1em 0; box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.t:nth-child(even) { filter: brightness(.95); }
.t:hover { outline: 1px solid var(--soft); }
.prompt { background: var(--prompt); } .scored { background: var(--scored); } .unscored { background: var(--unscored); }
.special { color: var(--special); font-weight: 700; border: 1px solid var(--special); padding: 0 .2em; }
.break { color: var(--soft); }
.columns { color: var(--soft); margin: .75rem 0 0; }
"""


def page(title: str, report: Sequence[str], pairs: Sequence[PreviewedPair]) -> str:
    """One HTML page with the report and the pairs, without external resources."""
    legend = [f'<span class="{kind}">{name}</span>' for kind, name in _KINDS.items()]
    legend.append('<span class="special">special token</span>')
    body = "\n".join(_article(number, pair) for number, pair in enumerate(pairs, 1))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(printable(title))}</title>\n<style>{_STYLE}</style></head>\n<body>\n<h1>{html.escape(printable(title))}</h1>\n"
        f"<pre>{html.escape(chr(10).join(map(printable, report)))}</pre>\n"
        f'<div class="legend">{"".join(legend)}</div>\n{body}\n</body></html>\n'
    )


def _article(number: int, pair: PreviewedPair) -> str:
    columns = ", ".join(f"{name} = {value:g}" for name, value in pair.columns.items())
    sides = "".join(f"<section>{_side(name, side)}</section>" for name, side in pair.sides)
    return (
        f"<article><h2>{number}. {html.escape(printable(pair.where))}</h2>{_side('prompt', pair.prompt)}"
        f'<div class="sides">{sides}</div>'
        + (f'<p class="columns">{html.escape(columns)}</p>' if columns else "")
        + "</article>"
    )


def _side(name: str, side: list[Piece]) -> str:
    return f'<h3>{_counts(name, side)}</h3><p class="text">{"".join(_spans(side))}</p>'


def _spans(side: list[Piece]) -> Iterator[str]:
    for piece in side:
        ids = ", ".join(map(str, piece.ids))
        title = f"token id {ids}, position {piece.position}: {_KINDS[piece.kind]}{', special' if piece.special else ''}"
        text = html.escape(escaped(piece.text, lines=True))
        text = re.sub("\n", '<span class="break">↵</span>\n', text)
        kind = f"t {piece.kind}{' special' if piece.special else ''}"
        yield f'<span class="{kind}" title="{title}">{text}</span>'
