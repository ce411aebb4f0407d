"""The kernel against the formulas as they are written: log_softmax over all logits in float64, autograd's gradients."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prefopt.kernels.token_stats import ORDER, token_stats

N, H, REF_H, V = 23, 6, 5, 29
WANT = ("ref_logp", "kl", "reverse_kl", "entropy", "log_sum_p2")
TILES = {
    "one_tile": {},
    "one_tile_recomputed": {"cache_mb": 0},
    "uneven_tiles": {"token_tile": 5, "vocab_tile": 7},
    "uneven_tiles_recomputed": {"token_tile": 5, "vocab_tile": 7, "cache_mb": 0},
    "vocabulary_tiles": {"token_tile": 64, "vocab_tile": 10},
    "single_logits": {"token_tile": 1, "vocab_tile": 1},
}


def case(dtype=torch.float64, tokens=N, seed=0):
    torch.manual_seed(seed)
    return {
        "hidden": torch.randn(tokens, H, dtype=dtype, requires_grad=True),
        "weight": torch.randn(V, H, dtype=dtype, requires_grad=True),
        "bias": torch.randn(V, dtype=dtype, requires_grad=True),
        "ref_hidden": torch.randn(tokens, REF_H, dtype=dtype),
        "ref_weight": torch.randn(V, REF_H, dtype=dtype),
        "ref_bias": torch.randn(V, dtype=dtype),
        "labels": torch.randint(V, (tokens,)),
    }


def logits(hidden, weight, bias, scale, softcap):
    z = scale * (hidden @ weight.T + (0 if bias is None else bias))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def oracle(c, scale=1.0, softcap=None, ref_scale=1.0, ref_softcap=None):
    logp = logits(c["hidden"], c["weight"], c["bias"], scale, softcap).log_softmax(-1)
    ref = logits(c["ref_hidden"], c["ref_weight"], c["ref_bias"], ref_scale, ref_softcap).log_softmax(-1)
    p, q, index = logp.exp(), ref.exp(), c["labels"][:, None]
    return {
        "logp": logp.gather(1, index).squeeze(1),
        "ref_logp": ref.gather(1, index).squeeze(1),
        "kl": (q * (ref - logp)).sum(-1),
        "reverse_kl": (p * (logp - ref)).sum(-1),
        "entropy": -(p * logp).sum(-1),
        "log_sum_p2": p.square().sum(-1).log(),
    }


def kernel(c, want=WANT, **more):
    c = dict(c)
    stats = token_stats(c.pop("hidden"), c.pop("weight"), c.pop("labels"), want=want, **c, **more)
    return {name: getattr(stats, name) for name in ORDER if getattr(stats, name) is not None}


def scalar(stats, seed=1):
    """Each statistic of each token with a weight of its own; the reference's log-probability has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for name in ORDER:
        if name in stats:
            weights = torch.randn(stats[name].shape, generator=generator, dtype=torch.float64)
            total = total + (stats[name] * weights.to(stats[name].dtype)).sum() * (name != "ref_logp")
    return total


def gradients(c, stats):
    inputs = [value for value in c.values() if value is not None and value.requires_grad]
    return torch.autograd.grad(scalar(stats), inputs)


def assert_close(found, expected, tolerance=1e-11):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).detach().abs().max() <= tolerance


def compare(c, tiles, want=WANT, tolerance=1e-11, **head):
    found, expected = kernel(c, want, **head, **tiles), oracle(c, **head)
    assert set(found) == {"logp", *want}
    expected = {name: value for name, value in expected.items() if name in found}
    for name in found:
        assert_close([found[name]], [expected[name]], tolerance)
    assert_close(gradients(c, found), gradients(c, expected), tolerance)


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize(
    "head",
    [
        {},
        {"scale": 0.6, "ref_scale": 1.4},
        {"softcap": 1.5, "ref_softcap": 2.5},
        {"scale": 0.6, "softcap": 1.5, "ref_scale": 1.4, "ref_softcap": 2.5},
    ],
    ids=["plain", "scale", "softcap", "both"],
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_values_and_gradients_equal_the_written_formulas(tiles, head, bias):
    c = case()
    if not bias:
        c |= {"bias": None, "ref_bias": None}
    compare(c, tiles, **head)


COMBINATIONS = [some for n in range(5) for some in itertools.combinations(WANT[:4], n)]


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize("want", [*COMBINATIONS, ("log_sum_p2",), WANT], ids="+".join)
def test_every_combination_of_statistics(tiles, want):
    compare(case(), tiles, want)


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize("name", ["logp", "kl", "reverse_kl", "entropy", "log_sum_p2"])
def test_one_statistic_used_alone_though_all_are_computed(tiles, name):
    c = case()
    inputs = (c["hidden"], c["weight"], c["bias"])
    found = torch.autograd.grad(kernel(c, **tiles)[name].square().sum(), inputs)
    assert_close(found, torch.autograd.grad(oracle(c)[name].square().sum(), inputs))


@pytest.mark.parametrize("cache_mb", [0, 1], ids=["recomputed", "kept"])
@pytest.mark.parametrize("tiles", [{}, {"token_tile": 2, "vocab_tile": 10}], ids=["one_tile", "uneven_tiles"])
def test_gradcheck(tiles, cache_mb):
    c = case(tokens=3)
    tiles = tiles | {"cache_mb": cache_mb}

    def function(hidden, weight, bias):
        stats = kernel(c | {"hidden": hidden, "weight": weight, "bias": bias}, softcap=3.0, scale=0.7, **tiles)
        return stats["logp"], stats["kl"], stats["reverse_kl"], stats["entropy"]

    assert torch.autograd.gradcheck(function, (c["hidden"], c["weight"], c["bias"]))


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_float32_stays_close_to_float64(tiles):
    c = case(torch.float32)
    exact = {
        k: v.detach().double().requires_grad_(v.requires_grad) if v.is_floating_point() else v for k, v in c.items()
    }
    found, expected = kernel(c, **tiles), oracle(exact)
    assert all(value.dtype == torch.float32 for value in found.values())
    for name in found:
        assert_close([found[name].double()], [expected[name]], 2e-5)
    assert_close([g.double() for g in gradients(c, found)], gradients(exact, expected), 1e-4)


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_policy_equal_to_reference_has_no_kl_and_no_kl_gradient(tiles):
    c = case(torch.float32)
    c |= {"ref_hidden": c["hidden"].detach().clone(), "ref_weight": c["weight"], "ref_bias": c["bias"].detach()}
    stats = kernel(c, **tiles)
    assert stats["kl"].abs().max() == 0
    assert stats["reverse_kl"].abs().max() == 0
    assert torch.equal(stats["logp"], stats["ref_logp"])
    assert torch.autograd.grad(stats["kl"].sum(), c["hidden"])[0].abs().max() < 1e-5


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_a_head_shared_by_both_models_gets_the_policys_gradient_only(tiles):
    c = case()
    c |= {"ref_hidden": torch.randn(N, H, dtype=torch.float64), "ref_weight": c["weight"], "ref_bias": c["bias"]}
    expected = oracle(c | {"ref_weight": c["weight"].detach(), "ref_bias": c["bias"].detach()})
    inputs = (c["hidden"], c["weight"], c["bias"])
    found = kernel(c, **tiles)
    assert_close(
        torch.autograd.grad(scalar(found), inputs, retain_graph=True), torch.autograd.grad(scalar(expected), inputs)
    )


def test_nothing_flows_to_the_reference():
    c = case()
    for name in ("ref_hidden", "ref_weight", "ref_bias"):
        c[name].requires_grad_()
    stats = kernel(c)
    scalar(stats).backward()
    assert c["hidden"].grad is not None
    assert all(c[name].grad is None for name in ("ref_hidden", "ref_weight", "ref_bias"))
    assert not stats["ref_logp"].requires_grad


class Sizes(TorchDispatchMode):
    """The size of every tensor that an operator makes, and the number of matrix products."""

    def __init__(self):
        super().__init__()
        self.shapes = []
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.shapes.append(tuple(value.shape))
        return out


def shapes_made(hidden, weight, ref_hidden, ref_weight, **tiles):
    with Sizes() as sizes:
        labels = torch.zeros(hidden.shape[0], dtype=torch.int64)
        stats = token_stats(hidden, weight, labels, ref_hidden=ref_hidden, ref_weight=ref_weight, want=WANT, **tiles)
        (stats.logp + stats.kl + stats.reverse_kl + stats.entropy).sum().backward()
    return sizes.shapes


def test_no_tensor_larger_than_a_tile_is_made():
    tokens, vocab, width = 400, 900, 4
    hidden, ref_hidden = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    weight, ref_weight = torch.randn(vocab, width, requires_grad=True), torch.randn(vocab, width)
    shapes = shapes_made(hidden, weight, ref_hidden, ref_weight, token_tile=50, vocab_tile=100)
    assert (50, 100) in shapes
    largest = max(torch.Size(shape).numel() for shape in shapes)
    assert largest <= 50 * 100
    assert weight.grad is not None


def test_a_small_vocabulary_takes_more_tokens_but_no_more_logits_per_tile():
    hidden, ref_hidden = torch.randn(400, 2, requires_grad=True), torch.randn(400, 2)
    weight, ref_weight = torch.randn(10, 2), torch.randn(10, 2)
    shapes = shapes_made(hidden, weight, ref_hidden, ref_weight, token_tile=10, vocab_tile=40)
    assert (40, 10) in shapes
    assert max(torch.Size(shape).numel() for shape in shapes) <= 400 * 2


@pytest.mark.parametrize(("cache_mb", "recomputed"), [(0, 2), (1, 0)], ids=["recomputed", "kept"])
def test_a_frozen_head_has_no_weight_gradient_computed(cache_mb, recomputed):
    products = {}
    for frozen in (False, True):
        c = case()
        if frozen:
            c |= {"weight": c["weight"].detach(), "bias": c["bias"].detach()}
        total = scalar(kernel(c, cache_mb=cache_mb))
        with Sizes() as sizes:
            found = torch.autograd.grad(total, c["hidden"])
        products[frozen] = sizes.products
        assert_close(found, torch.autograd.grad(scalar(oracle(c)), c["hidden"]))
    assert products[True] == recomputed + 1  # logits of policy and reference; the hidden gradient
    assert products[False] == recomputed + 2  # and the weight gradient


def test_logits_are_kept_while_the_budget_lasts_and_the_rest_is_computed_again():
    torch.manual_seed(0)
    c = {"hidden": torch.randn(64, 4, requires_grad=True), "weight": torch.randn(6000, 4, requires_grad=True)}
    c |= {"ref_hidden": torch.randn(64, 4), "ref_weight": torch.randn(6000, 4), "labels": torch.zeros(64).long()}
    tile = {"token_tile": 64, "vocab_tile": 1024}  # 6 tiles of a quarter MiB (the last is smaller)
    expected = None
    for want, cache_mb, again in [
        (("ref_logp",), 0, 6),
        (("ref_logp",), 1, 2),  # of the policy alone: the reference's tile has no part in the gradient
        (("ref_logp",), 2, 0),
        (("ref_logp", "kl"), 1, 8),
        (("ref_logp", "kl"), 3, 0),
    ]:
        stats = kernel(c, want, cache_mb=cache_mb, **tile)
        total = stats["logp"].sum() + sum(stats[name].sum() for name in want if name == "kl")
        with Sizes() as sizes:
            found = torch.autograd.grad(total, (c["hidden"], c["weight"]), retain_graph=True)
        assert sizes.products == again + 12, (want, cache_mb)
        twice = torch.autograd.grad(total, (c["hidden"], c["weight"]))
        assert all(torch.equal(a, b) for a, b in zip(found, twice, strict=True))
        if "kl" not in want:
            expected = expected or found
            assert_close(found, expected, 1e-4)
    with torch.no_grad(), Sizes() as sizes:
        kernel(c, ("ref_logp", "kl"), **tile)
    assert max(torch.Size(shape).numel() for shape in sizes.shapes) <= 64 * 1024


def test_a_frozen_body_has_no_hidden_gradient_computed():
    c = case()
    c["hidden"] = c["hidden"].detach()
    inputs = (c["weight"], c["bias"])
    assert_close(torch.autograd.grad(scalar(kernel(c)), inputs), torch.autograd.grad(scalar(oracle(c)), inputs))


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_no_tokens_keep_the_graph_and_give_zero_gradients(tiles):
    c = case(tokens=0)
    stats = kernel(c, **tiles)
    assert all(value.shape == (0,) for value in stats.values())
    total = scalar(stats)
    assert total.requires_grad
    for found, leaf in zip(gradients(c, stats), (c["hidden"], c["weight"], c["bias"]), strict=True):
        assert found.shape == leaf.shape
        assert not found.any()


@pytest.mark.parametrize("low", [float("-inf"), torch.finfo(torch.float32).min, -1e4])
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_masked_entries_count_nothing_and_give_no_nan(tiles, low):
    """Entries that both heads mask: the statistics are those of the vocabulary without them."""
    c = case()
    masked = torch.tensor([0, 1, 2, 3, 4, 5, 6, 13, 28])  # one tile of seven is all masked
    kept = torch.tensor([v for v in range(V) if v not in masked])
    inf = torch.zeros(V, dtype=torch.float64).index_fill(0, masked, low)
    c["labels"] = kept[torch.randint(len(kept), (N,))]
    part = dict(c)
    for name in ("weight", "bias", "ref_weight", "ref_bias"):
        part[name] = c[name].detach()[kept].requires_grad_(c[name].requires_grad)
    part["labels"] = torch.searchsorted(kept, c["labels"])
    c["bias"] = (c["bias"].detach() + inf).requires_grad_()
    c["ref_bias"] = c["ref_bias"] + inf
    found, expected = kernel(c, **tiles), oracle(part)
    for name in found:
        assert_close([found[name]], [expected[name]])
    hidden, weight, bias = gradients(c, found)
    part_hidden, part_weight, part_bias = gradients(part, expected)
    assert_close((hidden, weight[kept], bias[kept]), (part_hidden, part_weight, part_bias))
    assert not weight[masked].any()
    assert not bias[masked].any()


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_a_logit_that_underflows_in_float32_gives_finite_statistics(tiles):
    c = case(torch.float32)
    low = torch.zeros(V).index_fill(0, torch.tensor([3]), -400.0)
    c["ref_bias"] = c["ref_bias"] + low
    c["labels"] = c["labels"].clone().index_fill_(0, torch.tensor([0]), 3)
    stats = kernel(c, ("ref_logp", "kl"), **tiles)
    assert all(value.isfinite().all() for value in stats.values())
    assert stats["ref_logp"][0] < -300
    assert all(g.isfinite().all() for g in gradients(c, stats))


def test_a_constant_added_to_all_logits_changes_nothing():
    c = case()
    shifted = c | {"bias": c["bias"] + 5.0, "ref_bias": c["ref_bias"] - 3.0}
    for tiles in TILES.values():
        before, after = kernel(c, **tiles), kernel(shifted, **tiles)
        for name in before:
            assert_close([after[name]], [before[name]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_half_precision_inputs_give_float32_statistics(tiles, dtype):
    c = case(dtype)
    stats = kernel(c, **tiles)
    assert all(value.dtype == torch.float32 for value in stats.values())
    # the operands are what they are; nothing is rounded to their dtype after them
    exact = oracle({k: v.detach().double() if v.is_floating_point() else v for k, v in c.items()})
    for name in stats:
        assert_close([stats[name].double()], [exact[name]], 2e-5)
    for grad, leaf in zip(gradients(c, stats), (c["hidden"], c["weight"], c["bias"]), strict=True):
        assert grad.dtype == dtype
        wide = {k: v.detach().double() if v.is_floating_point() else v for k, v in c.items()}
        key = {id(c[k]): k for k in ("hidden", "weight", "bias")}[id(leaf)]
        wide[key].requires_grad_()
        expected = torch.autograd.grad(scalar(oracle(wide)), wide[key])[0]
        assert (grad.double() - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_autocast_computes_forward_and_backward_in_its_dtype(tiles):
    """Under autocast the result is that of weights and states cast by hand, also when backward runs outside of it."""
    c = case(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = kernel(c, **tiles)
    found = gradients(c, stats)
    cast = {k: v.detach().bfloat16().requires_grad_(v.requires_grad) if v.ndim == 2 else v for k, v in c.items()}
    by_hand = kernel(cast, **tiles)
    for name in stats:
        assert stats[name].dtype == torch.float32
        assert torch.equal(stats[name], by_hand[name])
    for a, b in zip(found, gradients(cast, by_hand), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 1e-2 * a.norm()  # by hand, the gradient itself is rounded to bfloat16


def test_autocast_leaves_float64_alone():
    c = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = kernel(c)
    assert torch.equal(stats["kl"], kernel(c)["kl"])


def test_a_label_outside_the_vocabulary_gives_nan_for_its_token_only():
    c = case()
    c["labels"][3] = V
    for tiles in TILES.values():
        stats = kernel(c, **tiles)
        assert stats["logp"].isnan().nonzero().flatten().tolist() == [3]


def test_wrong_requests_are_refused():
    c = case()
    for change, message in [
        ({"want": ("kld",)}, "kld"),
        ({"want": ("kl",), "ref_hidden": None}, "need ref_hidden"),
        ({"want": ("kl",), "ref_weight": c["ref_weight"][:-1]}, "29 and 28 rows"),
        ({"softcap": 0.0}, "soft-cap"),
        ({"vocab_tile": 0}, "tiles"),
        ({"cache_mb": -1}, "cache_mb"),
    ]:
        with pytest.raises(ValueError, match=message):
            token_stats(**(c | {"want": ()} | change))


def test_backward_frees_what_was_kept():
    """A loop that holds the statistics of one micro-batch while it computes the next holds one cache, not two."""
    stats = kernel(case(), ("ref_logp", "kl"))
    node = stats["logp"].grad_fn
    assert sum(saved.shape == (N, V) for saved in node.saved_tensors if saved is not None) == 2
    scalar(stats).backward()
    with pytest.raises(RuntimeError, match="freed"):
        _ = node.saved_tensors
    assert not any(isinstance(value, (torch.Tensor, dict)) for value in vars(node).values())


@pytest.mark.parametrize(("mine", "other"), [(torch.float64, torch.float32), (torch.bfloat16, torch.float64)])
def test_policy_and_reference_may_differ_in_precision(mine, other):
    c = case(torch.float64)
    narrow = {k: v.detach().to(other if k.startswith("ref") else mine) for k, v in c.items() if k != "labels"}
    found = kernel({**narrow, "labels": c["labels"]}, token_tile=5, vocab_tile=7)
    expected = oracle({k: v.double() for k, v in narrow.items()} | {"labels": c["labels"]})
    for name in found:
        assert_close([found[name]], [expected[name]])


def test_without_gradients_nothing_is_saved():
    c = case()
    with torch.no_grad():
        assert not kernel(c)["logp"].requires_grad
