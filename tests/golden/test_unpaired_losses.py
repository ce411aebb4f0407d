"""KTO and APO-zero of single completions against numbers of the authors' code and of TRL's, on two processes."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from prefopt.losses import apo_zero_unpaired, kto
from prefopt.methods.kto import KTO
from prefopt.types import LABEL, LossState, PairStats
from tests.methods.make_stats import batch

FILES = {
    name: json.loads((Path(__file__).parent / f"{name}.json").read_text()) for name in ("kto", "apo_zero_unpaired")
}
CASES = [pytest.param(name, case, id=case["name"]) for name, file in FILES.items() for case in file["cases"]]


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def weights(params):
    return {name: params[name] for name in ("desirable_weight", "undesirable_weight")}


@pytest.mark.parametrize(("name", "case"), CASES)
def test_loss_and_gradient_are_those_of_the_source(name, case):
    inputs, params, outputs = FILES[name]["inputs"] | (case.get("inputs") or {}), case["params"], case["outputs"]
    logps, labels = f64(inputs["logps"]).requires_grad_(), f64([float(label) for label in inputs["label"]])
    ratios = logps - f64(inputs["ref_logps"])
    close = partial(torch.testing.assert_close, rtol=case["tolerance"], atol=case["tolerance"])
    if name == "apo_zero_unpaired":
        losses = apo_zero_unpaired(ratios, labels, beta=params["beta"], **weights(params))
    else:
        mismatched = f64(inputs["kl_logps"]) - f64(inputs["kl_ref_logps"])
        if params["z0"] == "global_mean_of_nonzero":
            point = (mismatched.sum() / (mismatched != 0).sum()).clamp(min=0)
        else:  # TRL's, which the method computes from the values of the global batch
            counts = torch.bincount(torch.tensor(inputs["process"])).tolist()
            state = LossState({"mismatched": mismatched}, ranks=tuple(counts))
            point = KTO(z0="process_means")._reference_point(state, len(labels))
        close(point, f64(outputs["z0"]))
        losses = kto(ratios, labels, point, beta=params["beta"], **weights(params))
    if "loss_per_process" in outputs:  # TRL averages over processes, not over rows
        process = torch.tensor(inputs["process"])
        means = [losses[process == rank].mean() for rank in (0, 1)]
        close(torch.stack(means), f64(outputs["loss_per_process"]))
        (own,) = torch.autograd.grad(sum(means), logps)
        close(own, f64(outputs["grad_logps_of_own_process_loss"]))
        return
    close(losses.mean(), f64(outputs["loss"]))
    close(losses, f64(outputs["losses"]))
    losses.mean().backward()
    close(logps.grad, f64(outputs["grad_logps"]))


def test_reference_point_when_cut_in_any_way_then_is_that_of_the_whole_batch():
    values, labels = f64([3.0, -1.0, 4.0, 0.0]), f64([1.0, 0.0, 1.0, 1.0])
    method = KTO(beta=0.5)

    def losses(rows, offset):
        stats = PairStats(f64([0.0] * rows), None, torch.ones(rows), None, chosen_ref_logps=f64([0.0] * rows))
        state = LossState({"mismatched": values}, offset)
        part = labels[offset : offset + rows].tolist()
        return method.loss(stats, batch(rows, **{LABEL.name: part}), state).terms[0].value

    torch.testing.assert_close(torch.cat([losses(1, 0), losses(3, 1)]), losses(4, 0))
    assert losses(1, 0).item() == pytest.approx(1 - 1 / (1 + 2.718281828459045**0.75))  # z0 = 1.5
