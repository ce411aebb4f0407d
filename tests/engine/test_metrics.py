import json

import pytest
import torch

from prefopt.engine.metrics import Meter, MetricsFile, read_lines, shared_metrics
from prefopt.engine.runtime import Runtime
from prefopt.types import PairStats


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


class OneProcess(Runtime):
    def __init__(self):
        pass

    world = 1


def test_shared_metrics_by_hand():
    stats = PairStats(
        chosen_logps=f64([-3.0, -9.0]),
        rejected_logps=f64([-4.0, -2.0]),
        chosen_lengths=torch.tensor([4, 2]),
        rejected_lengths=torch.tensor([3, 5]),
        chosen_kl=f64([1.0, 2.0]),
        rejected_kl=f64([0.5, 1.5]),
        chosen_reverse_kl=f64([1.0, 4.0]),
        chosen_entropy=f64([3.0, 4.0]),
        rejected_entropy=f64([2.0, 5.0]),
    )
    found = {name: (value.sum() / count.sum()).item() for name, (value, count) in shared_metrics(stats).items()}
    assert found == pytest.approx(
        {
            "logps/chosen": -6.0,
            "logps/rejected": -3.0,
            "kl/chosen": 1.5,
            "kl/rejected": 1.0,
            "kl/margin": 0.5,
            "reverse_kl/chosen": 2.5,
            "entropy": 1.0,  # 14 nats over 4 + 2 + 3 + 5 tokens
        }
    )


def test_shared_metrics_of_one_side_name_one_side():
    stats = PairStats(f64([-6.0, -3.0]), None, torch.tensor([4, 2]), None, chosen_entropy=f64([2.0, 4.0]))
    found = shared_metrics(stats)
    assert set(found) == {"logps/chosen", "entropy"}
    assert found["entropy"][0].sum() / found["entropy"][1].sum() == 1.0


def test_meter_divides_once_over_uneven_batches():
    meter = Meter()
    meter.add({"x": (f64([1.0, 2.0]), f64([1.0, 1.0])), "none": (f64([0.0]), f64([0.0]))})
    meter.add({"x": (f64([9.0]), f64([2.0]))})
    meter.add({"x": (f64([]), f64([]))})
    assert meter.averages(OneProcess()) == {"x": 3.0}


def test_metrics_file_rewinds_to_a_step_and_drops_a_half_line(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(4):
        file.write({"step": step, "split": "train"})
    with file.path.open("a") as handle:
        handle.write('{"step": 4, "spl')
    file.rewind(2)
    assert [line["step"] for line in read_lines(file.path)] == [0, 1, 2]
    assert file.path.read_text().endswith("\n")
    assert file.has(2, "train")
    assert not file.has(2, "eval")
    file.write({"step": 3, "split": "eval"})
    assert json.loads(file.path.read_text().splitlines()[-1]) == {"step": 3, "split": "eval"}
