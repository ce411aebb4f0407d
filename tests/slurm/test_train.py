"""train.sbatch on a real Slurm: ranks of srun, a signal before the end of the time, a node that dies."""

import json
import time

import pytest

from tests.slurm.cluster import until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
TRAIN = (
    "--method dpo --train.global_batch 32 --train.micro_batch 16 --testbed.eval_pairs 16 --eval.every 1000 "
    "--train.save_every 5"
)
LIMIT = "--time=1 --signal=USR1@10"  # slurmctld looks twice a minute, so it may tell much sooner
LONG = "sbatch --parsable {1} --output={0}.out slurm/train.sbatch --output {0} --train.max_steps 1400 " + TRAIN
TWO_NODES = "sbatch --parsable --nodes=2 --output={0}.out slurm/train.sbatch --output {0} --train.max_steps 60 " + TRAIN
ONE_NODE = "sbatch --parsable --output={0}.out slurm/train.sbatch --output {0} --train.max_steps 200 " + TRAIN


@pytest.fixture(scope="module")
def two_nodes(place):
    """A run on two nodes that nobody disturbed."""
    place.wait(place.submit(TWO_NODES.format("two")))
    return "two"


@pytest.fixture(scope="module")
def one_node(place):
    place.wait(place.submit(ONE_NODE.format("one")))
    return "one"


def test_train_on_two_nodes_when_started_by_srun_alone_then_its_tasks_are_ranks(place, two_nodes):
    out = (place.folder / f"{two_nodes}.out").read_text()
    assert "prefopt: world size 2, backend ddp" in out
    card = json.loads((place.folder / two_nodes / "run_card.json").read_text())
    assert card["batch"]["processes"] == 2
    assert len((place.folder / two_nodes / "model" / "model.safetensors").read_bytes()) > 1000


def test_job_when_signalled_before_its_time_is_over_then_it_is_requeued_and_ends_with_the_same_weights(place, one_node):
    job = place.submit(ONE_NODE.format("signalled"))
    place.wait_for_step("signalled", 20)
    place.shell(f"scancel --signal=USR1 {job}")
    about = place.wait(job)
    assert about["Restarts"] == "1"
    out = (place.folder / "signalled.out").read_text()
    assert "SIGUSR1: saving, then leaving with exit status 75" in out
    assert "resuming from" in out
    assert place.weights("signalled") == place.weights(one_node)


def test_job_when_it_is_cancelled_then_it_does_not_come_back_and_the_same_command_continues_it(place, one_node):
    job = place.submit(ONE_NODE.format("cancelled"))
    place.wait_for_step("cancelled", 20)
    place.shell(f"scancel {job}")
    place.wait_for_all()
    assert place.about(job)["JobState"] == "CANCELLED"
    place.wait(place.submit(ONE_NODE.format("cancelled")))
    assert "resuming from" in (place.folder / "cancelled.out").read_text()
    assert place.weights("cancelled") == place.weights(one_node)


def test_job_when_a_node_goes_down_then_it_is_requeued_and_ends_with_the_same_weights(place, two_nodes):
    job = place.submit(TWO_NODES.format("node"))
    place.wait_for_step("node", 12)
    place.shell("scontrol update nodename=n2 state=down reason=test")
    time.sleep(2)
    place.shell("scontrol update nodename=n2 state=resume || true")  # it may have come back by itself
    about = place.wait(job)
    assert about["Restarts"] == "1"
    assert "resuming from" in (place.folder / "node.out").read_text()
    assert place.weights("node") == place.weights(two_nodes)


def test_job_when_its_time_runs_out_then_slurm_tells_it_and_it_is_requeued_and_ends_with_the_same_weights(place):
    """Nobody sends a signal here but the controller."""
    straight, limited = (place.submit(LONG.format(*of)) for of in (("long", ""), ("limited", LIMIT)))
    about = place.wait(limited)
    assert int(about["Restarts"]) >= 1
    assert "SIGUSR1: saving, then leaving with exit status 75" in (place.folder / "limited.out").read_text()
    place.wait(straight)
    assert place.weights("limited") == place.weights("long")


def test_job_when_its_node_loses_its_power_then_it_goes_on_on_the_other_and_ends_with_the_same_weights(place, one_node):
    job = place.submit(ONE_NODE.format("power"))
    place.wait_for_step("power", 20)
    node = place.about(job)["NodeList"]
    place.cluster.crash(node)
    try:
        about = place.wait(job)
    finally:
        place.cluster.boot(node)
    assert about["Restarts"] == "1"
    assert about["NodeList"] != node
    assert "resuming from" in (place.folder / "power.out").read_text()
    assert place.weights("power") == place.weights(one_node)
    until(lambda: place.cluster.idle() == 2, 60, "both nodes are back")
