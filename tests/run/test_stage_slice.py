"""The stage that `rounds --stage` names; mistakes in it are in tests/rounds/test_bad_input.py."""

import pytest

from prefopt.rounds.store import stages_left
from prefopt.run.stage_slice import StageSlice, parse_stage
from prefopt.settings import parse


@pytest.mark.parametrize(
    ("argv", "stage", "name"),
    [
        (["--stage", "train", "--round=2", "--seed", "1"], StageSlice("train", 2), "train-2"),
        (["--seed", "1", "--stage", "evaluate", "--round", "0"], StageSlice("evaluate", 0), "evaluate-0"),
        (
            ["--stage=judge", "--seed", "1", "--round", "1", "--part", "3/4"],
            StageSlice("judge", 1, (3, 4)),
            "judge-1-3of4",
        ),
        (["--seed", "1"], None, "None"),
    ],
)
def test_arguments_when_they_name_a_stage_then_all_others_are_passed_on(argv, stage, name):
    rest, found = parse_stage(argv)
    assert rest == ["--seed", "1"]
    assert found == stage
    assert str(found) == name


def test_stages_that_are_left_of_a_new_run_are_all_in_order(tmp_path):
    config = parse(["--method", "dpo", "--rounds.count", "2", "--output", str(tmp_path)])
    each = ["generate", "judge", "pair", "train", "evaluate"]
    assert list(stages_left(config)) == [(0, "evaluate"), *((number, name) for number in (1, 2) for name in each)]
