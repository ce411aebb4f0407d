"""A few random kills and damages; `make chaos` does a hundred and thirty."""

import pytest

from tests import chaos, damages


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_random_kills_leave_nothing_behind(tmp_path):
    counts = chaos.chaos(tmp_path, kills=10, seed=1)
    assert counts["kills"] >= 10
    assert [counts[key] for key in ("differing", "damaged", "hangs", "failed")] == [0, 0, 0, 0]


def test_damaged_files_of_a_killed_run_are_made_up_for_or_refused_and_nothing_of_a_user_is_gone(server, tmp_path):
    counts = damages.damages(server, chaos._base(tmp_path), tmp_path, count=2, seed=0, kinds_of_work=1)
    assert counts["damages"] == counts["same"] + counts["refused"] == 2
    assert [counts[key] for key in damages.WRONG] == [0, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_damaged_files_of_every_kind_are_made_up_for_or_refused_and_nothing_of_a_user_is_gone(tmp_path):
    counts = chaos.damage(tmp_path, 30, seed=1)
    assert counts["damages"] == counts["same"] + counts["refused"] == 30
    assert [counts[key] for key in damages.WRONG] == [0, 0, 0, 0]
