import math

import pytest

from prefopt.evaluate.texts import describe_texts, distinct_n
from tests.evaluate.helpers import completion


def test_distinct_when_counted_by_hand_then_it_agrees():
    sequences = [[1, 2, 1, 2], [1, 2, 3]]
    assert distinct_n(sequences, 1) == pytest.approx(3 / 7)
    assert distinct_n(sequences, 2) == pytest.approx(3 / 5)  # 12, 21, 12, 12, 23
    assert distinct_n(sequences, 3) == pytest.approx(3 / 3)  # 121, 212, 123; none across the border
    assert math.isnan(distinct_n(sequences, 5))


def test_texts_when_in_groups_then_shares_and_means_are_over_completions():
    groups = [
        [completion("a b", [5, 6, 1]), completion("a b", [5, 6, 1]), completion(" \n", [1])],
        [completion("c d e", [7, 8, 9, 7], "length")],
    ]
    found = describe_texts(groups)
    assert found.completions == 4
    assert found.tokens == pytest.approx((3 + 3 + 1 + 4) / 4)
    assert found.characters == pytest.approx((3 + 3 + 2 + 5) / 4)
    assert (found.cut, found.empty, found.duplicates) == (0.25, 0.25, 0.25)
    assert found.distinct[0] == pytest.approx(6 / 11)
    assert found.distinct_in_group[0] == pytest.approx((3 / 7 + 3 / 4) / 2)
    assert found.distinct_in_group[1] == pytest.approx((2 / 4 + 3 / 3) / 2)


def test_texts_when_a_group_has_no_ngram_then_it_is_left_out_of_the_mean():
    found = describe_texts([[completion("a", [1])], [completion("b c", [1, 2])]])
    assert found.distinct_in_group[:2] == (1.0, 1.0)
    assert math.isnan(found.distinct_in_group[2])
    with pytest.raises(ValueError, match="no completions"):
        describe_texts([[], []])
