import json

import pytest
import torch

from prefopt.storage import Damaged
from prefopt.training.metrics import Meter, MetricsFile, read_lines, shared_metrics
from prefopt.training.runtime import Runtime
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


@pytest.fixture
def saved(tmp_path):
    """(a metrics file with four lines, what a checkpoint knows of the first three)."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(3):
        file.write({"step": step, "split": "train", "loss": step / 7})
    sealed = json.loads(json.dumps(file.seal()))
    file.write({"step": 3, "split": "train", "loss": 3 / 7})
    return file, sealed


def test_metrics_file_when_restored_then_ends_where_the_checkpoint_was_saved(saved):
    file, sealed = saved
    with file.path.open("ab") as handle:
        handle.write(b"\0\0\0 what a power cut left")
    file.restore(sealed, "step 2")
    assert [line["step"] for line in file.lines()] == [0, 1, 2]
    before = file.path.stat().st_ino
    file.restore(sealed, "step 2")
    assert file.path.stat().st_ino == before, "nothing to forget, nothing written"


def test_metrics_file_when_any_byte_of_a_saved_line_is_another_then_the_line_is_named(saved):
    file, sealed = saved
    whole = file.path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for place in range(ends[2] + 1):
        data = bytearray(whole)
        data[place] ^= 1
        file.path.write_bytes(data)
        with pytest.raises(Damaged) as caught:
            file.restore(sealed, "step 2")
        line = 1 + sum(end < place for end in ends)
        assert str(caught.value).startswith(f"{file.path}:{line}: is not as it was written before step 2 was saved; ")


@pytest.mark.parametrize(("left", "found"), [(0, "is missing"), (2, "ends after 2 lines")])
def test_metrics_file_when_lines_are_missing_then_refused(left, found, saved):
    file, sealed = saved
    lines = file.path.read_text().splitlines(keepends=True)[:left]
    file.path.write_text("".join(lines)) if lines else file.path.unlink()
    with pytest.raises(Damaged, match=f"metrics.jsonl: {found}, step 2 was saved after 3; put the file back"):
        file.restore(sealed, "step 2")


@pytest.mark.parametrize("bad", ["{", "\0\0", "3", "[]", "\x80"])
def test_lines_when_one_in_the_middle_is_broken_then_it_is_named_and_not_the_end(bad, saved):
    file, _ = saved
    lines = file.path.read_bytes().splitlines(keepends=True)
    file.path.write_bytes(b"".join([*lines[:2], bad.encode("latin-1") + b"\n", *lines[2:]]))
    for read in (file.lines, lambda: file.rewind(9), lambda: file.replace(9, [])):
        with pytest.raises(Damaged, match=r"metrics.jsonl:3: is not as it was written: no JSON object"):
            read()
    assert MetricsFile(file.path.with_name("none")).lines() == []
