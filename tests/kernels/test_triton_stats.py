"""Triton's kernels without a GPU: their numbers in Triton's interpreter, and their compilation for one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")

ROOT = Path(__file__).parents[2]


def test_the_kernels_give_the_written_formulas():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/kernels/triton_cases.py"]
    run = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "passed" in run.stdout


@pytest.mark.parametrize(
    ("stat", "bias", "head", "full"),
    [
        ("fp32", "*fp32", {"HAS_BIAS": False, "SCALE": 1.0, "CAP": 0.0}, False),
        ("fp32", "*bf16", {"HAS_BIAS": True, "SCALE": 0.5, "CAP": 30.0}, True),
        ("fp64", "*fp64", {"HAS_BIAS": True, "SCALE": 0.5, "CAP": 30.0}, True),
    ],
    ids=["plain_float32", "everything_bfloat16_bias", "everything_float64"],
)
def test_the_kernels_compile_for_a_gpu(stat, bias, head, full, tmp_path, monkeypatch):
    """Down to machine code for sm_90; the compiler comes with Triton and needs no GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from prefopt.kernels import triton_stats

    settings = head | {f"REF_{name}": value for name, value in head.items()}
    settings |= {
        "KL": True,
        "REVERSE": full,
        "ENTROPY": full,
        "STAT": getattr(tl, stat.replace("fp", "float")),
        "BLOCK": 2048,
    }
    types = {"tokens": "i32", "columns": "i32", "index_ptr": "*i64", "grad_ptr": "*bf16"}
    types |= {"bias_ptr": bias, "ref_bias_ptr": bias}
    for kernel, more in ((triton_stats._forward, {"HAS_REF": True}), (triton_stats._backward, {"LOGP": True})):
        constants = settings | more
        signature = {
            name: "constexpr" if name in constants else types.get(name, f"*{stat}") for name in kernel.arg_names
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert compiled.asm["ptx"]
        assert compiled.asm["cubin"]
