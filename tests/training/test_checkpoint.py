import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefopt.errors import TrainError
from prefopt.settings import OptimConfig
from prefopt.storage import Damaged, Unreadable
from prefopt.training import checkpoint
from prefopt.training.optimizers import make_optimizer


@pytest.fixture
def root(tmp_path):
    return tmp_path / "checkpoints"


def save(root, step, keep_last=9, write=None):
    def write_weights(folder):
        save_file({"w": torch.full((50,), float(step))}, folder / "model.safetensors")

    return checkpoint.save(root, step, write or write_weights, {"step": step}, keep_last)


def names(root):
    return sorted(path.name for path in root.iterdir())


def missing(folder):
    (folder / "model.safetensors").unlink()
    return "model.safetensors is missing"


def truncated(folder):
    path = folder / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    return f"model.safetensors has {size - 1} bytes, expected {size}"


def flipped(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return "model.safetensors does not match its hash"


def no_manifest(folder):
    (folder / "manifest.json").unlink()
    return "manifest.json is missing or damaged"


def cut_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-9])
    return "manifest.json is missing or damaged"


def odd_manifest(folder):
    (folder / "manifest.json").write_text('["model.safetensors"]')
    return "manifest.json is missing or damaged"


def empty_manifest(folder):
    (folder / "manifest.json").write_text("{}")
    return "manifest.json is missing or damaged"


DAMAGE = [missing, truncated, flipped, no_manifest, cut_manifest, odd_manifest, empty_manifest]


@pytest.mark.parametrize("spoil", DAMAGE)
def test_latest_when_the_newest_is_damaged_then_gives_the_one_before_and_says_so(spoil, root):
    good, bad = save(root, 1), save(root, 2)
    found = spoil(bad)
    said = []
    assert checkpoint.latest(root, said.append) == good
    assert said == [f"{bad}: damaged checkpoint skipped: {found}"]


def test_latest_when_all_are_damaged_or_none_is_there_then_gives_none(root):
    assert checkpoint.latest(root) is None
    missing(save(root, 1))
    flipped(save(root, 2))
    assert checkpoint.latest(root) is None


def test_save_when_more_than_keep_last_then_drops_the_oldest(root):
    for step in (1, 2, 10, 100):
        save(root, step, keep_last=2)
    assert names(root) == ["step_00000010", "step_00000100"]
    assert checkpoint.load_state(root / "step_00000010") == {"step": 10}


def test_clean_when_folders_are_half_written_then_removes_them_and_nothing_else(root):
    save(root, 3)
    for name in (".writing-step_00000009", ".writing-mine", ".writing-step_00000009_mine"):
        (root / name).mkdir()
    checkpoint.clean(root)
    assert names(root) == [".writing-mine", ".writing-step_00000009_mine", "step_00000003"]


def test_save_after_a_damaged_one_was_passed_over_then_drops_it_and_not_before(root):
    good = save(root, 3)
    flipped(save(root, 6))
    assert checkpoint.latest(root) == good
    checkpoint.clean(root)
    assert names(root) == ["step_00000003", "step_00000006"]
    save(root, 4)
    assert names(root) == ["step_00000003", "step_00000004"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "checkpoints"])
def test_latest_when_a_file_cannot_be_read_just_now_then_stops_and_nothing_is_deleted(name, number, root, unreadable):
    for step in (3, 6):
        save(root, step)
    unreadable(name, number)
    with pytest.raises(Unreadable, match=f"{name}: cannot be read just now: {os.strerror(number)}; nothing was del"):
        checkpoint.latest(root)
    assert checkpoint.last_good(root) is None  # at the end of an error's line
    unreadable(None)
    assert names(root) == ["step_00000003", "step_00000006"]
    assert checkpoint.latest(root) == root / "step_00000006"


def test_folders_of_other_names_are_neither_continued_from_nor_dropped(root):
    """Copies that a user has made, at the end of the alphabet and in the middle of it."""
    save(root, 4)
    theirs = ["step_00000004_mine", "step_00000004.bak", "step_4", "step_000000009", "step_99999999x", "best"]
    for name in theirs:
        shutil.copytree(root / "step_00000004", root / name)
    for step in (8, 12):
        save(root, step, keep_last=1)
        assert checkpoint.latest(root) == root / f"step_{step:08d}"
    checkpoint.drop_all(root)
    assert names(root) == sorted(theirs)
    assert all(checkpoint.damage(root / name) is None for name in theirs)


def test_drop_when_a_user_has_put_files_into_a_checkpoint_then_these_stay(root):
    (save(root, 1) / "notes.txt").write_text("the one that I want to look at")
    save(root, 2, keep_last=1)
    assert [path.name for path in (root / "step_00000001").iterdir()] == ["notes.txt"]
    elsewhere = root.parent / "other_disk"
    shutil.move(root / "step_00000002", elsewhere)
    (root / "step_00000002").symlink_to(elsewhere)
    assert checkpoint.latest(root) == root / "step_00000002"
    save(root, 3, keep_last=1)
    assert names(root) == ["step_00000001", "step_00000003"]
    assert checkpoint.damage(elsewhere) is None


@pytest.mark.parametrize("spoil", [flipped, truncated, cut_manifest])
def test_copy_of_a_damaged_model_is_refused_since_its_own_manifest_would_hide_it(spoil, root, tmp_path):
    folder, into = root / "model", tmp_path / "copy"
    checkpoint.export(folder, lambda place: save_file({"w": torch.ones(5)}, place / "model.safetensors"))
    into.mkdir()
    checkpoint.copy(folder, into)
    assert [path.name for path in into.iterdir()] == ["model.safetensors"]
    spoil(folder)
    with pytest.raises(Damaged, match=f"{folder}: m.* (hash|bytes|damaged)"):
        checkpoint.copy(folder, into)


def test_export_when_its_place_holds_what_is_not_ours_then_that_is_moved_and_named(root):
    folder = root / "model"

    def write(into):
        save_file({"w": torch.ones(5)}, into / "model.safetensors")

    assert checkpoint.export(folder, write) is None
    (folder / "notes.txt").write_text("mine")
    assert checkpoint.export(folder, write) == root / "model.before-1"
    assert [path.name for path in (root / "model.before-1").iterdir()] == ["notes.txt"]
    (folder / "manifest.json").write_text("{")  # what is ours is not known now
    assert checkpoint.export(folder, write) == root / "model.before-2"
    assert (root / "model.before-2" / "model.safetensors").exists()
    assert checkpoint.damage(folder) is None


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_save_when_the_disk_is_full_then_the_one_before_is_named_and_kept(failure, root):
    good = save(root, 1, keep_last=1)

    def write(folder):
        (folder / "half").touch()
        raise failure

    with pytest.raises(TrainError) as caught:
        save(root, 2, keep_last=1, write=write)
    assert str(caught.value) == (
        f"{root}/step_00000002: not written: {failure}; the last good checkpoint is {good} (free space and run again)"
    )
    assert names(root) == ["step_00000001"]
    assert checkpoint.damage(good) is None


def test_save_when_a_writer_has_a_fault_of_its_own_then_it_is_not_called_a_full_disk(root):
    def write(folder):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save(root, 1, write=write)
    assert names(root) == []


class Odd(torch.optim.Optimizer):
    """A state of all kinds: small whole numbers, float64 over float32, lists, what is shared, what is no tensor."""

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.table = torch.arange(3.0)

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"] + self.param_groups[1]["params"]:
            state = self.state[p]
            if not state:
                state |= {"mean": p.double() / 3, "count": torch.zeros(2, dtype=torch.int16), "table": self.table}
                state |= {"nested": {"first": True, "none": None}, "history": [torch.zeros_like(p), 0.1], "big": 1e300}
            assert state["table"].tolist() == [0, 1, 2]
            state["mean"].mul_(0.9).add_(p.grad, alpha=1 / 7)
            state["count"] += 1
            state["history"][1] *= 1.1
            state["history"][0] += state["history"][1] * p.grad
            assert state["nested"] == {"first": True, "none": None}
            p -= (state["mean"] + state["history"][0]).float() * float(state["count"][0])


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("adamw", {}),
        ("adamw", {"amsgrad": True}),
        ("rmsprop", {"momentum": 0.9, "centered": True}),
        ("rmsprop", {}),
        ("sgd", {}),
        ("sgd", {"momentum": 0.9}),
        ("adamw_8bit", {"min_8bit_size": 1}),
        ("bitsandbytes.optim.PagedAdamW8bit", {"min_8bit_size": 1}),
        ("bitsandbytes.optim.Lion", {"optim_bits": 32}),
        ("adafactor", {}),
        ("torch.optim.NAdam", {}),
        ("torch.optim.Adagrad", {}),
        ("tests.training.test_checkpoint.Odd", {}),
    ],
)
def test_optimizer_when_saved_and_loaded_then_the_next_steps_are_bit_equal(name, args, tmp_path):
    if "bit" in name:
        pytest.importorskip("bitsandbytes")
    settings = OptimConfig(name=name, lr=0.1, weight_decay=0.01, args=args)
    generator = torch.Generator().manual_seed(0)
    gradients = [(torch.randn(3, 2, generator=generator), torch.randn(2, generator=generator)) for _ in range(6)]

    def module():
        torch.manual_seed(1)
        return torch.nn.Linear(2, 3), torch.nn.LayerNorm(2)

    def steps(parts, optimizer, some):
        for matrix, vector in some:
            parts[0].weight.grad, parts[0].bias.grad = matrix.clone(), torch.ones(3)
            parts[1].weight.grad, parts[1].bias.grad = vector.clone(), -vector
            optimizer.step()

    straight = torch.nn.ModuleList(module())
    optimizer = make_optimizer(settings, straight)
    steps(straight, optimizer, gradients[:3])
    checkpoint.save_optimizer(optimizer.state_dict()["state"], tmp_path / "optimizer.safetensors")
    weights = {key: value.clone() for key, value in straight.state_dict().items()}
    steps(straight, optimizer, gradients[3:])

    again = torch.nn.ModuleList(module())
    again.load_state_dict(weights)
    other = make_optimizer(settings, again)
    checkpoint.restore_optimizer(other, checkpoint.load_optimizer(tmp_path))
    steps(again, other, gradients[3:])
    for mine, theirs in zip(again.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_optimizer_when_its_file_is_of_another_version_then_refused_in_one_line(tmp_path):
    path = tmp_path / "optimizer.safetensors"
    save_file({"0.exp_avg": torch.zeros(3)}, path, metadata={"plain": "{}"})
    with pytest.raises(TrainError, match=r"^.*/optimizer.safetensors: written by an older version of prefopt, "):
        checkpoint.load_optimizer(tmp_path)


@pytest.mark.parametrize("spoil", [flipped, cut_manifest])
def test_run_when_its_newest_checkpoint_is_damaged_then_continues_from_the_one_before_to_the_same_weights(
    spoil, server, command, tmp_path
):
    straight, output = tmp_path / "straight", tmp_path / "run"
    assert server.train(command("dpo", straight, train__max_steps=10)).status == 0
    argv = command("dpo", output, train__max_steps=10)
    fault = {"at": "prefopt.training.trainer:Trainer._step", "count": 9, "do": "SIGKILL"}
    assert server.train(argv, fault).status < 0
    found = spoil(output / "checkpoints" / "step_00000006")
    ended = server.train(argv)
    assert ended.status == 0, ended.err
    assert f"{output}/checkpoints/step_00000006: damaged checkpoint skipped: {found}\n" in ended.out
    assert f"resuming from {output}/checkpoints/step_00000003\n" in ended.out
    mine, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (output, straight))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 11))
