"""Rounds against exact self-play: figures that can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from prefopt.errors import TrainError
from prefopt.testbed.self_play import exact_path, self_play
from prefopt.testbed.world_report import Curves, mean_and_interval, self_play_plot

GAME = torch.tensor([[[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]], dtype=torch.float64)  # rock, paper, scissors


def test_pure_policies_that_go_round_are_exploitable_and_their_average_is_not() -> None:
    pure = [*torch.eye(3, dtype=torch.float64)[:, None, :].log()]
    found = self_play([pure[0], pure[1], pure[2], pure[0]], GAME, eta=2.0)
    assert found.last == pytest.approx((0.5, 0.5, 0.5, 0.5))
    # paper alone; paper and scissors in halves, where scissors win 1/2 and 1/4; all three
    assert found.average == pytest.approx((0.5, 0.5, 0.25, 0.0))
    assert found.average_of_starts == pytest.approx((0.5, 0.5, 0.25, 0.0))
    assert found.step == pytest.approx((1, 1, 1))  # a step leaves a pure policy where it is
    assert found.path == pytest.approx((1, 1, 0))  # the third one is where exact steps never left


def test_exact_self_play_is_no_distance_from_itself() -> None:
    start = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
    found = self_play(exact_path(start, GAME, 1.0, 5), GAME, eta=1.0)
    assert found.step == found.path == pytest.approx((0,) * 5, abs=1e-15)
    assert len(found.last) == len(found.average) == 6


def test_steps_are_measured_from_where_a_round_began_and_the_path_from_the_start() -> None:
    start, even = (torch.tensor([p], dtype=torch.float64).log() for p in ([0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]))
    found = self_play([start, even, even], GAME, eta=1.0)
    first, second = exact_path(start, GAME, 1.0, 2)[1:]
    assert found.step == pytest.approx((float((even.exp() - first.exp()).abs().sum() / 2), 0), abs=1e-12)
    assert found.path[1] == pytest.approx(float((even.exp() - second.exp()).abs().sum() / 2), abs=1e-12)


def test_interval_by_hand() -> None:
    # t of 0.975 with one degree of freedom is 12.706; standard deviation of 1 and 3 is sqrt 2
    mean, half = mean_and_interval(np.array([[1.0, 5.0], [3.0, 5.0]]))
    np.testing.assert_allclose(mean, [2, 5])
    np.testing.assert_allclose(half, [12.706, 0], rtol=1e-4)
    assert (mean_and_interval(np.array([[1.0, 5.0]]))[1] == 0).all()


def test_plot_is_a_png_or_one_line(tmp_path: Path) -> None:
    starts = [torch.tensor([p], dtype=torch.float64).log() for p in ([0.6, 0.3, 0.1], [0.2, 0.5, 0.3])]
    exact = [self_play(exact_path(start, GAME, 1.0, 4), GAME, 1.0) for start in starts]
    noisy = [self_play([start] * 5, GAME, 1.0) for start in starts]
    file = tmp_path / "self_play.png"
    self_play_plot(file, [Curves("one", noisy), Curves("two", exact)], exact, follows="one")
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.stat().st_size > 10_000
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match=r"file/plot\.png: cannot write the plot"):
        self_play_plot(tmp_path / "file" / "plot.png", [Curves("one", noisy)], exact, follows="one")
