import json
import math
from dataclasses import replace

import numpy as np
import pytest

from prefopt.errors import RoundError
from prefopt.evaluate.rounds_report import RoundFigures, evaluate_round, rounds_table, write_report
from prefopt.evaluate.samples import SampleFigures
from prefopt.methods.thought_po import ThoughtPO
from prefopt.rounds_method import RoundsMethod
from prefopt.types import Judgement
from tests.evaluate.helpers import Asked, first_is_favoured, groups, prompts, word_count

FIRST = groups("a", "a b", "a b c")
SECOND = groups("a b", "a b", "a")
NOW = groups("a b c d", "a", "a b c")


def samples(kl):
    kl = np.array(kl)
    return SampleFigures(tokens=np.full(len(kl), 4.0), log_ratio=kl - 0.5, kl=kl, entropy=kl * 0 + 2)


def rounds(judge):
    nothing = evaluate_round(0, prompts(3), {"now": FIRST}, judge, RoundsMethod())
    one = {"now": SECOND, "previous": FIRST, "first": FIRST}
    two = {"now": NOW, "previous": SECOND, "first": FIRST}
    kl = {"to_round_start": samples([1, 2, 3]), "to_first": samples([2, 4, 6])}
    return [
        nothing,
        evaluate_round(1, prompts(3), one, judge, RoundsMethod(), kl),
        evaluate_round(2, prompts(3), two, judge, RoundsMethod(), kl, more={"pairs/kept": 17}),
    ]


def test_round_when_a_judge_scores_then_no_completion_is_scored_twice():
    judge = Asked(word_count)
    zero, one, two = rounds(judge)
    assert len(judge.questions) == 3 + 6 + 9
    assert (zero.vs_start, zero.vs_previous, zero.score.mean) == (None, None, pytest.approx(2))
    assert one.vs_start is one.vs_previous
    assert (one.vs_start.wins, one.vs_start.ties, one.vs_start.losses) == (1, 1, 1)
    assert two.score.mean == pytest.approx((4 + 1 + 3) / 3)
    assert (two.vs_start.wins, two.vs_start.ties, two.vs_start.losses) == (1, 1, 1)
    assert (two.vs_previous.wins, two.vs_previous.ties, two.vs_previous.losses) == (2, 0, 1)


def test_round_when_a_judge_compares_then_there_is_no_score_and_the_same_verdicts():
    judge = Asked(first_is_favoured)
    scored, compared = rounds(Asked(word_count))[2], rounds(judge)[2]
    assert compared.score is None
    assert compared.vs_start.rate.mean == pytest.approx(scored.vs_start.rate.mean)
    assert {len(question.responses) for question in judge.questions} == {1, 2}


def test_round_when_there_is_no_judge_then_the_other_figures_stand():
    figures = evaluate_round(1, prompts(3), {"now": NOW, "first": FIRST, "previous": FIRST}, None, RoundsMethod())
    assert (figures.score, figures.vs_start, figures.kl) == (None, None, {})
    assert figures.texts.completions == 3


def test_metrics_when_flat_then_every_figure_has_its_name():
    metrics = rounds(Asked(word_count))[2].metrics()
    assert metrics["kl/to_first"] == pytest.approx(4)
    assert metrics["kl/to_round_start_low"] < 2 < metrics["kl/to_round_start_high"]
    assert metrics["log_ratio/to_first"] == pytest.approx(3.5)
    assert metrics["entropy"] == pytest.approx(0.5)
    assert metrics["pairs/kept"] == 17
    assert metrics["win_rate/vs_previous_wins"] == 2
    assert {"score", "tokens", "characters", "distinct_2", "distinct_1/in_group", "cut", "empty"} <= metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values())
    assert "distinct_3/in_group" in metrics


def test_kl_when_prompts_have_several_samples_then_each_prompt_counts_once():
    now = groups("a\nb\nc", "d")
    kl = {"to_first": samples([1, 1, 1, 5])}
    assert evaluate_round(1, prompts(2), {"now": now}, None, RoundsMethod(), kl).kl["to_first"].mean == pytest.approx(3)
    with pytest.raises(ValueError, match="3 samples were scored, expected one per completion, 4"):
        evaluate_round(1, prompts(2), {"now": now}, None, RoundsMethod(), {"to_first": samples([1, 2, 3])})


def test_problems_when_the_judge_counts_some_then_the_round_and_its_table_have_them():
    now = groups("nan", "a", "a b")
    figures = evaluate_round(
        1, prompts(3), {"now": now, "first": FIRST, "previous": FIRST}, Asked(word_count), RoundsMethod()
    )
    assert figures.problems == {"nan": 1}
    assert (figures.vs_start.left_out, figures.score.count) == (1, 2)
    table = rounds_table([figures])
    assert "Round 1, failed judgements: nan 1." in table
    assert "Win rates exclude 2 prompts" in table


def test_record_when_written_as_json_then_it_is_read_back():
    for figures in rounds(Asked(word_count)):
        text = json.dumps(figures.to_dict(), allow_nan=False)
        assert RoundFigures.from_dict(json.loads(text)).to_dict() == figures.to_dict()
        assert RoundFigures.from_dict(json.loads(text)).metrics() == figures.metrics()


def test_report_when_written_then_a_table_and_a_picture_lie_there_and_nothing_else(tmp_path):
    figures = rounds(Asked(word_count))
    write_report(tmp_path, figures, title="sppo on a file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rounds.md", "rounds.png"]
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "rounds.md").read_text().splitlines()
    assert lines[0] == "sppo on a file"
    rows = [line.split(" | ") for line in lines if line.startswith("| 2 ")]
    assert rows[0][1] == str(figures[2].vs_start.rate)
    assert rows[0][5] == "1/1/1"
    assert rows[1][-1] == "17 |"
    assert {line.count("|") for line in lines if line.startswith("| ")} == {11}


def test_report_when_it_is_written_again_then_it_is_the_same(tmp_path):
    for _ in range(2):
        write_report(tmp_path, rounds(Asked(first_is_favoured))[:1])
    assert "| 0 | - | - | - | - | - |" in (tmp_path / "rounds.md").read_text()


def test_report_when_it_cannot_be_written_then_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RoundError, match=r"file/rounds\.md: cannot write the report"):
        write_report(tmp_path / "file", rounds(Asked(word_count)))


@pytest.mark.parametrize("verdict", [word_count, first_is_favoured])
def test_round_when_another_run_is_compared_with_then_each_is_seen_by_its_own_method(verdict):
    judge, thinks = Asked(verdict), ThoughtPO()
    now, other = groups("a b c d <R> a b", "x <R> a", "no marker"), groups("a", "a b", "a <R> b")
    found = evaluate_round(0, prompts(3), {"now": now, "other": other}, judge, thinks, other=RoundsMethod())
    rate = found.vs_other
    assert (rate.wins, rate.ties, rate.losses) == (1, 0, 2)
    seen = {response.text for question in judge.questions for response in question.responses}
    assert seen <= {"a b", "a", "a <R> b"}, "no thought of the run itself is seen, and all of the other's is"
    assert RoundFigures.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.metrics()["win_rate/vs_other_wins"] == 1
    assert "win rate vs other run" in rounds_table([found])


def test_report_when_a_judge_names_odd_problems_then_they_steer_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_API_KEY", "sk-of-mine-1234")
    figures = rounds(Asked(word_count))
    odd = replace(figures[0], problems={"a|b\n\x1b[2J": 1}, more={"x|y\u202e": 1.0})
    write_report(tmp_path, [odd], "judge sk-of-mine-1234\x1b", plot=False)
    text = (tmp_path / "rounds.md").read_text()
    assert text.startswith("judge ***\\x1b\n")
    assert r"a\|b\\n\\x1b[2J 1" in text
    assert r"x\|y\\u202e" in text


def test_report_when_scores_are_beyond_sums_then_it_is_written_and_short(tmp_path):
    figures = rounds(Asked(lambda asked: Judgement(scores=tuple(1e308 + 1e307 * len(r.text) for r in asked.responses))))
    write_report(tmp_path, figures)
    line = (tmp_path / "rounds.md").read_text().splitlines()[5]
    assert "1.3e308 [1.1e308, 1.5e308]" in line
    assert len(line) < 300
