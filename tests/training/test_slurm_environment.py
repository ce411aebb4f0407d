"""What srun tells its tasks becomes what a launcher would have told ranks."""

import pytest

from prefopt.errors import TrainError
from prefopt.training import slurm_environment

STEP = {
    "SLURM_JOB_ID": "11",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NODELIST": "n[1-3]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


@pytest.fixture
def scontrol(monkeypatch):
    said = {"hostnames": "n1\nn2\nn3\n", "node": "NodeName=n1 Arch=x86_64\n   NodeAddr=10.0.0.7 NodeHostName=n1 \n"}
    asked = []

    def scontrol(*words):
        asked.append(words)
        return said[words[1]]

    monkeypatch.setattr(slurm_environment, "_scontrol", scontrol)
    return asked


def test_tasks_of_a_step_are_ranks_that_meet_at_the_first_nodes_address(scontrol):
    environment = dict(STEP)
    assert slurm_environment.join_step(environment)
    assert {name: environment[name] for name in environment if name not in STEP} == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "10.0.0.7",
        "MASTER_PORT": str(20000 + 11 * 7 + 2),
    }
    assert scontrol == [("show", "hostnames", "n[1-3]"), ("show", "node", "n1")]


def test_last_node_may_have_fewer_tasks(scontrol):
    environment = {**STEP, "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}
    slurm_environment.join_step(environment)
    assert environment["LOCAL_WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    ("gpus", "local_rank"), [("0,1", "1"), ("GPU-3fa9", "0"), ("", "1")], ids=["of the node", "of the task", "none"]
)
def test_local_rank_is_the_number_of_a_gpu_that_the_task_sees(scontrol, gpus, local_rank):
    environment = {**STEP, "CUDA_VISIBLE_DEVICES": gpus}
    slurm_environment.join_step(environment)
    assert environment["LOCAL_RANK"] == local_rank


@pytest.mark.parametrize(
    "changed",
    [{"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_NUM_TASKS": None}],
    ids=["another launcher", "one task", "no step"],
)
def test_environment_when_there_is_no_step_of_several_tasks_then_it_is_left_alone(scontrol, changed):
    environment = {name: value for name, value in {**STEP, **changed}.items() if value is not None}
    before = dict(environment)
    assert not slurm_environment.join_step(environment)
    assert environment == before


def test_address_that_is_given_or_on_this_machine_is_not_asked_for(scontrol):
    environment = {**STEP, "MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    slurm_environment.join_step(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("head", "1234")
    environment = {**STEP, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "5", "SLURM_NODEID": "0"}
    slurm_environment.join_step(environment)
    assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert scontrol == []


def test_address_when_slurm_does_not_tell_it_then_one_line_says_what_to_set(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(TrainError, match=r"srun: cannot find the address of the first node: .*; set MASTER_ADDR"):
        slurm_environment.join_step(dict(STEP))


@pytest.mark.parametrize("missing", ["SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID", "SLURM_JOB_ID"])
def test_step_when_a_variable_is_missing_then_names_it_in_one_line(missing):
    environment = {name: value for name, value in STEP.items() if name != missing}
    with pytest.raises(TrainError, match=f"srun: '{missing}' is not set, expected all variables that srun") as error:
        slurm_environment.join_step(environment)
    assert "\n" not in str(error.value)
    assert "RANK" not in environment


@pytest.mark.parametrize("value", ["x", "2(x", ""])
def test_step_when_a_variable_is_none_of_slurms_then_says_so_in_one_line(value):
    with pytest.raises(TrainError, match="srun: inconsistent SLURM_ variables"):
        slurm_environment.join_step(STEP | {"SLURM_STEP_TASKS_PER_NODE": value})
