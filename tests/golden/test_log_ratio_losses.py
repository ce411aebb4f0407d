"""Losses of two log-ratios against numbers recorded by running the authors' functions or TRL's, with gradients."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from prefopt import dpo_variants as v

HERE = Path(__file__).parent
POLICY = ("chosen_logps", "rejected_logps")
EXO_AUTHORS = {"eps": 1e-3, "target": "authors"}


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def lengths(inputs):
    return {f"{side}_lengths": f64(inputs[f"{side}_lengths"]) for side in ("chosen", "rejected")}


def of(loss, **settings):
    """A loss of two log-ratios as a function of policy log-probabilities and the other inputs."""

    def run(chosen, rejected, inputs):
        return loss(chosen - f64(inputs["chosen_ref_logps"]), rejected - f64(inputs["rejected_ref_logps"]), **settings)

    return run


def with_lengths(loss, **settings):
    return lambda chosen, rejected, inputs: of(loss, **settings, **lengths(inputs))(chosen, rejected, inputs)


def r_dpo(p):
    alpha = p["alpha"] * (p["beta"] if p["alpha_inside_beta"] else 1)
    return with_lengths(v.r_dpo, beta=p["beta"], alpha=alpha, sign=p["sign"])


def exo(p):
    own = {"eps": p["eps"]} if "eps" in p else EXO_AUTHORS
    return of(v.exo, beta=p["beta"], **own)


def nca(p):
    if p["variant"] == "info":  # of a pair, InfoNCA is DPO
        return of(v.sigmoid, beta=p["beta"])
    return of(v.nca, beta=p["beta"], biased=p["variant"] == "biased")


def aot(p):
    own = {"beta": p["beta"], "label_smoothing": p["label_smoothing"]}
    if p["variant"] == "unpaired":
        return of(v.aot_unpaired, **own)
    return lambda chosen, rejected, inputs: v.aot(
        chosen, rejected, f64(inputs["chosen_ref_logps"]), f64(inputs["rejected_ref_logps"]), **own
    )


def f_dpo(p):
    own = {"alpha": p["alpha"]} if p["divergence"] == "alpha" else {}
    return of(getattr(v, f"f_{p['divergence']}"), beta=p["beta"], **own)


def dpo_shift(p):
    share = p["step"] / p["total_steps"]
    factor = {
        "fixed": p["fixed"],
        "increase_linear": p["low"] + (p["high"] - p["low"]) * share,
        "decrease_linear": p["high"] - (p["high"] - p["low"]) * share,
    }[p["strategy"]]
    return of(v.dpo_shift, beta=p["beta"], factor=factor)


MADE = {
    "dpo_norm": lambda p: with_lengths(v.sigmoid_norm, beta=p["beta"]),
    "r_dpo": r_dpo,
    "dpop": lambda p: of(v.dpop, beta=p["beta"], penalty_weight=p["lam"], penalty=p["penalty"]),
    "apo": lambda p: of(getattr(v, f"apo_{p['variant']}"), beta=p["beta"]),
    "exo": exo,
    "nca": nca,
    "bco": lambda p: of(v.bco, beta=p["beta"], shift=p["delta"]),
    "aot": aot,
    "discopop": lambda p: of(v.discopop, **p),
    "f_dpo": f_dpo,
    "chi_po": lambda p: of(v.chi_po, **p),
    "dpo_shift": dpo_shift,
    "cal_dpo": lambda p: of(v.cal_dpo, beta=p["beta"], calibration_weight=0.5),
}
FILES = {name: json.loads((HERE / f"{name}.json").read_text()) for name in MADE}
CASES = [
    pytest.param(name, case, id=case["name"] if case["name"].startswith(name) else f"{name}-{case['name']}")
    for name, file in FILES.items()
    for case in file["cases"]
    if "steps" not in case["outputs"] and "groups" not in case["name"]
]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_loss_and_gradient_are_those_of_the_source(name, case):
    inputs, outputs = FILES[name]["inputs"] | case.get("inputs", {}), case["outputs"]
    chosen, rejected = (f64(inputs[key]).requires_grad_() for key in POLICY)
    losses = MADE[name](case["params"])(chosen, rejected, inputs)
    close = partial(torch.testing.assert_close, rtol=case["tolerance"], atol=case["tolerance"])
    close(losses.mean(), f64(outputs["loss"]))
    if "losses" in outputs:
        close(losses, f64(outputs["losses"]))
    losses.mean().backward()
    for key, found in zip(POLICY, (chosen.grad, rejected.grad), strict=True):
        if f"grad_{key}" in outputs:
            close(found, f64(outputs[f"grad_{key}"]))


def test_bco_with_a_running_shift_is_llama_factorys():
    (case,) = (case for case in FILES["bco"]["cases"] if "steps" in case["outputs"])
    beta = case["params"]["beta"]
    means = []
    for step in case["outputs"]["steps"]:
        inputs, outputs = step["inputs"], step["outputs"]
        chosen, rejected = (f64(inputs[key]).requires_grad_() for key in POLICY)
        ratios = [x - f64(inputs[f"{s}_ref_logps"]) for x, s in ((chosen, "chosen"), (rejected, "rejected"))]
        means.append(beta * torch.cat(ratios).mean().detach())
        shift = torch.stack(means).mean()
        losses = v.bco(*ratios, beta=beta, shift=shift)
        losses.mean().backward()
        close = partial(torch.testing.assert_close, rtol=case["tolerance"], atol=case["tolerance"])
        close(shift, f64(outputs["delta"]))
        close(losses, f64(outputs["losses"]))
        close(chosen.grad, f64(outputs["grad_chosen_logps"]))
        close(rejected.grad, f64(outputs["grad_rejected_logps"]))
