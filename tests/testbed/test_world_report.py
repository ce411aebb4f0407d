from __future__ import annotations

from pathlib import Path

import pytest

from prefopt.errors import TrainError
from prefopt.testbed.bandit import Bandit
from prefopt.testbed.world_report import PlotLine, frontier_plot, summary_table


def path_to_the_optimum(world: Bandit, beta: float) -> list[dict[str, float]]:
    star = world.optimum(beta)
    tables = [(world.log_ref * (1 - t) + star * t).log_softmax(-1) for t in (0, 0.3, 0.6, 0.8)]
    return [world.measures(table, beta) for table in tables]


def test_table_has_reference_end_and_optimum(world: Bandit) -> None:
    first, *_, last = path_to_the_optimum(world, 1.0)
    lines = summary_table(world, first, last, 1.0).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split("  ")[0] for line in lines[2:]] == ["reference", "policy at end", "optimum pi*"]
    assert "100.0%" in lines[2]
    assert f"{last['exact/kl_star_ratio']:.1%}" in lines[3]
    assert f"{last['exact/optimal_reward']:.3f}" in lines[4]
    assert "-0.000" not in "\n".join(lines)


def test_table_shows_the_start_when_it_is_not_the_reference(world: Bandit) -> None:
    _, first, _, last = path_to_the_optimum(world, 1.0)
    assert "\nstart " in summary_table(world, first, last, 1.0)


@pytest.mark.parametrize("betas", [[1.0], [0.5, 1.0, 2.0]])
def test_plot_is_a_png(world: Bandit, tmp_path: Path, betas: list[float]) -> None:
    file = tmp_path / "frontier.png"
    frontier_plot(file, world, [PlotLine("dpo", beta, path_to_the_optimum(world, beta)) for beta in betas])
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.stat().st_size > 10_000
    assert list(tmp_path.iterdir()) == [file]


def test_plot_that_cannot_be_written_is_one_line(world: Bandit, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = PlotLine("dpo", 1.0, path_to_the_optimum(world, 1.0))
    with pytest.raises(TrainError, match=r"file/frontier\.png: cannot write the plot"):
        frontier_plot(tmp_path / "file" / "frontier.png", world, [run])
