import pytest

from prefopt.errors import ConfigError
from prefopt.losses import rebel
from prefopt.methods.rebel import REBEL
from prefopt.types import Completion, Judgement, Prompt, ScoredGroup
from tests.methods.make_stats import batch, f64, means, pair_stats


def test_rebel_by_hand():
    """h = 3 - 1 = 2; eta times the score gap is 0.5 x (7 - 5) = 1: 1 squared."""
    assert rebel(f64([3.0]), f64([1.0]), f64([7.0]), f64([5.0]), eta=0.5).tolist() == [1.0]


def test_loss_reads_the_score_columns_and_logs_rewards_in_units_of_score():
    method = REBEL(eta=0.5)
    assert [column.name for column in method.needs.columns] == ["chosen_score", "rejected_score"]
    stats = pair_stats([3.0], [1.0], lengths=((1,), (1,)))
    out = method.loss(stats, batch(1, chosen_score=[7.0], rejected_score=[5.0]))
    assert out.terms[0].value.tolist() == [1.0]
    assert means(out)["rewards/margins"] == 4.0
    assert means(out)["score_gap"] == 2.0


def test_pairs_of_rounds_carry_the_scores_of_the_judge():
    answers = tuple(Completion((1,), text, "stop") for text in "abc")
    prompt = Prompt("q", (1,), "0" * 16, "p:1")
    scored = ScoredGroup(prompt, answers, Judgement(scores=(1.0, 7.0)), judged=(0, 2))
    (pair,) = REBEL().make_pairs(scored)
    assert (pair.chosen, pair.rejected) == (2, 0)
    assert pair.columns == {"chosen_score": 7.0, "rejected_score": 1.0}
    compared = ScoredGroup(prompt, answers, Judgement(logits=((0.0, 1.0), (-1.0, 0.0))), judged=(0, 2))
    assert REBEL().make_pairs(compared) == "the judge gives no scores"


def test_eta_must_be_positive():
    with pytest.raises(ConfigError, match=r"method\.eta: found 0\.0"):
        REBEL(eta=0.0)
