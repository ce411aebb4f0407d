"""DPO on thoughts and responses; pairs from responses alone, their length held."""

import math

import pytest
import torch

from prefopt.data.encoder import Encoder
from prefopt.errors import ConfigError
from prefopt.losses import dpo
from prefopt.methods.thought_po import RHOS, ThoughtPO
from prefopt.run.task import without_thoughts
from prefopt.types import Completion, Judgement, PairRow, Prompt, Response, ScoredGroup
from tests.helpers import byte_bpe_tokenizer
from tests.methods.make_stats import batch, f64, means, pair_stats


def group(*texts, scores=None, probs=None):
    """Of these completions; the judge has seen those with a response, and said this of them."""
    method = ThoughtPO()
    completions = tuple(Completion((i,), text, "stop") for i, text in enumerate(texts))
    judged = tuple(i for i, text in enumerate(texts) if isinstance(method.judge_view(text), Response))
    unparsed = tuple(i for i in range(len(texts)) if i not in judged)
    scores = None if scores is None else tuple(scores)
    probs = None if probs is None else tuple(map(tuple, probs))
    return ScoredGroup(Prompt("p", (0,), "k", "w"), completions, Judgement(scores, probs=probs), judged, unparsed)


def test_loss_is_dpos_with_the_likelihood_of_the_chosen_beside_it():
    stats = pair_stats([-3.0, -5.0], [-4.0, -4.5])
    (term,) = ThoughtPO(beta=0.5).loss(stats, batch(2)).terms
    wanted = dpo(f64([-3.0, -5.0]), f64([-4.0, -4.5]), beta=0.5)
    assert torch.equal(term.value.detach(), wanted)
    assert ThoughtPO(beta=0.5).loss_at_reference() == math.log(2)

    preference, nll = ThoughtPO(beta=0.5, nll_weight=0.2).loss(stats, batch(2)).terms
    assert torch.equal(preference.value.detach(), wanted)
    assert (nll.value.tolist(), nll.count.tolist(), nll.weight) == ([3.0, 5.0], [4, 2], 0.2)
    assert ThoughtPO(nll_weight=0.2).loss_at_reference() is None


def test_metrics_are_those_of_dpo():
    found = means(ThoughtPO(beta=0.5).loss(pair_stats([-3.0, -5.0], [-4.0, -4.5]), batch(2)))
    assert found == {
        "rewards/chosen": -2.0,
        "rewards/rejected": -2.125,
        "rewards/margins": 0.125,
        "rewards/accuracies": 0.5,
        "accuracy/logit": 0.5,
    }


def test_judge_sees_the_response_and_never_the_thought():
    method = ThoughtPO()
    assert method.judge_view("secret draft <R> answer") == Response("answer")
    assert method.judge_view("secret draft, and then nothing") == "no response marker"
    assert method.judge_view("a <R> b <R> c") == "response marker repeated"
    assert ThoughtPO(on_repeated_marker="first").judge_view("a <R> b <R> c") == Response("b <R> c")
    assert ThoughtPO(thought_prompt="none").judge_view("a <R> b") == Response("a <R> b")


def test_best_against_worst_by_score():
    (pair,) = ThoughtPO(rho=0.0).make_pairs(group("x <R> a", "x <R> bb", "x <R> ccc", scores=[1.0, 3.0, 2.0]))
    assert (pair.chosen, pair.rejected) == (1, 0)


def test_length_turns_the_order_where_scores_are_near():
    """z(r) = (5, 2, -7) / sqrt(26), z(l) = (2, -1, -1) / sqrt(2); the order is z(r) - z(l) / 2."""
    some = group("<R> " + "a" * 9, "<R> bbb", "<R> ccc", scores=[3.0, 2.5, 1.0])
    order = ThoughtPO(rho=0.5).order(some)
    r, z = 1 / math.sqrt(26), 1 / math.sqrt(2)
    assert order == pytest.approx([5 * r - z, 2 * r + z / 2, -7 * r + z / 2], rel=1e-12)
    assert ThoughtPO(rho=0.0).make_pairs(some)[0].chosen == 0
    assert ThoughtPO(rho=0.5).make_pairs(some)[0].chosen == 1


def test_the_length_that_is_held_is_the_responses_not_the_thoughts():
    some = group("long " * 50 + "<R> aa", "<R> bbbbbb", scores=[1.0, 1.1])
    assert ThoughtPO(rho=3.0).make_pairs(some)[0].chosen == 0


def test_completion_without_a_response_is_worse_than_any():
    (pair,) = ThoughtPO(rho=0.0).make_pairs(group("<R> a", "no answer", "<R> b", "<R>", scores=[1.0, 2.0]))
    assert (pair.chosen, pair.rejected) == (2, 1)
    (pair,) = ThoughtPO(rho=0.0).make_pairs(group("none", "<R> b", scores=[0.3]))
    assert (pair.chosen, pair.rejected) == (1, 0)
    (pair,) = ThoughtPO(rho=0.0).make_pairs(group("<R> a", "<R> b", "none", scores=[1.0, 1.0]))
    assert (pair.chosen, pair.rejected) == (0, 2), "equal scores, but one has no response"


@pytest.mark.parametrize(
    ("some", "reason"),
    [
        (group("none", "neither", scores=[]), "no candidate judged"),
        (group("<R> a", "<R> b", scores=[math.nan, math.nan]), "no candidate judged"),
        (group("<R> a", "<R> b", scores=[math.nan, 1.0]), "fewer than two judged"),
        (group("<R> a", "<R> bbbb", scores=[1.0, 1.0]), "all scores equal"),
    ],
)
def test_prompt_without_a_pair_says_why(some, reason):
    assert ThoughtPO(rho=0.5).make_pairs(some) == reason


def test_lengths_that_are_all_equal_change_nothing():
    some = group("<R> aa", "<R> bb", "<R> cc", scores=[1.0, 3.0, 2.0])
    for rho in (0.0, 0.5, 5.0):
        (pair,) = ThoughtPO(rho=rho).make_pairs(some)
        assert (pair.chosen, pair.rejected) == (1, 0)


def test_verdicts_of_a_judge_that_compares_become_strengths():
    some = group("<R> a", "<R> b", "<R> c", probs=[[0.5, 1.0, 1.0], [0.0, 0.5, 0.5], [0.0, 0.5, 0.5]])
    order = ThoughtPO(rho=0.0).order(some)
    assert order[0] > order[1]
    assert order[1] == pytest.approx(order[2], abs=1e-9)
    nan = math.nan
    some = group("<R> a", "<R> b", "<R> c", probs=[[0.5, 1.0, nan], [0.0, 0.5, nan], [nan, nan, 0.5]])
    assert math.isnan(ThoughtPO(rho=0.0).order(some)[2]), "nothing is known of the third"
    assert ThoughtPO(rho=0.0).make_pairs(some)[0].rejected == 1


def test_rho_auto_is_the_least_that_holds_length():
    long_wins = [group("<R> " + "a" * 10, "<R> " + "b" * 5, "<R> " + "c" * 6, scores=[3.0, 1.0, 2.9]) for _ in range(3)]
    tuned = ThoughtPO().tuned(long_wins)
    assert tuned.rho in RHOS
    assert tuned.rho > 0
    pairs = [tuned.make_pairs(some) for some in long_wins]
    figures = tuned.round_figures(long_wins, pairs)
    assert figures["chosen_characters"] <= figures["rejected_characters"] or tuned.rho == RHOS[-1]
    before = ThoughtPO(rho=RHOS[RHOS.index(tuned.rho) - 1])
    figures = before.round_figures(long_wins, [before.make_pairs(some) for some in long_wins])
    assert figures["chosen_characters"] > figures["rejected_characters"]
    short_wins = [group("<R> a", "<R> bbb", scores=[2.0, 1.0])]
    assert ThoughtPO().tuned(short_wins).rho == 0.0
    hopeless = [group("<R> aaaa", "<R> b", scores=[2.0, 1.0])]
    assert ThoughtPO().tuned(hopeless).rho in RHOS
    assert ThoughtPO(rho=0.2).tuned(long_wins).rho == 0.2


def test_figures_count_lengths_and_what_cannot_be_read():
    some = group("four <R> ab", "x", "ab <R> abcd", scores=[1.0, 2.0])
    method = ThoughtPO(rho=0.0)
    found = method.round_figures([some], [method.make_pairs(some)])
    assert found == {
        "parsed": pytest.approx(2 / 3),
        "thought_characters": 3.0,
        "response_characters": 3.0,
        "rho": 0.0,
        "rejected_unparsed": 1.0,
    }


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"beta": 0.0}, "method.beta: found 0.0, expected a finite number > 0"),
        ({"nll_weight": -1.0}, "method.nll_weight: found -1.0, expected a number >= 0"),
        ({"rho": -0.1}, "method.rho: found -0.1, expected a number >= 0, or auto"),
        ({"rho": math.inf}, "method.rho: found inf"),
        ({"thought_prompt": "specifik"}, "did you mean 'specific'?"),
        ({"on_repeated_marker": "frist"}, "did you mean 'first'?"),
        ({"thought_prompt": "none", "response_marker": "<A>"}, "with thought_prompt none completions are not split"),
        ({"response_marker": " <A>"}, "a text without white space at its ends"),
        ({"response_marker": ""}, "has no response marker"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, line):
    with pytest.raises(ConfigError) as caught:
        ThoughtPO(**settings)
    assert line in str(caught.value)


@pytest.mark.parametrize(("chosen", "told"), [("Blue", True), ("a colour <R> Blue", False)])
def test_pairs_without_thoughts_are_warned_of(chosen, told):
    tokenizer = byte_bpe_tokenizer(["hello"], 300)
    (cut,) = Encoder(tokenizer, 99).rows([PairRow("Q:", f" {chosen}", None, {}, "f:1")])
    assert [line[:42] for line in without_thoughts([cut.pair], tokenizer, "<R>")] == [
        "warning: none of the first 1 chosen comple"
    ] * told
