"""Reference-free losses, losses that read scores, and NLL terms against numbers of the authors' functions or TRL's."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from prefopt import dpo_variants
from prefopt.losses import alpha_po, cpo, f_forward_kl, orpo, rebel, reward_rpo, simpo
from prefopt.method import nll_term
from prefopt.methods.orpo import log1mexp
from prefopt.types import PairStats

HERE = Path(__file__).parent
POLICY = ("chosen_logps", "rejected_logps")


def load(name):
    return json.loads((HERE / f"{name}.json").read_text())


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def stats_of(chosen, rejected, inputs):
    others = {
        key: f64(inputs[key])
        for key in ("chosen_lengths", "rejected_lengths", "chosen_ref_logps", "rejected_ref_logps")
        if key in inputs
    }
    return PairStats(chosen, rejected, **others)


def of_means(loss, **settings):
    return lambda stats, inputs: loss(stats.chosen_mean_logps, stats.rejected_mean_logps, **settings)


def of_sums(loss, **settings):
    return lambda stats, inputs: loss(stats.chosen_logps, stats.rejected_logps, **settings)


def of_scores(loss, **settings):
    def run(stats, inputs):
        scores = f64(inputs["chosen_scores"]), f64(inputs["rejected_scores"])
        return loss(stats.chosen_logratios, stats.rejected_logratios, *scores, **settings)

    return run


def simpo_of(p):
    ratio = p.get("gamma_beta_ratio", p["gamma"] / p["beta"])
    own = {"gamma_beta_ratio": ratio, "variant": p["loss_type"], "label_smoothing": p["label_smoothing"]}
    return of_means(simpo, beta=p["beta"], **own)


def orpo_of(p, source):
    """LLaMA-Factory's whole loss, whose NLL is a mean per sequence; of TRL the odds-ratio term alone."""

    def run(stats, inputs):
        odds = p["lam"] * orpo(stats.chosen_mean_logps, stats.rejected_mean_logps)
        return odds - stats.chosen_mean_logps if "LLaMA-Factory" in source else odds

    return run


def nll_of(p):
    def run(stats, inputs):
        (term,) = nll_term(stats, p["nll_weight"], p["nll"])
        preference = dpo_variants.sigmoid(stats.chosen_logratios, stats.rejected_logratios, beta=p["beta"])
        return preference + term.weight * term.value / term.count

    return run


MADE = {
    "simpo": lambda p, _: simpo_of(p),
    "alpha_po": lambda p, _: of_means(alpha_po, **p),
    "cpo": lambda p, _: of_sums(cpo, beta=p["beta"], variant=p["loss_type"], label_smoothing=p["label_smoothing"]),
    "orpo": orpo_of,
    "rebel": lambda p, _: of_scores(rebel, eta=p["eta"]),
    "reward_rpo": lambda p, _: of_scores(
        reward_rpo, beta=p["beta"], eta=p["eta"], distance=p["distance"].removeprefix("rpo_")
    ),
    "dpo_nll": lambda p, _: nll_of(p),
}
CASES = [
    pytest.param(name, case, id=f"{name}-{case['name']}")
    for name in MADE
    for case in load(name)["cases"]
    if "inputs" not in case and case["params"].get("nll") != "token_mean"
]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_loss_and_gradient_are_those_of_the_source(name, case):
    inputs, outputs = load(name)["inputs"], case["outputs"]
    chosen, rejected = (f64(inputs[key]).requires_grad_() for key in POLICY)
    losses = MADE[name](case["params"], case["source"])(stats_of(chosen, rejected, inputs), inputs)
    close = partial(torch.testing.assert_close, rtol=case["tolerance"], atol=case["tolerance"])
    close(losses, f64(outputs["losses"]))
    close(losses.mean(), f64(outputs["loss"]))
    losses.mean().backward()
    for key, found in zip(POLICY, (chosen.grad, rejected.grad), strict=True):
        if f"grad_{key}" in outputs:
            close(found, f64(outputs[f"grad_{key}"]))


@pytest.mark.parametrize("case", [c for c in load("dpo_nll")["cases"] if c["params"]["nll"] == "token_mean"])
def test_nll_over_the_tokens_of_the_batch_is_trls(case):
    file, p = load("dpo_nll"), case["params"]
    tokens = {
        side: [
            f64(one[: int(n)]).requires_grad_()
            for one, n in zip(file["inputs"][f"{side}_token_logps"], file["inputs"][f"{side}_lengths"], strict=True)
        ]
        for side in ("chosen", "rejected")
    }
    sums = [torch.stack([one.sum() for one in tokens[side]]) for side in ("chosen", "rejected")]
    stats = stats_of(*sums, file["inputs"])
    (term,) = nll_term(stats, p["nll_weight"], "token_mean")
    preference = dpo_variants.sigmoid(stats.chosen_logratios, stats.rejected_logratios, beta=p["beta"])
    loss = preference.mean() + term.weight * term.value.sum() / term.count.sum()
    torch.testing.assert_close(loss, f64(case["outputs"]["loss"]), rtol=1e-10, atol=1e-10)
    loss.backward()
    for side, found in tokens.items():
        for one, expected in zip(found, case["outputs"][f"grad_{side}_token_logps"], strict=True):
            torch.testing.assert_close(one.grad, f64(expected)[: len(one)], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", load("cpo")["cases"], ids=lambda case: case["name"])
def test_cpo_with_its_nll_is_trls(case):
    inputs, p = load("cpo")["inputs"], case["params"]
    stats = stats_of(*(f64(inputs[key]) for key in POLICY), inputs)
    losses = cpo(
        stats.chosen_logps,
        stats.rejected_logps,
        beta=p["beta"],
        variant=p["loss_type"],
        label_smoothing=p["label_smoothing"],
    )
    total = losses.mean() + sum(t.weight * t.value.sum() / t.count.sum() for t in nll_term(stats, p["cpo_alpha"]))
    torch.testing.assert_close(total, f64(case["outputs"]["total"]), rtol=1e-10, atol=1e-10)


def test_orpo_of_the_authors_means_is_their_odds_ratio():
    """Their means hold the prediction of the first pad where a row is padded; ours do not, so theirs are given here."""
    (case,) = (one for one in load("orpo")["cases"] if one["name"] == "authors_whole_loss")
    outputs = case["outputs"]
    losses = orpo(f64(outputs["chosen_mean_logps"]), f64(outputs["rejected_mean_logps"]))
    torch.testing.assert_close(-losses.mean(), f64(outputs["log_odds_ratio_mean"]), rtol=1e-10, atol=1e-10)


def test_log1mexp_loses_no_digits():
    (case,) = (one for one in load("orpo")["cases"] if one["name"] == "log1mexp")
    found = log1mexp(f64(case["inputs"]["mean_logps"]))
    torch.testing.assert_close(found, f64(case["outputs"]["log1mexp"]), rtol=1e-10, atol=1e-10)


def trap(name):
    (case,) = (one for one in load("numerical_traps")["cases"] if one["name"] == name)
    return case


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["discopop", "forward_kl", "alpha_po"])
def test_losses_where_the_obvious_expression_overflows(name, dtype):
    case = trap(name)
    inputs = {key: f64(value).to(dtype).requires_grad_() for key, value in case["inputs"].items()}
    if name == "discopop":
        zero = torch.zeros((), dtype=dtype)
        losses = dpo_variants.discopop(inputs["u"], zero, beta=1.0, tau=case["params"]["tau"])
    elif name == "forward_kl":
        losses = f_forward_kl(*inputs.values(), beta=case["params"]["beta"])
    else:
        p, sides = case["params"], list(inputs.values())
        losses = torch.stack(
            [
                alpha_po(sides[0][i], sides[1][i], beta=p["beta"], gamma=p["gamma"], alpha=alpha)
                for i, alpha in enumerate(p["alpha"])
            ]
        )
    losses.sum().backward()
    assert losses.isfinite().all()
    assert all(one.grad.isfinite().all() for one in inputs.values())
    expected = f64(case["outputs"]["losses"])
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    small = expected < 1e30  # beyond it the exponent is capped
    torch.testing.assert_close(losses[small].double(), expected[small], rtol=tolerance, atol=tolerance)
    assert (losses[~small] > 1e25).all()
