"""What is to be seen of traces: a table by depth, pairs to train on, one page. Knows no engine and no judge."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.data.comparison import plain_text
from prefopt.evaluate.intervals import Interval, bootstrap
from prefopt.figures import readable
from prefopt.inference.trace import Cost, Sample, Step, Trace
from prefopt.ranking import safe_mean
from prefopt.redaction import printable


@dataclass(frozen=True)
class DepthFigures:
    """Of all prompts up to a step.

    Args:
        best: score of the best response so far, over prompts that have one; it can only rise.
        newest: mean score of this step's samples, over prompts where one has a score; it can fall.
        drawn, parsed: this step's samples, and how many hold a response. skipped: prompts that did not get there.
        why: the first reason for that.
        characters: mean length of the best response so far.
        cost: of all steps so far, over all prompts.
    """

    depth: int
    best: Interval
    newest: Interval
    drawn: int
    parsed: int
    skipped: int
    why: str | None
    characters: float
    cost: Cost

    def to_dict(self, parameters: int | None) -> dict[str, Any]:
        row: dict[str, Any] = {"depth": self.depth}
        for name in ("best", "newest"):
            value: Interval = getattr(self, name)
            row[name] = None if value.count == 0 else {"mean": value.mean, "low": value.low, "high": value.high}
            row[f"{name}_prompts"] = value.count
        row |= {"drawn": self.drawn, "parsed": self.parsed, "skipped": self.skipped, "why": self.why}
        row |= {"characters": None if self.best.count == 0 else self.characters}
        return row | vars(self.cost) | {"flops": self.cost.flops(parameters)}


def by_depth(traces: Sequence[Trace]) -> list[DepthFigures]:
    """A row per step, from the first samples on. Intervals are over prompts."""
    rows: list[DepthFigures] = []
    cost = Cost()
    for depth in range(max((len(trace.steps) for trace in traces), default=0)):
        best: list[float] = []
        newest: list[float] = []
        lengths: list[int] = []
        drawn = parsed = 0
        skipped: list[str] = []
        for trace in traces:
            step = trace.steps[depth]
            cost += step.cost
            drawn += len(step.samples)
            skipped += [step.skipped] if step.skipped is not None else []
            parsed += sum(sample.text is not None for sample in step.samples)
            scores = [s for s in map(trace.score, step.samples) if s is not None]
            if scores:
                newest.append(safe_mean(scores))
            so_far = Trace(trace.prompt, trace.steps[: depth + 1], trace.scores)
            top = so_far.best
            if top is not None and top.text is not None:
                best.append(trace.scores[top.text])
                lengths.append(len(top.text))
        rows.append(
            DepthFigures(
                depth=depth,
                best=bootstrap(best),
                newest=bootstrap(newest),
                drawn=drawn,
                parsed=parsed,
                skipped=len(skipped),
                why=skipped[0] if skipped else None,
                characters=float(np.mean(lengths)) if lengths else float("nan"),
                cost=cost,
            )
        )
    return rows


HEAD = ("depth", "best so far", "newest samples", "parsed", "samples", "tokens", "FLOP", "characters")


def table_rows(rows: Sequence[Mapping[str, Any]], prompts: int) -> list[tuple[str, ...]]:
    """The cells of `HEAD` for rows of `DepthFigures.to_dict`; samples, tokens and FLOP are per prompt."""

    def interval(value: Mapping[str, float] | None) -> str:
        if value is None:
            return "-"
        return str(Interval(value["mean"], value["low"], value["high"], 1))

    out: list[tuple[str, ...]] = []
    for row in rows:
        tokens, flops = row["prompt_tokens"] + row["generated_tokens"], row["flops"]
        skipped = f", {row['skipped']} skipped" if row["skipped"] else ""
        out.append(
            (
                str(row["depth"]),
                interval(row["best"]),
                interval(row["newest"]),
                (f"{row['parsed'] / row['drawn']:.0%}" if row["drawn"] else "-") + skipped,
                f"{row['samples'] / prompts:,.1f}",
                f"{tokens / prompts:,.1f}",
                "-" if flops is None else f"{flops / prompts:.3g}",
                "-" if row["characters"] is None else f"{row['characters']:,.1f}",
            )
        )
    return out


def table(rows: Sequence[Mapping[str, Any]], prompts: int) -> str:
    """The same as text."""
    cells = [HEAD, *table_rows(rows, prompts)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEAD))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def remarks(rows: Sequence[Mapping[str, Any]], prompts: int) -> list[str]:
    """What the table does not show: why steps were skipped."""
    return [
        f"step {row['depth']}: skipped for {row['skipped']} of {prompts} prompts, such as: {row['why']}"
        for row in rows
        if row["skipped"]
    ]


def pairs(traces: Sequence[Trace]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """(best against worst of each trace as rows to train on, how many traces gave none by reason).

    A text that follows a text prompt begins with a space where neither has white space between them.
    """
    rows: list[dict[str, Any]] = []
    none: Counter[str] = Counter()
    for trace in traces:
        best, worst = trace.best, trace.worst
        if best is None or worst is None:
            none["no response with a score"] += 1
        elif trace.score(best) == trace.score(worst):
            none["all scores equal"] += 1
        else:
            sides = {name: _completion(trace, one) for name, one in (("chosen", best), ("rejected", worst))}
            scores = {"chosen_score": trace.score(best), "rejected_score": trace.score(worst)}
            rows.append({"prompt": trace.prompt.prompt, **sides, **scores, "key": trace.prompt.key})
    return rows, dict(none)


def _completion(trace: Trace, sample: Sample) -> str | list[dict[str, Any]]:
    assert sample.text is not None
    if not isinstance(trace.prompt.prompt, str):
        return [{"role": "assistant", "content": sample.text}]
    joined = trace.prompt.prompt[-1:].isspace() or not trace.prompt.prompt
    return sample.text if joined else f" {sample.text}"


# One page -------------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --good: #2a7d46; --bad: #b3403a; --soft: #8881; }
@media (prefers-color-scheme: dark) { :root { --good: #6fce8f; --bad: #f08a83; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
table { border-collapse: collapse; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; padding: .5rem; background: var(--soft);
  border-left: 3px solid var(--line); font: 14px/1.45 ui-monospace, monospace; }
pre.best { border-color: var(--good); } pre.worst { border-color: var(--bad); }
details { margin: .4rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
section { border-top: 1px solid var(--line); margin-top: 1.5rem; } .note { opacity: .75; }
"""


def page(traces: Sequence[Trace], rows: Sequence[Mapping[str, Any]], title: str, *, thoughts: bool = False) -> str:
    """All traces on one page of HTML that needs nothing else; whatever a model has written is text and stays it."""
    cells = "".join(
        f"<tr>{''.join(f'<td>{html.escape(printable(cell))}</td>' for cell in line)}</tr>"
        for line in table_rows(rows, len(traces))
    )
    head = "".join(f"<th>{html.escape(name)}</th>" for name in HEAD)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(printable(title))}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{html.escape(printable(title))}</h1>\n"
        f'<div class="wide"><table><tr>{head}</tr>{cells}</table></div>\n'
        '<p class="note">Means over prompts with bootstrap intervals; samples, tokens and FLOP are per prompt and '
        "count all steps so far. The best so far can only rise; whether a step helps is seen in its newest "
        "samples.</p>\n" + "\n".join(_section(trace, thoughts) for trace in traces) + "\n</body></html>\n"
    )


def _section(trace: Trace, thoughts: bool) -> str:
    best = trace.best
    score = None if best is None else trace.score(best)
    found = "no response" if best is None or score is None else f"best score {readable(score)}, of step {best.step}"
    key, where = (html.escape(printable(text)) for text in (trace.prompt.key, trace.prompt.where))
    parts = [
        f'<section id="{key}"><h2>{where}</h2>',
        _text(plain_text(trace.prompt.prompt)),
        f"<p>{html.escape(printable(found))}</p>",
    ]
    if best is not None:
        parts.append(_text(best.text or "", "best"))
    parts += [_step(trace, step, thoughts) for step in trace.steps]
    return "\n".join([*parts, "</section>"])


def _step(trace: Trace, step: Step, thoughts: bool) -> str:
    best, worst = trace.best, trace.worst
    parts = []
    for name, text in (("critique of the best", step.loss), ("advice on what to change", step.gradient)):
        if text is not None:
            parts.append(f'<p class="note">{name}</p>{_text(text)}')
    for sample in step.samples:
        score = trace.score(sample)
        remark = sample.reason if sample.text is None else "no score" if score is None else f"score {readable(score)}"
        mark = "best" if sample is best else "worst" if sample is worst else ""
        parts.append(f'<p class="note">sample {sample.number}: {html.escape(printable(remark))}</p>')
        if thoughts and sample.thought:
            parts.append(f'<p class="note">thought</p>{_text(sample.thought)}')
        if sample.text is not None:
            parts.append(_text(sample.text, mark))
    if step.skipped is not None:
        parts.append(f"<p>skipped: {html.escape(printable(step.skipped))}</p>")
    title = f"step {step.number}: {sum(s.text is not None for s in step.samples)} of {len(step.samples)} parsed"
    return f"<details><summary>{title}</summary>{''.join(parts)}</details>"


def _text(text: str, mark: str = "") -> str:
    text = html.escape(printable(text, lines=True, joiners=True))
    return f'<pre class="{mark}">{text}</pre>' if mark else f"<pre>{text}</pre>"


def jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as the text of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
