"""Methods x (all weights, LoRA) x (live, kept, disabled adapter) under each backend, against one process.

One case of each backend runs with the others; the whole matrix in `make test-all`.
"""

import pytest
import torch
from safetensors.torch import load_file

from prefopt.training.metrics import read_lines
from tests.dist.test_backends import alone, update_gap  # noqa: F401 - a fixture
from tests.fork_server import BACKENDS

SGD = {"train__max_steps": 3, "train__save_every": 3, "eval__every": 3, "optim__name": "sgd", "optim__lr": 0.1}
SGD |= {"optim__schedule": "constant", "optim__warmup_steps": 0}
LORA = {"lora__r": 4, "lora__modules_to_save": "lm_head"}
WAYS = {
    "dpo": {},
    "tdpo": {},
    "sppo": {},
    "dpo, kept": {"reference__cache": "logps"},
    "tdpo, kept": {"reference__cache": "hidden", "reference__cache_dtype": "float32"},
    "dpo, lora": LORA,
    "tdpo, lora": LORA,
    "sppo, lora": LORA,
    "tdpo, lora, kept": {**LORA, "reference__cache": "hidden", "reference__cache_dtype": "float32"},
    "reward_model": {},
    "tdpo, moving": {"reference__sync_every": 2, "reference__sync_weight": 0.6, "train__max_steps": 5},
    "dpo, lora, moving": {**LORA, "reference__sync_every": 1, "train__max_steps": 4},
    "tdpo, grouped": {"train__group_by_length": True},
    "tdpo, recomputed": {"model__gradient_checkpointing": True},
}
FAST = [("zero3", "tdpo, lora"), ("fsdp2", "tdpo, kept")]
CASES = [
    pytest.param(backend, way, marks=() if (backend, way) in FAST else pytest.mark.slow)
    for backend in BACKENDS
    for way in WAYS
]


def trained(output):
    return load_file(next((output / "model").glob("*model.safetensors")))


def start_of(output, found, task):
    """What the trained weights were: an adapter's B is nothing, its A is drawn by the seed and is compared as it is."""
    base = load_file(task.model / "model.safetensors")
    return {name: base.get(name, base.get(name.removeprefix("base_model.model."), torch.zeros_like(w))) for name, w in found.items()}


@pytest.mark.parametrize(("backend", "way"), CASES)
def test_run_of_two_processes_is_the_run_of_one_whatever_is_trained(
    backend, way, server, command, task, alone, tmp_path  # noqa: F811
):
    settings = {**SGD, **WAYS[way]}
    method = way.partition(",")[0]
    straight = alone(method, **settings)
    if "kept" in way:
        settings["reference__cache_dir"] = tmp_path / "kept"
    ended = server.train(command(method, tmp_path / "run", **settings), ranks=2, backend=backend)
    assert ended.status == 0, ended.err
    assert f"world size 2, backend {backend}, device cpu" in ended.out
    lines = [read_lines(output / "metrics.jsonl") for output in (tmp_path / "run", straight)]
    for mine, other in zip(*lines, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5), mine["step"]
        if "grad_norm" in other:
            assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    expected, found = trained(straight), trained(tmp_path / "run")
    assert expected.keys() == found.keys()
    assert update_gap(expected, found, start_of(straight, expected, task)) <= 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_loss_curve_of_20_steps_is_that_of_one_process(optimizer, backend, server, command, alone, tmp_path):  # noqa: F811
    settings = {"train__max_steps": 20, "eval__every": 20, "optim__name": optimizer, "optim__lr": 1e-3}
    straight = alone("tdpo", **settings)
    ended = server.train(command("tdpo", tmp_path / "run", **settings), ranks=2, backend=backend)
    assert ended.status == 0, ended.err
    for mine, other in zip(*(read_lines(o / "metrics.jsonl") for o in (tmp_path / "run", straight)), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3), mine["step"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_run_in_bf16_is_near_the_run_of_one_process(backend, server, command, task, alone, tmp_path):  # noqa: F811
    settings = {**SGD, "train__mixed_precision": "bf16"}
    straight = alone("tdpo", **settings)
    ended = server.train(command("tdpo", tmp_path / "run", **settings), ranks=2, backend=backend)
    assert ended.status == 0, ended.err
    start = load_file(task.model / "model.safetensors")
    assert update_gap(trained(straight), trained(tmp_path / "run"), start) <= 5e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora",
    [{}, LORA, {"reference__sync_every": 2, "train__max_shard_mb": 0.02}, {"train__mixed_precision": "bf16"}],
    ids=["full", "lora", "moving", "bf16"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_run_when_killed_and_continued_under_the_same_backend_ends_bit_identical(
    backend, lora, server, command, tmp_path
):
    settings = {"train__max_steps": 8, **lora}
    stop = {"at": "prefopt.training.trainer:Trainer._step", "count": 6, "do": "SIGKILL"}
    for name in ("straight", "killed"):
        argv = command("tdpo", tmp_path / name, **settings)
        if name == "killed":
            assert server.train(argv, stop, ranks=2, backend=backend).status == -9
        ended = server.train(argv, ranks=2, backend=backend)
        assert ended.status == 0, ended.err
    files = [path.relative_to(tmp_path / "straight") for path in (tmp_path / "straight/model").glob("*.safetensors")]
    assert files
    for path in files:
        assert (tmp_path / "straight" / path).read_bytes() == (tmp_path / "killed" / path).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [("zero3", None), ("fsdp2", "zero2"), ("zero1", "fsdp2"), ("ddp", "zero3")])
def test_run_when_continued_with_other_processes_or_another_backend_goes_on_as_it_was(
    first, then, server, command, task, alone, tmp_path  # noqa: F811
):
    settings = {"train__max_steps": 8, "optim__args.eps": 1e-6}
    straight = alone("tdpo", **settings)
    argv = command("tdpo", tmp_path / "run", **settings)
    stop = {"at": "prefopt.training.trainer:Trainer._step", "count": 6, "do": "SIGKILL"}
    assert server.train(argv, stop, ranks=2, backend=first).status == -9
    ended = server.train(argv) if then is None else server.train(argv, ranks=2, backend=then)
    assert ended.status == 0, ended.err
    for mine, other in zip(*(read_lines(o / "metrics.jsonl") for o in (tmp_path / "run", straight)), strict=True):
        assert (mine["step"], mine.get("pairs"), mine.get("completion_tokens")) == (other["step"], other.get("pairs"), other.get("completion_tokens"))
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4), mine["step"]
    assert update_gap(trained(straight), trained(tmp_path / "run"), load_file(task.model / "model.safetensors")) <= 1e-2


@pytest.mark.parametrize("backend", ["zero3", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_merged_model_is_that_of_one_process(backend, server, command, task, alone, tmp_path):  # noqa: F811
    settings = {**SGD, **LORA, "lora__merge": True, "model__export_dtype": "float64"}
    straight = alone("dpo", **settings)
    ended = server.train(command("dpo", tmp_path / "run", **settings), ranks=2, backend=backend)
    assert ended.status == 0, ended.err
    expected, found = trained(straight), trained(tmp_path / "run")
    assert expected.keys() == found.keys()
    assert {value.dtype for value in found.values()} == {torch.float64}
    assert update_gap(expected, found, load_file(task.model / "model.safetensors")) <= 1e-3
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("backend", "settings", "line"),
    [
        ("zero2", {"train__mixed_precision": "fp16"}, "train.mixed_precision: found fp16, which is not supported under zero2, expected bf16 or no"),
        ("fsdp2", {"model__offload_activations": True}, "model.offload_activations: found true, which is not supported under fsdp2, expected false, or another backend (configs/accelerate/ddp.yaml)"),
    ],
)
def test_what_an_backend_cannot_do_is_refused_in_one_line(backend, settings, line, server, command, tmp_path):
    ended = server.train(command("dpo", tmp_path / "run", **settings), ranks=2, backend=backend)
    assert ended.status == 2
    assert ended.err.splitlines()[-1] == f"error: {line}"


@pytest.mark.parametrize(
    ("backend", "lora"),
    [
        ("zero3", LORA),
        pytest.param("zero3", {}, marks=pytest.mark.slow),
        pytest.param("fsdp2", LORA, marks=pytest.mark.slow),
        ("fsdp2", {}),
        pytest.param("zero2", {}, marks=pytest.mark.slow),
    ],
)
def test_samples_of_two_processes_are_those_of_one(backend, lora, server, command, alone, tmp_path):  # noqa: F811
    settings = {**SGD, **lora, "eval__generate": 5, "generate__max_tokens": 12, "generate__batch": 3}
    straight = alone("tdpo", **settings)
    ended = server.train(command("tdpo", tmp_path / "run", **settings), ranks=2, backend=backend)
    assert ended.status == 0, ended.err
    tables = [read_lines(output / "samples.jsonl") for output in (tmp_path / "run", straight)]
    assert len(tables[1]) == 10  # at the start and at the end
    for mine, other in zip(*tables, strict=True):
        assert mine.pop("kl") == pytest.approx(other.pop("kl"), rel=1e-3, abs=1e-6)
        assert mine == other
    lines = [[line for line in read_lines(o / "metrics.jsonl") if line["split"] == "eval"] for o in (tmp_path / "run", straight)]
    for mine, other in zip(*lines, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["samples/kl"] == pytest.approx(other["samples/kl"], rel=1e-3, abs=1e-6)
        assert mine["samples/entropy"] == pytest.approx(other["samples/entropy"], rel=1e-4)
    assert lines[1][-1]["samples/kl"] > 1e-4
