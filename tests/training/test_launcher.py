"""The variables of a launcher."""

import pytest

from prefopt.errors import TrainError
from prefopt.training.launcher import check_launcher


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE: found 2 in the environment without RANK and MASTER_ADDR and MASTER_PORT",
        ),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE: found 'two' in the environment, expected a whole number"),
        ({"RANK": "3"}, "RANK: found 3 of WORLD_SIZE 1, expected less"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "launcher: ACCELERATE_USE_DEEPSPEED is in the environment, but no laun"),
    ],
)
def test_launcher_when_its_variables_are_not_whole_then_one_line_names_them(environment, says, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    check_launcher()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainError, match=f"^{says}"):
        check_launcher()
