import math
from dataclasses import dataclass

import pytest

from prefopt.evaluate.win_rate import Scores, judge_scores, judged_win_rate, win_rate
from prefopt.rounds_method import RoundsMethod
from prefopt.types import Judgement, Response
from tests.evaluate.helpers import Asked, first_is_favoured, groups, prompts, word_count


@dataclass(frozen=True)
class AfterTheBar(RoundsMethod):
    """Shows a judge what stands behind a bar; nothing where there is none."""

    def judge_view(self, text):
        return Response(text.partition("|")[2]) if "|" in text else "no bar"


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_win_rate_when_prompts_have_several_comparisons_then_each_prompt_counts_once():
    found = win_rate([[1.0, 1.0, 1.0, 1.0], [0.0], [0.5, 0.5], [0.2, 0.6]])
    assert found.rate.mean == pytest.approx((1 + 0 + 0.5 + 0.4) / 4)
    assert (found.wins, found.ties, found.losses, found.rate.count) == (1, 1, 2, 4)
    assert 0 <= found.rate.low < found.rate.mean < found.rate.high <= 1


def test_win_rate_when_something_is_nan_then_it_is_counted_and_left_out():
    nan = float("nan")
    found = win_rate([[nan, 0.9], [nan], [0.1]], {"timeout": 2})
    assert found.rate.mean == pytest.approx(0.5)
    assert (found.left_out, found.unknown, found.rate.count) == (1, 2, 2)
    assert found.problems == {"timeout": 2}


def test_win_rate_when_nothing_is_known_then_it_is_nan():
    found = win_rate([[float("nan")], []])
    assert math.isnan(found.rate.mean)
    assert (found.left_out, found.unknown) == (2, 1)


def test_win_rate_when_no_probability_then_it_is_refused():
    with pytest.raises(ValueError, match=r"1\.5, expected 0 to 1"):
        win_rate([[0.5, 1.5]])


def test_judge_when_it_scores_then_the_probability_is_the_sigmoid_of_the_difference():
    judge = Asked(word_count)
    found = judged_win_rate(judge, prompts(2), groups("a b c", "a"), groups("a", "a b"), RoundsMethod())
    assert found.rate.mean == pytest.approx((sigmoid(2) + sigmoid(-1)) / 2)
    assert [q.responses[0].text for q in judge.questions] == ["a b c", "a"]
    assert [(q.prompt, q.key, q.answer) for q in judge.questions] == [
        ("question 0", f"{0:016x}", "0"),
        ("question 1", f"{1:016x}", "1"),
    ]


def test_judge_when_its_logits_favour_a_place_then_both_orders_cancel_it():
    a, b = groups("a b c", "a"), groups("a", "a b")
    forth = judged_win_rate(Asked(first_is_favoured), prompts(2), a, b, RoundsMethod())
    back = judged_win_rate(Asked(first_is_favoured), prompts(2), b, a, RoundsMethod())
    assert forth.rate.mean == pytest.approx((sigmoid(2) + sigmoid(-1)) / 2)
    assert forth.rate.mean + back.rate.mean == pytest.approx(1)


def test_judge_when_it_gives_probabilities_then_they_are_taken_as_they_are():
    judge = Asked(lambda question: Judgement(probs=((0.5, 0.8), (0.2, 0.5)), problems={"contradiction": 1}))
    found = judged_win_rate(judge, prompts(3), groups("x", "y", "z"), groups("a", "b", "c"), RoundsMethod())
    assert found.rate.mean == pytest.approx(0.8)
    assert found.problems == {"contradiction": 3}


def test_completions_when_alike_or_unseen_then_no_judge_is_asked():
    judge = Asked(word_count)
    a = groups("t|same", "no bar", "t|x", "no", "t|a b")
    b = groups("other|same", "t|x", "no bar", "bar", "t|a")
    found = judged_win_rate(judge, prompts(5), a, b, AfterTheBar())
    assert [[r.text for r in q.responses] for q in judge.questions] == [["a b", "a"]]
    assert found.rate.mean == pytest.approx((0.5 + 0 + 1 + 0.5 + sigmoid(1)) / 5)
    assert (found.wins, found.ties, found.losses) == (2, 2, 1)


def test_completions_when_not_as_many_then_they_are_refused():
    with pytest.raises(ValueError, match="zip"):
        judged_win_rate(Asked(word_count), prompts(1), groups("a\nb"), groups("a"), RoundsMethod())


def test_scores_when_a_judge_scores_then_each_completion_has_its_own():
    judge = Asked(word_count)
    found = judge_scores(judge, prompts(2), groups("t|a b\nno bar", "t|nan\nt|a"), AfterTheBar())
    assert found.values[0][0] == 2
    assert math.isnan(found.values[0][1])
    assert math.isnan(found.values[1][0])
    assert found.values[1][1] == 1
    assert found.problems == {"no bar": 1, "nan": 1}
    assert all(len(question.responses) == 1 for question in judge.questions)


def test_scores_when_given_then_they_decide_and_no_judge_is_asked():
    judge, a, b = Asked(word_count), groups("a b c", "nan"), groups("a", "a b")
    scores = tuple(judge_scores(judge, prompts(2), side, RoundsMethod()) for side in (a, b))
    asked = len(judge.questions)
    found = judged_win_rate(judge, prompts(2), a, b, RoundsMethod(), scores)
    assert len(judge.questions) == asked == 4
    assert found.rate.mean == pytest.approx(sigmoid(2))
    assert (found.left_out, found.unknown) == (1, 1)


def test_scores_when_a_judge_only_compares_then_there_are_none():
    assert judge_scores(Asked(first_is_favoured), prompts(1), groups("a"), RoundsMethod()) is None


def test_win_rate_and_mean_win_probability_are_two_figures():
    found = win_rate([[0.51], [0.52], [0.5], [0.1]])
    assert found.rate.mean == pytest.approx((0.51 + 0.52 + 0.5 + 0.1) / 4)
    assert found.won.mean == pytest.approx(2.5 / 4)
    assert 0 <= found.won.low < found.won.mean < found.won.high <= 1


def test_scale_of_a_judge_reaches_the_probability_and_not_the_win_rate():
    scores = [Scores(values, {}, 100.0) for values in (((0.02,), (0.01,)), ((0.01,), (0.03,)))]
    a, b = groups("a", "b"), groups("c", "d")
    found = judged_win_rate(Asked(word_count), prompts(2), a, b, RoundsMethod(), tuple(scores))
    assert found.rate.mean == pytest.approx((1 / (1 + math.exp(-1)) + 1 / (1 + math.exp(2))) / 2)
    assert found.won.mean == 0.5
