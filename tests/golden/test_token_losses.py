"""Losses that read tokens, the global batch or several terms against numbers of the authors' functions or TRL's."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from prefopt.methods.alpha_dpo import AlphaDPO
from prefopt.methods.confpo import ConfPO
from prefopt.methods.ld_dpo import LDDPO
from prefopt.methods.mix import Mix, Part
from prefopt.methods.tgdpo import TGDPO
from prefopt.methods.tis_dpo import TISDPO
from prefopt.methods.wpo import WPO
from prefopt.training.forward import sum_by_sequence
from prefopt.types import LossState, TokenStats
from tests.methods.make_stats import batch, f64, pair_stats

HERE = Path(__file__).parent
SIDES = ("chosen", "rejected")
TOKENS = {"logp": "token_logps", "ref_logp": "ref_token_logps", "log_sum_p2": "token_log_sum_sq"}


def load(name):
    return json.loads((HERE / f"{name}.json").read_text())


def token_rows(inputs, name):
    """The completions' values of a statistic, each (tokens,), as leaves: first the chosen ones, then the rejected."""
    if f"chosen_{name}" not in inputs:
        return None
    return [
        f64(row[: int(length)]).requires_grad_()
        for side in SIDES
        for row, length in zip(inputs[f"{side}_{name}"], inputs[f"{side}_lengths"], strict=True)
    ]


def stats_of(inputs):
    """(PairStats of the recorded tokens, the policy's log-probabilities by completion)."""
    rows = {name: token_rows(inputs, key) for name, key in TOKENS.items()}
    lengths = [torch.tensor(inputs[f"{side}_lengths"]).long() for side in SIDES]
    pairs = len(lengths[0])
    index = torch.arange(2 * pairs).repeat_interleave(torch.cat(lengths))
    made = replace(batch(pairs), sequence_index=index, chosen_lengths=lengths[0], rejected_lengths=lengths[1])
    tokens = TokenStats(**{name: None if row is None else torch.cat(row) for name, row in rows.items()})
    stats = sum_by_sequence(tokens, made)
    if tokens.ref_logp is None:
        refs = {f"{side}_ref_logps": f64(inputs[f"{side}_ref_logps"]) for side in SIDES}
        stats = replace(stats, **refs)
    return stats, rows["logp"]


def gradient(rows, inputs, side):
    """The gradient of each completion's tokens, or of its sum where all tokens have the same."""
    pairs = len(inputs["chosen_lengths"])
    return [row.grad for row in (rows[:pairs] if side == "chosen" else rows[pairs:])]


MADE = {
    "wpo": lambda p: WPO(beta=p["beta"], label_smoothing=p["label_smoothing"], clamp=p["clamp"]),
    "ld_dpo": lambda p: LDDPO(beta=p["beta"], alpha=p["alpha"], reference="both" if p["reference_too"] else "plain"),
    "confpo": lambda p: ConfPO(beta=p["beta"], gamma=p["gamma"]),
}
CASES = [pytest.param(name, case, id=f"{name}-{case['name']}") for name in MADE for case in load(name)["cases"]]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_loss_and_gradient_are_those_of_the_source(name, case):
    inputs, outputs = load(name)["inputs"], case["outputs"]
    stats, rows = stats_of(inputs)
    out = MADE[name](case["params"]).loss(stats, batch(len(inputs["chosen_lengths"])))
    (term,) = out.terms
    close = partial(torch.testing.assert_close, rtol=case["tolerance"], atol=case["tolerance"])
    close(term.value, f64(outputs["losses"]))
    close(term.value.mean(), f64(outputs["loss"]))
    term.value.mean().backward()
    for side in SIDES:
        found = gradient(rows, inputs, side)
        for key, expected in outputs.items():
            if key == f"grad_{side}_token_logps":
                for one, other in zip(found, expected, strict=True):
                    close(one, f64(other)[: len(one)])
            elif key == f"grad_{side}_logps":
                for one, other in zip(found, expected, strict=True):
                    close(one, f64([other] * len(one)))
            elif key == f"{side}_selected":
                close(out.metrics[f"selected/{side}"][0], f64(expected))
    if "weights" in outputs:
        close(out.metrics["pair_weight"][0], f64(outputs["weights"]))


def test_alpha_dpo_over_three_steps_is_the_authors():
    (case,) = load("alpha_dpo")["cases"]
    p = case["params"]
    method = AlphaDPO(beta=p["beta"], gamma_beta_ratio=p["gamma_beta_ratio"], alpha=p["alpha"])
    close = partial(torch.testing.assert_close, rtol=case["tolerance"], atol=case["tolerance"])
    state = method.needs.state
    for step in case["outputs"]["steps"]:
        inputs, outputs = step["inputs"], step["outputs"]
        lengths = inputs["chosen_lengths"], inputs["rejected_lengths"]
        sums = [inputs[f"{side}_{what}"] for what in ("logps", "ref_logps") for side in SIDES]
        stats = pair_stats(*sums, lengths=lengths)
        with torch.no_grad():
            values = method.batch_values(stats, batch(4))
        state = method.next_state(state, values)
        (term,) = method.loss(stats, batch(4), LossState(state=state)).terms
        close(f64([state["mean"], state["std"]]), f64([*outputs["running_mean"], *outputs["running_std"]]))
        close(term.value, f64(outputs["losses"]))
        term.value.mean().backward()
        close(stats.chosen_logps.grad, f64(outputs["grad_chosen_logps"]))
        close(stats.rejected_logps.grad, f64(outputs["grad_rejected_logps"]))


def mixture(p):
    """The mixture of a recorded case: of TRL's list of losses, or DPO with one of the three NLLs."""
    beta = ("beta", p["beta"])
    if "terms" not in p:
        return Mix((Part("sigmoid", 1.0, (beta,)), Part("nll", p["nll_weight"], (("reduction", p["nll"]),))))
    parts = {
        "sigmoid": Part("sigmoid", settings=(beta,)),
        "bco_pair": Part("bco", settings=(beta, ("delta", "none"))),
        "sft": Part("nll"),
    }
    return Mix(
        tuple(replace(parts[name], weight=weight) for name, weight in zip(p["terms"], p["weights"], strict=True))
    )


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(name, c, id=c["name"]) for name in ("mixture_mpo", "dpo_nll") for c in load(name)["cases"]],
)
def test_mixture_is_that_of_the_source(name, case):
    inputs, outputs = load(name)["inputs"], case["outputs"]
    stats, rows = stats_of(inputs)
    terms = mixture(case["params"]).loss(stats, batch(len(inputs["chosen_lengths"]))).terms
    loss = sum(term.weight * term.value.sum() / term.count.sum() for term in terms)
    close = partial(torch.testing.assert_close, rtol=case["tolerance"], atol=case["tolerance"])
    close(loss, f64(outputs["loss"]))
    loss.backward()
    for side in SIDES:
        found = gradient(rows, inputs, side)
        for one, expected in zip(found, outputs.get(f"grad_{side}_token_logps", found), strict=True):
            close(one, torch.as_tensor(expected, dtype=torch.float64)[: len(one)])
        for one, expected in zip(found, outputs.get(f"grad_{side}_logps", ()), strict=False):
            close(one, f64([expected] * len(one)))


def of_sides(inputs, name):
    return [
        f64(row[: int(n)])
        for side in SIDES
        for row, n in zip(inputs[f"{side}_{name}"], inputs[f"{side}_lengths"], strict=True)
    ]


@pytest.mark.parametrize("case", load("tgdpo")["cases"], ids=lambda case: case["name"])
def test_tgdpo_is_the_authors(case):
    inputs, p = load("tgdpo")["inputs"], case["params"]
    stats, rows = stats_of(inputs)
    third, reference = (torch.cat(of_sides(inputs, f"{name}_token_logps")) for name in ("reward", "ref"))
    made = replace(batch(len(inputs["chosen_lengths"])), token_columns={"reward_logratios": third - reference})
    (term,) = TGDPO(beta=p["beta"], alpha=p["alpha"]).loss(stats, made).terms
    close = partial(torch.testing.assert_close, rtol=case["tolerance"], atol=case["tolerance"])
    close(term.value, f64(case["outputs"]["losses"]))
    term.value.mean().backward()
    for side in SIDES:
        for one, other in zip(gradient(rows, inputs, side), case["outputs"][f"grad_{side}_token_logps"], strict=True):
            close(one, f64(other)[: len(one)])


@pytest.mark.parametrize("case", load("tis_dpo")["cases"][:2], ids=lambda case: case["name"])
def test_tis_dpo_is_the_authors(case):
    inputs, p = load("tis_dpo")["inputs"], case["params"]
    lengths = [torch.tensor(inputs[f"{side}_lengths"]).long() for side in SIDES]
    logits = [one.requires_grad_() for one in of_sides(inputs, "logits")]
    log_p = [one.log_softmax(-1) for one in logits]
    log_q = [one.log_softmax(-1) for one in of_sides(inputs, "ref_logits")]
    ids = [one.long()[:, None] for one in of_sides(inputs, "ids")]
    tokens = TokenStats(
        logp=torch.cat([one.gather(1, i)[:, 0] for one, i in zip(log_p, ids, strict=True)]),
        ref_logp=torch.cat([one.gather(1, i)[:, 0] for one, i in zip(log_q, ids, strict=True)]),
        reverse_kl=torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in zip(log_p, log_q, strict=True)]),
    )
    index = torch.arange(2 * len(lengths[0])).repeat_interleave(torch.cat(lengths))
    weights = torch.cat(of_sides(inputs, "token_weights"))
    made = replace(
        batch(len(lengths[0])),
        sequence_index=index,
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        token_columns={"weights": weights},
    )
    method = TISDPO(beta=p["beta"], alpha=p["alpha"], kl_term=p["kl_term"])
    (term,) = method.loss(sum_by_sequence(tokens, made), made).terms
    close = partial(torch.testing.assert_close, rtol=case["tolerance"], atol=case["tolerance"])
    close(term.value, f64(case["outputs"]["losses"]))
    term.value.mean().backward()
    expected = [row for side in SIDES for row in case["outputs"][f"grad_{side}_logits"]]
    for one, other in zip(logits, expected, strict=True):
        close(one.grad, f64(other)[: len(one)])
