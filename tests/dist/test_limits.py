"""What cannot be done on a CPU stops with the error that docs/distributed.md quotes."""

import json

import pytest

from tests.fork_server import ROOT

PAGE = (ROOT / "docs/distributed.md").read_text()


def deepspeed(folder, **settings):
    """The environment that names ZeRO-3's settings with these ones, as a file; `aio` is beside them."""
    found = json.loads((ROOT / "configs/deepspeed/zero3.json").read_text())
    found |= {"aio": settings.pop("aio")} if "aio" in settings else {}
    found["zero_optimization"] |= settings
    (folder / "settings.json").write_text(json.dumps(found))
    return {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(folder / "settings.json")}


CASES = {
    "fsdp_offload_params: true": (
        "fsdp2",
        lambda folder: {"FSDP_OFFLOAD_PARAMS": "true"},
        "RuntimeError: Cannot access accelerator device when none is available.",
    ),
    '"zero_quantized_weights": true': (
        "zero3",
        lambda folder: deepspeed(folder, zero_quantized_weights=True),
        "This op had not been implemented on CPU backend.",
    ),
    '"zero_quantized_gradients": true': (
        "zero3",
        lambda folder: deepspeed(folder, zero_quantized_gradients=True),
        "ValueError: This op had not been implemented on CPU backend.",
    ),
    '"super_offload": true': (
        "zero3",
        lambda folder: deepspeed(folder, offload_optimizer={"device": "cpu", "super_offload": True}),
        "AssertionError: SuperOffload only supports NVIDIA CUDA GPUs, but found accelerator 'cpu'.",
    ),
    "use_cpu: true": (
        "zero3",
        lambda folder: {"ACCELERATE_USE_CPU": "true"},
        "error: launcher: DeepSpeed was requested, but the backend is ddp;",
    ),
}


@pytest.mark.parametrize(
    "asked", [pytest.param(asked, marks=() if "fsdp" in asked else pytest.mark.slow) for asked in CASES]
)
def test_what_needs_a_gpu_stops_with_the_error_that_the_page_quotes(asked, server, command, tmp_path):
    backend, environment, error = CASES[asked]
    row = next(line for line in PAGE.splitlines() if line.startswith("|") and asked in line)
    assert error in row
    ended = server.train(command("dpo", tmp_path / "run"), ranks=2, backend=backend, environment=environment(tmp_path))
    assert ended.status > 0
    said = ended.err + (server.folder / "err.txt1").read_text()  # the others are killed when the first one fails
    assert error in said
