"""The commands of slurm/README.md, on a real Slurm, at a smaller size."""

import re

import pytest

from tests.slurm.conftest import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
SMALL = "--train.max_steps 3 --train.global_batch 8 --train.micro_batch 4 --testbed.eval_pairs 8 --train.threads 1"
SMALL_ROUNDS = (
    "--rounds.prompts 4 --rounds.eval_prompts 4 --rounds.shard 2 --generate.batch 20 --train.global_batch 4 "
    "--train.micro_batch 2 --train.epochs 1 --train.threads 1"
)


def blocks():
    return re.findall(r"```bash\n(.*?)```", (ROOT / "slurm" / "README.md").read_text(), re.DOTALL)


def test_five_commands_lead_from_a_laptop_to_two_nodes(place):
    commands = blocks()[0].strip().splitlines()
    assert len(commands) == 5
    fixed = re.sub(r"--(\S+) (\S+)", r"\1: \2,", SMALL)
    (place.folder / "small.yaml").write_text(f"fixed: {{{fixed}}}\ngrid: {{method: [dpo, tdpo]}}\n")
    for command in commands:
        command = command.replace("configs/sweeps/losses.yaml", "small.yaml")
        place.shell(f"{command} {SMALL}" if "--method" in command else command)
    place.wait_for_all()
    assert "2 runs: 2 done" in place.shell(commands[-1].replace("configs/sweeps/losses.yaml", "small.yaml"))
    for name, processes in (("laptop", 1), ("one_node", 1), ("two_nodes", 2)):
        assert (place.folder / "runs" / name / "model" / "model.safetensors").exists()
        assert f'"processes": {processes},' in (place.folder / "runs" / name / "run_card.json").read_text()


def test_deepspeed_of_the_page_shards_over_two_nodes(place):
    setting, command = blocks()[1].strip().splitlines()
    place.shell(f"{setting}; {command} {SMALL}")
    logs = [path.read_text() for path in place.folder.glob("slurm-*.out")]
    assert any("prefopt: world size 2, backend zero2" in log for log in logs)
    assert (place.folder / "runs" / "zero2" / "model" / "model.safetensors").exists()


def test_rounds_of_the_page_end_with_a_model(place):
    (command,) = blocks()[2].strip().splitlines()
    command = command.replace("--rounds.count 2", "--rounds.count 1").replace("runs/rounds", "runs/of_the_page")
    place.shell(f"{command} {SMALL_ROUNDS}")
    place.wait_for_all(500)
    assert (place.folder / "runs/of_the_page/model/model.safetensors").exists()
    card = (place.folder / "runs/of_the_page/round_01/train/run_card.json").read_text()
    assert '"processes": 2,' in card
