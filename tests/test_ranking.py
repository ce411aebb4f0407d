"""Win probabilities and orders by hand."""

import math

import numpy as np
import pytest

from prefopt import registry
from prefopt.ranking import (
    best_and_worst,
    length_controlled,
    order_scores,
    reward_scale,
    safe_mean,
    win_probabilities,
)
from prefopt.rounds_method import in_rounds
from prefopt.types import Completion, Judgement, Prompt, ScoredGroup

NAN = math.nan


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def group(judgement, k=3, judged=None):
    completions = tuple(Completion((i,), f"text {i}", "stop") for i in range(5))
    return ScoredGroup(Prompt("p", (0,), "k", "w"), completions, judgement, judged or tuple(range(k)))


def test_scores_become_probabilities_by_a_sigmoid_of_their_difference():
    probs = win_probabilities(Judgement(scores=(1.0, 0.0, -1.0)))
    assert probs[0].tolist() == pytest.approx([0.5, sigmoid(1), sigmoid(2)])
    assert probs + probs.T == pytest.approx(np.ones((3, 3)))
    sharper = win_probabilities(Judgement(scores=(1.0, 0.0, -1.0)), "blender_score")
    assert sharper[0].tolist() == pytest.approx([0.5, sigmoid(2), sigmoid(4)])


def test_logits_of_both_orders_are_averaged_so_that_a_judge_that_prefers_what_stands_first_prefers_nothing():
    biased = Judgement(logits=((0.0, 2.0), (2.0, 0.0)))
    assert win_probabilities(biased).tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert best_and_worst(order_scores(biased)) == "all scores equal"


def test_probabilities_are_taken_as_they_are_and_a_cycle_is_kept():
    beats = 0.9
    cycle = Judgement(probs=((0.5, beats, 1 - beats), (1 - beats, 0.5, beats), (beats, 1 - beats, 0.5)))
    assert win_probabilities(cycle).tolist() == [pytest.approx(row) for row in cycle.probs]
    assert order_scores(cycle) == pytest.approx([0.5] * 3)
    with pytest.raises(ValueError, match="probabilities"):
        win_probabilities(cycle, "blender_score")


def test_what_a_judge_did_not_say_is_left_out_and_never_chosen():
    assert best_and_worst(order_scores(Judgement(scores=(1.0, NAN, 2.0)))) == (2, 0)
    assert best_and_worst(order_scores(Judgement(scores=(1.0, NAN, NAN)))) == "fewer than two judged"
    logits = Judgement(logits=((0.0, NAN, 1.0), (NAN, 0.0, NAN), (-1.0, NAN, 0.0)))
    assert best_and_worst(order_scores(logits)) == (0, 2)
    (pair,) = registry.get("sppo")().make_pairs(group(logits))
    assert pair.columns["chosen_win_prob"] == pytest.approx((0.5 + sigmoid(1)) / 2)


@pytest.mark.parametrize("name", ["dpo", "sppo"])
def test_a_pair_is_best_against_worst_by_the_numbers_of_all_completions(name):
    method = in_rounds(registry.get(name)())
    (pair,) = method.make_pairs(group(Judgement(scores=(0.0, 2.0, 1.0)), judged=(0, 2, 4)))
    assert (pair.chosen, pair.rejected) == (2, 0)
    assert method.make_pairs(group(Judgement(scores=(1.0, 1.0, 1.0)))) == "all scores equal"


def test_sppo_pair_has_the_mean_win_probability_with_the_tie_against_itself():
    (pair,) = registry.get("sppo")().make_pairs(group(Judgement(scores=(1.0, 0.0, -1.0))))
    assert pair.columns == {
        "chosen_win_prob": pytest.approx((0.5 + sigmoid(1) + sigmoid(2)) / 3),
        "rejected_win_prob": pytest.approx((0.5 + sigmoid(-1) + sigmoid(-2)) / 3),
        "pair_win_prob": pytest.approx(sigmoid(2)),
    }


# Scales and extremes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["pairwise_sigmoid", "blender_score"])
def test_scale_multiplies_what_goes_into_the_sigmoid_and_leaves_the_order(mode):
    scores = (0.1, 0.3, 0.2)
    scaled = Judgement(scores=scores, scale=10.0)
    assert win_probabilities(scaled, mode) == pytest.approx(
        win_probabilities(Judgement(scores=tuple(10 * s for s in scores)), mode), abs=1e-12
    )
    assert order_scores(scaled, mode).tolist() == order_scores(Judgement(scores=scores), mode).tolist()
    probs = ((0.5, 0.9), (0.1, 0.5))
    assert win_probabilities(Judgement(probs=probs, scale=10.0)) == pytest.approx(np.array(probs))


def test_reward_scale_std_is_one_over_the_pooled_spread_within_prompts():
    """Deviations 1, -1 and 2, 0, -2 with 1 and 2 degrees of freedom: variance (2 + 8) / 3, wherever the prompts lie."""
    judgements = [Judgement(scores=(101.0, 99.0)), Judgement(scores=(2.0, NAN, 0.0, -2.0)), Judgement(scores=(7.0,))]
    assert reward_scale("std", judgements) == pytest.approx(1 / math.sqrt(10 / 3))
    assert reward_scale(2.5, judgements) == 2.5
    assert reward_scale("std", [Judgement(scores=(3.0, 3.0))]) == 1.0
    assert reward_scale("std", []) == 1.0
    logits = Judgement(logits=((0.0, 2.0), (-2.0, 0.0)))  # means 1 and -1
    assert reward_scale("std", [logits]) == pytest.approx(1 / math.sqrt(2))
    with pytest.raises(ValueError, match="returns probabilities has no scores"):
        reward_scale("std", [Judgement(probs=((0.5, 0.5), (0.5, 0.5)))])


@pytest.mark.parametrize("mode", ["pairwise_sigmoid", "blender_score"])
def test_scores_whose_sums_no_float_holds_are_ranked_as_others_are(mode):
    judgement = Judgement(scores=(1.5e308, -1.5e308, 1.7e308, 0.0))
    assert best_and_worst(order_scores(judgement, mode)) == (2, 1)
    probs = win_probabilities(judgement, mode)
    assert (probs[0, 1], probs[1, 0], probs[0, 0], probs[2, 0]) == (1.0, 0.0, 0.5, 1.0)
    far = tuple(tuple(0.0 if i == j else 1.7e308 * (1 if i < j else -1) for j in range(4)) for i in range(4))
    assert best_and_worst(order_scores(Judgement(logits=far), mode)) == (0, 3)
    assert reward_scale("std", [Judgement(scores=(1.5e308, -1.5e308))]) == pytest.approx(1 / (1.5e308 * math.sqrt(2)))
    controlled = length_controlled(np.array([1e308, -1e308, 1e308]), np.array([1, 1, 1]), rho=0.5)
    assert controlled == pytest.approx([1 / math.sqrt(2), -math.sqrt(2), 1 / math.sqrt(2)])
    assert safe_mean([1e308, 1.5e308, 1.7e308]) == pytest.approx(1.4e308)
    assert safe_mean([1.0, 2.0]) == 1.5
