"""What rounds have come to: the figures of each on held-out prompts, as a record, a table and a plot."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt.errors import RoundError
from prefopt.evaluate.intervals import Interval, bootstrap
from prefopt.evaluate.texts import ORDERS, TextFigures, describe_texts
from prefopt.evaluate.win_rate import Groups, Scores, WinRate, judge_scores, judged_win_rate
from prefopt.ranking import safe_mean
from prefopt.redaction import escaped, hidden, markdown_cell
from prefopt.storage import finite, write_by
from prefopt.types import Prompt

if TYPE_CHECKING:
    from prefopt.evaluate.samples import SampleFigures
    from prefopt.judges.base import Judge
    from prefopt.rounds_method import RoundsMethod


@dataclass(frozen=True)
class RoundFigures:
    """A policy at the end of a round, on held-out prompts. Round 0 is the first policy, before any round.

    Args:
        round: which one.
        prompts: held-out prompts.
        vs_start, vs_previous: mean win probability and win rate against the first policy and against the one before
            this round; None in round 0.
        vs_other: win rate against another run's policy after the same round; None where there is none to compare with.
        score: mean over prompts of the judge's score; None from a judge that only compares.
        texts: lengths, diversity, how completions ended.
        kl: KL(policy || reference) per completion by name of the reference, nats; see `SampleFigures.kl`.
        log_ratio: the Monte Carlo estimate of the same, see `SampleFigures.log_ratio`.
        entropy: of the policy on its own samples, nats per token; None where no sample was scored.
        problems: what went wrong in judging, by name: how often.
        more: anything else worth a column, e.g. pairs kept, or exact figures of a testbed world.
    """

    round: int
    prompts: int
    vs_start: WinRate | None
    vs_previous: WinRate | None
    score: Interval | None
    texts: TextFigures
    kl: Mapping[str, Interval] = field(default_factory=dict)
    log_ratio: Mapping[str, Interval] = field(default_factory=dict)
    entropy: float | None = None
    problems: Mapping[str, int] = field(default_factory=dict)
    more: Mapping[str, float] = field(default_factory=dict)
    vs_other: WinRate | None = None

    def metrics(self) -> dict[str, float]:
        """All of it under one name each, for metrics files and trackers; what is not known is omitted."""
        out: dict[str, float] = {"prompts": self.prompts}
        rates = {"vs_start": self.vs_start, "vs_previous": self.vs_previous, "vs_other": self.vs_other}
        for name, rate in rates.items():
            if rate is not None:
                out |= _spread(f"win_probability/{name}", rate.rate)
                counts = ("wins", "ties", "losses", "left_out")
                out |= {f"win_rate/{name}_{count}": getattr(rate, count) for count in counts}
                out |= {} if rate.won is None else _spread(f"win_rate/{name}", rate.won)
        if self.score is not None:
            out |= _spread("score", self.score)
        out |= {name: getattr(self.texts, name) for name in ("tokens", "characters", "cut", "empty", "duplicates")}
        for n, every, within in zip(ORDERS, self.texts.distinct, self.texts.distinct_in_group, strict=True):
            out |= {f"distinct_{n}": every, f"distinct_{n}/in_group": within}
        for group, members in (("kl", self.kl), ("log_ratio", self.log_ratio)):
            for name, interval in members.items():
                out |= _spread(f"{group}/{name}", interval)
        out |= {} if self.entropy is None else {"entropy": self.entropy}
        out |= {f"problems/{name}": count for name, count in self.problems.items()} | dict(self.more)
        return {name: value for name, value in out.items() if math.isfinite(value)}

    def to_dict(self) -> dict[str, Any]:
        """As nested plain values that JSON holds; NaN is None."""
        return finite(asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RoundFigures:
        """The record that `to_dict` came from."""

        def interval(v: Mapping[str, Any]) -> Interval:
            return Interval(_number(v["mean"]), _number(v["low"]), _number(v["high"]), v["count"])

        def rate(v: Mapping[str, Any] | None) -> WinRate | None:
            if v is None:
                return None
            won = v.get("won")  # older records have none
            return WinRate(**{**v, "rate": interval(v["rate"]), "won": None if won is None else interval(won)})

        texts = values["texts"]
        distinct = {name: tuple(map(_number, texts[name])) for name in ("distinct", "distinct_in_group")}
        return cls(
            **{
                **values,
                "vs_start": rate(values["vs_start"]),
                "vs_previous": rate(values["vs_previous"]),
                "vs_other": rate(values.get("vs_other")),
                "score": None if values["score"] is None else interval(values["score"]),
                "texts": TextFigures(**{**texts, **distinct}),
                "kl": {name: interval(v) for name, v in values["kl"].items()},
                "log_ratio": {name: interval(v) for name, v in values["log_ratio"].items()},
                "more": {name: _number(v) for name, v in values["more"].items()},
            }
        )


def evaluate_round(
    round: int,
    prompts: Sequence[Prompt],
    completions: Mapping[str, Groups],
    judge: Judge | None,
    method: RoundsMethod,
    kl: Mapping[str, SampleFigures] | None = None,
    more: Mapping[str, float] | None = None,
    other: RoundsMethod | None = None,
) -> RoundFigures:
    """The figures of the policy at the end of a round.

    Args:
        round: its number; 0 for the policy before the first one.
        prompts: held-out prompts.
        completions: of `now`, and of `previous`, `first` and `other` to compare with; one list per prompt, in order,
            and as many completions in it; none in `other` for a prompt that it was not asked. Where `previous` is
            `first` (the same object), it is judged once.
        judge: None: no score and no win rates.
        method: decides what of a completion a judge may see.
        kl: by name of the reference (`to_round_start`, `to_first`), the figures of the samples `now`, prompt by prompt.
        more: further numbers to record beside these.
        other: the method of `other`, where that is another one.
    Raises: RoundError when the judge as a whole fails.
    """
    now = completions["now"]
    known: dict[int, Scores | None] = {}
    rates: dict[str, WinRate] = {}
    problems: Counter[str] = Counter()

    def scores_of(groups: Groups, of: RoundsMethod = method) -> Scores | None:
        assert judge is not None
        if id(groups) not in known:
            known[id(groups)] = found = judge_scores(judge, prompts, groups, of)
            problems.update(found.problems if found else {})
        return known[id(groups)]

    if judge is not None:
        mine = scores_of(now)
        for name in ("first", "previous", "other"):
            theirs = completions.get(name)
            if name == "previous" and theirs is not None and theirs is completions.get("first"):
                rates[name] = rates["first"]
            elif theirs is not None:
                by = other if name == "other" and other is not None else method
                their_scores = None if mine is None else scores_of(theirs, by)
                both = None if mine is None or their_scores is None else (mine, their_scores)
                where = [i for i, group in enumerate(theirs) if group]  # another run may not have answered some prompts
                rates[name] = judged_win_rate(
                    judge,
                    [prompts[i] for i in where],
                    [now[i] for i in where],
                    [theirs[i] for i in where],
                    method,
                    None if both is None else (both[0].of(where), both[1].of(where)),
                    by,
                )
                problems.update(rates[name].problems)

    scores = known.get(id(now))
    sizes, figures = [len(group) for group in now], dict(kl or {})
    total = next(iter(figures.values()), None)
    return RoundFigures(
        round=round,
        prompts=len(prompts),
        vs_start=rates.get("first"),
        vs_previous=rates.get("previous"),
        vs_other=rates.get("other"),
        score=None if scores is None else _over_prompts([np.array(group) for group in scores.values]),
        texts=describe_texts(now),
        kl={name: _over_prompts(_cut(f.kl, sizes)) for name, f in figures.items()},
        log_ratio={name: _over_prompts(_cut(f.log_ratio, sizes)) for name, f in figures.items()},
        entropy=None if total is None else float(total.entropy.sum() / max(total.tokens.sum(), 1)),
        problems=dict(problems),
        more=dict(more or {}),
    )


def _cut(values: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    if len(values) != sum(sizes):
        raise ValueError(f"{len(values)} samples were scored, expected one per completion, {sum(sizes)}")
    return np.split(values, np.cumsum(sizes)[:-1])


def _over_prompts(groups: Sequence[np.ndarray]) -> Interval:
    """The mean over prompts of each prompt's mean; NaN is excluded."""
    means = [safe_mean(known) for group in groups if (known := group[~np.isnan(group)]).size]
    return bootstrap(means)


def _spread(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


# The report -----------------------------------------------------------------------------------------------------------


def write_report(folder: Path | str, figures: Sequence[RoundFigures], title: str = "", *, plot: bool = True) -> None:
    """Write rounds.md and rounds.png into `folder`, each whole or not at all.

    Args: figures: in the order of rounds, at least one. title: a line above the tables. plot: whether to draw them too.
    Raises: RoundError when a file cannot be written.
    """
    folder = Path(folder)
    text = hidden((f"{escaped(title, lines=True)}\n\n" if title else "") + rounds_table(figures))
    _replace(folder / "rounds.md", lambda scratch: scratch.write_text(text))
    if plot:
        _replace(folder / "rounds.png", lambda scratch: rounds_plot(scratch, figures))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    try:
        write_by(path, write)
    except OSError as error:
        raise RoundError(f"{path}: cannot write the report: {error.strerror}") from None


def rounds_table(figures: Sequence[RoundFigures]) -> str:
    """Two tables in Markdown, a row per round: win rates and KL, and statistics of the completions."""
    compared = any(f.vs_other is not None for f in figures)
    named = ["start", "previous", *(["other run"] if compared else [])]
    judged = [["round", *(f"mean win probability vs {name} [95%]" for name in named)]]
    judged[0] += [*(f"win rate vs {name} [95%]" for name in named), "won/tied/lost vs start", "score [95%]"]
    texts = [["round", "tokens", "characters", *(f"distinct-{n}" for n in ORDERS), "cut", "empty", "repeated"]]
    references = list(dict.fromkeys(name for f in figures for name in f.kl))
    judged[0] += [f"KL {name.replace('_', ' ')} [95%]" for name in references] + ["entropy"]
    more = list(dict.fromkeys(name for f in figures for name in f.more))
    texts[0] += more
    for f in figures:
        rates = [f.vs_start, f.vs_previous, *([f.vs_other] if compared else [])]
        cells = ["-" if rate is None else str(rate.rate) for rate in rates]
        cells += ["-" if rate is None or rate.won is None else str(rate.won) for rate in rates]
        counts = "-" if f.vs_start is None else f"{f.vs_start.wins}/{f.vs_start.ties}/{f.vs_start.losses}"
        kls = [str(f.kl[name]) if name in f.kl else "-" for name in references]
        score = "-" if f.score is None else str(f.score)
        judged.append([str(f.round), *cells, counts, score, *kls, _cell(f.entropy, ".3f")])
        t = f.texts
        shares = [_cell(value, ".1%") for value in (t.cut, t.empty, t.duplicates)]
        lengths = [_cell(t.tokens, ".1f"), _cell(t.characters, ".1f")]
        others = [_cell(f.more.get(name), ".4g") for name in more]
        texts.append([str(f.round), *lengths, *(_cell(d, ".3f") for d in t.distinct), *shares, *others])
    prompts = sorted({f.prompts for f in figures})
    head = f"{' or '.join(map(str, prompts))} held-out prompts; intervals by bootstrap over prompts; KL in nats."
    head += (
        "\nMean win probability: the judge's P(wins), averaged; win rate: fraction of prompts won, ties count a half."
    )
    notes = [
        f"Round {f.round}, failed judgements: "
        f"{', '.join(f'{markdown_cell(key)} {n}' for key, n in sorted(f.problems.items()))}."
        for f in figures
        if f.problems
    ]
    every = [rate for f in figures for rate in (f.vs_start, f.vs_previous, f.vs_other) if rate is not None]
    left_out = sum(rate.left_out for rate in every)
    notes += [f"Win rates exclude {left_out} prompts without a known comparison."] if left_out else []
    return "\n\n".join([head, _markdown(judged), _markdown(texts), *notes]) + "\n"


def _cell(value: float | None, spec: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, spec)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(map(markdown_cell, row))} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


_DRAWN = 1e100  # larger figures are in the table only: axes cannot be laid out for them


def rounds_plot(path: Path | str, figures: Sequence[RoundFigures]) -> None:
    """Draw the rounds as small multiples, one panel per kind of figure, to a PNG. Panels without figures are omitted.

    Raises: OSError when the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from prefopt.testbed.world_report import COLOURS, GREY, INK

    Point = tuple[int, float, float, float]  # round, mean, low, high

    def line(values: Iterable[Interval | float | None]) -> list[Point]:
        """The points that are known, from one value per round."""
        points = []
        for f, value in zip(figures, values, strict=True):
            if value is not None:
                band = (value.mean, value.low, value.high) if isinstance(value, Interval) else (value,) * 3
                points.append((f.round, *band))
        return [point for point in points if all(abs(value) < _DRAWN for value in point[1:])]  # nor NaN

    def rates(values: Iterable[WinRate | None]) -> list[Point]:
        return line(None if value is None else value.rate for value in values)

    references = list(dict.fromkeys(name for f in figures for name in f.kl))
    panels: list[tuple[str, dict[str, list[Point]]]] = [
        ("P(wins) vs start", {"": rates(f.vs_start for f in figures)}),
        ("P(wins) vs previous round", {"": rates(f.vs_previous for f in figures)}),
        ("P(wins) vs other run", {"": rates(f.vs_other for f in figures)}),
        ("judge's score", {"": line(f.score for f in figures)}),
        ("tokens per completion", {"": line(f.texts.tokens for f in figures)}),
        ("distinct-n", {f"n = {n}": line(f.texts.distinct[i] for f in figures) for i, n in enumerate(ORDERS)}),
        ("fraction with a response", {"": line(f.more.get("parsed") for f in figures)}),
        (
            "characters per completion",
            {
                part: line(f.more.get(f"{part}_characters") for f in figures)
                for part in ("thought", "response")
                if any("thought_characters" in f.more for f in figures)
            },
        ),
        (
            "KL(policy || reference)  [nats]",
            {name.replace("_", " "): line(f.kl.get(name) for f in figures) for name in references},
        ),
    ]
    panels = [(title, lines) for title, lines in panels if any(lines.values())]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    drawing = Figure(figsize=(3.1 * columns, 2.5 * rows), dpi=150, layout="constrained")
    FigureCanvasAgg(drawing)
    last = max(f.round for f in figures)
    both_rates = [point for title, lines in panels if title.startswith("P(wins)") for point in lines[""]]
    reach = 1.1 * max([0.02, *(abs(edge - 0.5) for point in both_rates for edge in point[1:])])
    for number, (title, lines) in enumerate(panels):
        axes = drawing.add_subplot(rows, columns, number + 1)
        ends = {}
        for colour, (label, points) in zip(COLOURS, lines.items(), strict=False):
            if points:
                x, mean, low, high = (np.array(column) for column in zip(*points, strict=True))
                axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0, zorder=2)
                axes.vlines(x, low, high, color=colour, alpha=0.45, linewidth=1.1, zorder=2)
                axes.plot(x, mean, "o-", color=colour, linewidth=1.4, markersize=4, zorder=3)
                ends[label] = (colour, mean[-1])
        if title.startswith("P(wins)"):  # one scale, so that the two compare
            axes.axhline(0.5, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
            axes.set_ylim(max(0.5 - reach, -0.03), min(0.5 + reach, 1.03))
        if title.startswith(("KL", "tokens", "distinct", "fraction", "characters")):
            top = max(point[3] for points in lines.values() for point in points)
            axes.set_ylim(0, 1.08 * top if top > 0 else 1)
        axes.set_xlim(-0.15, last + 0.15)
        axes.set_title(title, size=9.5, color=INK, loc="left")
        axes.tick_params(labelsize=8, colors=INK)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        if number >= len(panels) - columns:
            axes.set_xlabel("round", size=9, color=INK)
        height = -1.0  # names stand beside the ends of their lines, none upon another
        bottom, top = axes.get_ylim()
        for label, (colour, end) in sorted(ends.items(), key=lambda item: item[1][1]):
            height = max((end - bottom) / (top - bottom), height + 0.09)
            axes.text(1.02, height, label, color=colour, size=8, va="center", transform=axes.transAxes)
    drawing.savefig(path, format="png")
