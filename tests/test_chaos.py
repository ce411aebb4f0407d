"""A few random kills; `make chaos` does a hundred."""

import pytest

from tests.chaos import chaos


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_random_kills_leave_nothing_behind(tmp_path):
    counts = chaos(tmp_path, kills=10, seed=1)
    assert counts["kills"] >= 10
    assert [counts[key] for key in ("differing", "damaged", "hangs", "failed")] == [0, 0, 0, 0]
