"""Triton's kernels in its interpreter; run by test_triton_stats.py in a process where TRITON_INTERPRET is set."""

import pytest
import torch

from prefopt.kernels import token_stats as module
from prefopt.kernels import triton_stats
from tests.kernels.test_token_stats import WANT, V, case, compare, gradients, kernel, oracle, scalar

# numpy warns of 0 * inf in lanes that the kernels then mask out
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TILES = {"one_tile": {}, "uneven_tiles": {"token_tile": 7, "vocab_tile": 12}}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A tile is several blocks, the last of them not full."""
    monkeypatch.setattr(triton_stats, "_BLOCK", 8)
    assert module._implementation(torch.device("cpu")) is triton_stats


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_values_and_gradients_equal_the_written_formulas(tiles, bias):
    c = case(tokens=5)
    if not bias:
        c |= {"bias": None, "ref_bias": None}
    compare(c, tiles, scale=0.6, softcap=1.5, ref_scale=1.4, ref_softcap=2.5)


@pytest.mark.parametrize(
    "want", [(), ("ref_logp",), ("ref_logp", "kl"), ("entropy",), ("reverse_kl",), ("log_sum_p2",)], ids="+".join
)
def test_subsets_of_the_statistics(want):
    compare(case(tokens=5), TILES["uneven_tiles"], want)


def test_float32_and_no_tokens():
    c = case(torch.float32, tokens=6)
    exact = {
        k: v.detach().double().requires_grad_(v.requires_grad) if v.is_floating_point() else v for k, v in c.items()
    }
    found, expected = kernel(c, **TILES["uneven_tiles"]), oracle(exact)
    for name in found:
        assert found[name].dtype == torch.float32
        assert (found[name] - expected[name]).abs().max() < 2e-5
    empty = case(tokens=0)
    assert all(g.abs().sum() == 0 for g in gradients(empty, kernel(empty)))


def test_masked_entries_count_nothing():
    c = case(tokens=5)
    masked = torch.arange(12, 24)  # the second tile
    kept = torch.tensor([v for v in range(V) if v not in masked])
    c["labels"] = kept[torch.arange(5)]
    c["bias"] = c["bias"].detach().index_fill(0, masked, float("-inf")).requires_grad_()
    c["ref_bias"] = c["ref_bias"].index_fill(0, masked, float("-inf"))
    part = dict(c) | {"labels": torch.arange(5)}
    for name in ("weight", "bias", "ref_weight", "ref_bias"):
        part[name] = c[name].detach()[kept].requires_grad_(c[name].requires_grad)
    found, expected = kernel(c, WANT, **TILES["uneven_tiles"]), oracle(part)
    for name in found:
        assert (found[name] - expected[name]).abs().max() < 1e-11
    mine = torch.autograd.grad(scalar(found), c["hidden"])[0]
    assert (mine - torch.autograd.grad(scalar(expected), part["hidden"])[0]).abs().max() < 1e-11


def test_a_label_outside_the_vocabulary_gives_nan():
    c = case(tokens=4)
    c["labels"][3] = V
    assert kernel(c, ("ref_logp",))["logp"].isnan().nonzero().flatten().tolist() == [3]
