"""Whether a run fits: what is refused, what is only warned of, and that both come before any model is loaded."""

import json
from types import SimpleNamespace

import pytest

from prefopt.errors import TrainError
from prefopt.planner import fit
from prefopt.planner.memory import GB
from prefopt.settings import parse
from prefopt.training.runtime import Runtime
from tests.fork_server import ROOT
from tests.planner.test_plan import BIG, llama


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """An 8B Llama's config, which is all that a plan reads."""
    return llama(tmp_path_factory.mktemp("big"), BIG)


def config(big, *flags):
    return parse(["--method", "dpo", "--model.path", big, "--data.train", "pairs.jsonl", *flags])


def test_run_whose_weights_and_state_alone_are_more_than_the_gpu_is_refused_with_what_to_change(big):
    flags = ("--train.mixed_precision", "bf16", "--model.gradient_checkpointing", "true", "--train.micro_batch", "2")
    with pytest.raises(TrainError) as error:
        fit.check(config(big, *flags), "ddp", 8, int(80 * GB))
    # 4 bytes each of weights, gradients and reference, 8 of AdamW's state
    assert str(error.value).startswith(
        "model.path: weights, gradients, optimizer states and reference take 161 GB per rank under ddp, "
        "the GPU has 80 GB; "
    )
    assert "; recommended: zero" in str(error.value)
    assert "(--config_file configs/accelerate/zero" in str(error.value)
    assert str(error.value).endswith("(--train.check_memory false starts regardless)")
    assert "\n" not in str(error.value)


def test_run_that_no_backend_fits_is_refused_with_the_settings_to_change(big):
    with pytest.raises(TrainError, match=r"no backend fits; change --train.micro_batch 1, .*: .* then needs"):
        fit.check(config(big), "single process", 1, int(24 * GB))


def test_refusal_leaves_room_for_what_a_plan_may_be_off(big):
    held = 161e9
    assert fit.check(config(big), "ddp", 8, int(0.86 * held)).startswith("warning: ")
    with pytest.raises(TrainError):
        fit.check(config(big), "ddp", 8, int(0.84 * held))


def test_rows_as_long_as_they_may_be_are_no_reason_to_refuse_but_to_warn(big):
    flags = ("--lora.r", "8", "--model.dtype", "bfloat16", "--data.max_length", "8192", "--train.micro_batch", "16")
    warning = fit.check(config(big, *flags), "ddp", 8, int(80 * GB))
    assert warning.startswith("warning: with sequences of data.max_length a rank needs about ")
    assert "; if the run is out of memory: " in warning
    assert "--train.micro_batch 1" in warning


def test_run_that_fits_has_no_warning(big):
    flags = ("--train.mixed_precision", "bf16", "--model.gradient_checkpointing", "true", "--train.micro_batch", "2")
    assert fit.check(config(big, *flags), "zero3", 8, int(80 * GB)) is None


def test_state_that_may_be_elsewhere_is_not_held_against_a_run(big):
    paged = config(big, "--optim.name", "paged_adamw_8bit", "--model.dtype", "bfloat16")
    plain = config(big, "--optim.name", "adamw_8bit", "--model.dtype", "bfloat16")
    assert fit.check(paged, "ddp", 8, int(45 * GB)).startswith("warning: ")  # 48 GB of the rest
    with pytest.raises(TrainError):
        fit.check(plain, "ddp", 8, int(45 * GB))


def test_model_that_no_plan_can_be_made_of_is_left_to_the_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    warning = fit.check(config(str(tmp_path)), "ddp", 8, int(80 * GB))
    assert warning.startswith("warning: the memory of this model cannot be planned: ")
    assert "\n" not in warning


def deepspeed(backend, settings):
    """A runtime under DeepSpeed, as far as it is asked."""
    known = SimpleNamespace(backend=backend, deepspeed_settings=settings)
    return SimpleNamespace(backend=backend, offloaded=Runtime.offloaded.fget(known))


@pytest.mark.parametrize(
    ("name", "backend"), [("zero2", "zero2"), ("zero3", "zero3"), ("zero3_offload", "zero3 offload")]
)
def test_deepspeed_by_its_file_is_the_backend_of_the_plan(name, backend):
    settings = json.loads((ROOT / f"configs/deepspeed/{name}.json").read_text())
    assert fit.backend_of(deepspeed(name.partition("_")[0], settings)) == backend


def test_offload_that_a_plan_does_not_know_is_not_planned(monkeypatch):
    settings = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert fit.backend_of(deepspeed("zero2", settings)) is None
    assert fit.backend_of(SimpleNamespace(backend="fsdp2")) == "fsdp2"
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert fit.backend_of(SimpleNamespace(backend="fsdp2")) is None


def test_run_on_a_gpu_that_is_too_small_ends_in_one_line_before_any_model_is_loaded_unless_told_to_go_on(
    server, command, tmp_path
):
    """The one thing that is not real is the size of the device: this machine may have no GPU."""
    (tmp_path / "start.py").write_text(
        "import sys\n"
        "from prefopt.training import preflight\n"
        "preflight.gpu_memory = lambda device: 1000\n"
        "from prefopt import cli\n"
        "sys.exit(cli.train(sys.argv[1:]))\n"
    )

    def ended(*flags):
        argv = command("dpo", tmp_path / "run", train__max_steps=1)
        return server.python([str(tmp_path / "start.py"), *argv, *flags], tmp_path)

    refused = ended()
    assert refused.status == 2
    assert refused.err.splitlines()[-1].startswith(
        "error: model.path: weights, gradients, optimizer states and reference take "
    )
    assert "policy: " not in refused.out
    assert ended("--train.check_memory", "false").status == 0
