"""Numbers recorded from the authors' own functions: losses and gradients, by plain log_softmax and by the kernel."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from prefopt import registry
from prefopt.kernels.token_stats import token_stats
from prefopt.losses import dpo, sppo, tdpo
from prefopt.ranking import elo, length_controlled, order_scores, win_probabilities
from prefopt.types import Completion, Judgement, Prompt, ScoredGroup

HERE = Path(__file__).parent
WANT = ("ref_logp", "kl", "reverse_kl", "entropy")


def load(name):
    return json.loads((HERE / name).read_text())


GOLDEN = load("dpo_tdpo.json")
SPPO = load("sppo.json")


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def plain(policy, reference, labels):
    logp, ref = policy.log_softmax(-1), reference.log_softmax(-1)
    p, q = logp.exp(), ref.exp()
    index = labels[:, None]
    zero = torch.zeros((), dtype=policy.dtype)
    return {
        "logp": logp.gather(1, index).squeeze(1),
        "ref_logp": ref.gather(1, index).squeeze(1),
        "kl": torch.where(q == 0, zero, q * (ref - logp)).sum(-1),
        "reverse_kl": (p * (logp - ref)).sum(-1),
        "entropy": -(p * logp).sum(-1),
    }


def by_kernel(rotation, tiles):
    """hidden = logits @ Q with the head Q, so that the logits are hidden @ Q^T = logits again."""

    def stats(policy, reference, labels):
        vocab = policy.shape[-1]
        head = torch.eye(vocab, dtype=policy.dtype)
        if rotation:
            generator = torch.Generator().manual_seed(7)
            head = torch.linalg.qr(torch.randn(vocab, vocab, generator=generator, dtype=torch.float64))[0]
            head = head.to(policy.dtype)
        found = token_stats(
            policy @ head, head, labels, ref_hidden=reference @ head, ref_weight=head, want=WANT, **tiles
        )
        return {name: getattr(found, name) for name in ("logp", *WANT)}

    return stats


PATHS = {
    "plain": plain,
    "kernel_identity_head": by_kernel(False, {}),
    "kernel_orthogonal_head": by_kernel(True, {}),
    "kernel_identity_head_tiled": by_kernel(False, {"token_tile": 5, "vocab_tile": 4}),
    "kernel_orthogonal_head_tiled": by_kernel(True, {"token_tile": 5, "vocab_tile": 4}),
}


def sequence_sums(path, policy, reference, labels):
    """Sums of each statistic over the scored positions of each sequence, (6,) each."""
    labels = torch.tensor(labels)[:, 1:]
    mask = labels != -100
    row = torch.arange(len(labels))[:, None].expand_as(mask)[mask]
    stats = PATHS[path](policy[:, :-1][mask], reference[:, :-1][mask], labels[mask])
    return {name: torch.zeros(len(labels), dtype=value.dtype).index_add(0, row, value) for name, value in stats.items()}


def golden_sums(path):
    inputs = GOLDEN["inputs"]
    policy = f64(inputs["policy_logits"]).requires_grad_()
    return policy, sequence_sums(path, policy, f64(inputs["reference_logits"]), inputs["labels"])


def ratios(sums):
    delta = sums["logp"] - sums["ref_logp"]
    return delta[:3], delta[3:]


def close(found, expected, tolerance=1e-10):
    expected = torch.as_tensor(expected, dtype=found.dtype)
    assert found.shape == expected.shape
    assert (found.detach() - expected).abs().max() <= tolerance


def check(recorded, losses, policy):
    close(losses, recorded["losses"])
    if "grad_policy_logits" in recorded:
        close(torch.autograd.grad(losses.mean(), policy)[0], recorded["grad_policy_logits"])


@pytest.mark.parametrize("path", PATHS)
def test_sequence_sums_equal_the_authors(path):
    _, sums = golden_sums(path)
    recorded, derived = GOLDEN["sequence_values"], GOLDEN["metrics_derived"]
    close(sums["logp"], recorded["policy_logps_avg0"])
    close(sums["ref_logp"], recorded["reference_logps"])
    close(sums["logp"] - sums["ref_logp"], recorded["logps_margin_avg0"])
    close(sums["kl"], recorded["position_kl_avg0"])
    close(sums["kl"], derived["seqkl_forward"])
    close(sums["reverse_kl"], derived["seqkl_reverse"])
    tokens = (torch.tensor(GOLDEN["inputs"]["labels"])[:, 1:] != -100).sum(-1)
    close(sums["entropy"] / tokens, derived["entropy_per_seq"])
    close(sums["entropy"].sum() / tokens.sum(), derived["entropy_token_mean"])


TDPO = {
    "tdpo1_beta0.1": (1.0, False),
    "tdpo2_beta0.1_alpha0.1": (0.1, True),
    "tdpo2_beta0.1_alpha0.5": (0.5, True),
    "tdpo2_beta0.1_alpha1.0": (1.0, True),
    "tdpo2_beta0.1_alpha2.0": (2.0, True),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", TDPO)
def test_tdpo_equals_the_authors(case, path):
    recorded = GOLDEN["tdpo"][case]
    alpha, detach = TDPO[case]
    policy, sums = golden_sums(path)
    chosen, rejected = ratios(sums)
    losses = tdpo(chosen, rejected, sums["kl"][:3], sums["kl"][3:], beta=0.1, alpha=alpha, detach_chosen_kl=detach)
    assert "grad_policy_logits" in recorded
    check(recorded, losses, policy)
    close(0.1 * (chosen + sums["kl"][:3]), recorded["chosen_rewards"])
    close(0.1 * (rejected + sums["kl"][3:]), recorded["rejected_rewards"])


DPO = {
    "dpo_beta0.1_ls0.0": {},
    "dpo_beta0.1_ls0.1": {"variant": "cdpo", "label_smoothing": 0.1},
    "ipo_sum_beta0.1": {"variant": "ipo_sum"},
    "dpo_reference_free_beta0.1": {},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", DPO)
def test_dpo_equals_the_authors(case, path):
    recorded = GOLDEN["dpo"][case]
    policy, sums = golden_sums(path)
    chosen, rejected = ratios(sums)
    close(0.1 * chosen, recorded["chosen_rewards"])
    close(0.1 * rejected, recorded["rejected_rewards"])
    if "reference_free" in case:
        chosen, rejected = sums["logp"][:3], sums["logp"][3:]
    check(recorded, dpo(chosen, rejected, beta=0.1, **DPO[case]), policy)


def test_golden_cases_are_all_tested():
    assert set(GOLDEN["tdpo"]) == set(TDPO)
    assert set(GOLDEN["dpo"]) == set(DPO)


@pytest.mark.parametrize("case", SPPO["loss"]["results"])
def test_sppo_equals_the_authors(case):
    recorded, given = SPPO["loss"]["results"][case], SPPO["loss"]
    name, beta = case.rsplit("_beta", 1)
    variant = {"sppo": "soft", "sppo_single": "single", "trl_sppo_hard": "hard"}[name]
    probs = {"soft": ("chosen_probs_win", "chosen_probs_lose"), "single": ("chosen_probs",), "hard": ()}[variant]
    chosen, rejected = f64(given["policy_chosen"]).requires_grad_(), f64(given["policy_rejected"]).requires_grad_()
    a, b = chosen - f64(given["ref_chosen"]), rejected - f64(given["ref_rejected"])
    losses = sppo(a, b, *(f64(given[p]) for p in probs), beta=float(beta), variant=variant)
    close(losses, recorded["losses"])
    if "grad_chosen" in recorded:
        grads = torch.autograd.grad(losses.mean(), (chosen, rejected))
        close(grads[0], recorded["grad_chosen"])
        close(grads[1], recorded["grad_rejected"])
        close(float(beta) * a, recorded["chosen_rewards"])
        close(float(beta) * b, recorded["rejected_rewards"])


@pytest.mark.parametrize("path", PATHS)
def test_kl_where_a_logit_underflows_is_finite_with_its_gradient(path):
    trap = load("tdpo_nan_trap.json")
    policy = torch.tensor(trap["policy_logits"], requires_grad=True)
    assert policy.dtype == torch.float32
    sums = sequence_sums(path, policy, torch.tensor(trap["reference_logits"]), trap["labels"])
    close(sums["kl"], trap["stable_kl"], 1e-5)
    chosen, rejected = ratios(sums)
    losses = tdpo(chosen, rejected, sums["kl"][:3], sums["kl"][3:], beta=0.1, alpha=0.5, detach_chosen_kl=True)
    assert losses.isfinite().all()
    assert torch.autograd.grad(losses.mean(), policy)[0].isfinite().all()


def test_tdpo_reward_accuracy_and_training_logit_disagree_as_recorded():
    from prefopt.methods.tdpo import TDPO as Method
    from prefopt.types import PairBatch, PairStats

    case = load("tdpo_accuracy_disagrees.json")
    ones = torch.ones(2, dtype=torch.int64)
    zeros = torch.zeros(2, dtype=torch.float64)
    stats = PairStats(
        chosen_logps=f64(case["chosen_margin"]),
        rejected_logps=f64(case["rejected_margin"]),
        chosen_ref_logps=zeros,
        rejected_ref_logps=zeros,
        chosen_lengths=ones,
        rejected_lengths=ones,
        chosen_kl=f64(case["chosen_kl"]),
        rejected_kl=f64(case["rejected_kl"]),
    )
    empty = ones[:0]
    batch = PairBatch(empty, empty, empty, empty, empty, empty, empty, ones, ones, {}, ("", ""))
    out = Method(beta=case["beta"], alpha=case["alpha"]).loss(stats, batch)
    close(out.terms[0].value, case["losses"])
    assert out.metrics["rewards_tdpo/accuracies"][0].tolist() == [float(x) for x in case["logged_accuracy"]]
    assert out.metrics["accuracy/logit"][0].tolist() == [float(x > 0) for x in case["training_logit"]]
    assert out.metrics["accuracy/logit"][0].tolist() != out.metrics["rewards_tdpo/accuracies"][0].tolist()


@pytest.mark.parametrize("name", SPPO["pair_ranking"])
def test_sppo_ranks_and_estimates_as_the_authors_code_and_as_the_paper(name):
    case = SPPO["pair_ranking"][name]
    logits = tuple(map(tuple, case["pair_logits"]))
    completions = tuple(Completion((i,), str(i), "stop") for i in range(5))
    group = ScoredGroup(Prompt("p", (0,), "k", "w"), completions, Judgement(logits=logits), tuple(range(5)))

    code = Judgement(logits=logits)
    assert order_scores(code, "blender_score") == pytest.approx(case["official_scores"], abs=1e-6)
    assert win_probabilities(code, "blender_score").tolist() == [
        pytest.approx(row, abs=1e-6) for row in case["official_prob"]
    ]
    assert win_probabilities(code).tolist() == [pytest.approx(row, abs=1e-6) for row in case["paper_prob"]]
    method = registry.get("sppo")
    (pair,) = method(win_prob="blender_score").make_pairs(group)
    assert (pair.chosen, pair.rejected) == (case["best"], case["worst"])
    assert pair.columns == {
        "chosen_win_prob": pytest.approx(case["chosen_probs_win"], abs=1e-6),
        "rejected_win_prob": pytest.approx(case["chosen_probs_lose"], abs=1e-6),
        "pair_win_prob": pytest.approx(case["chosen_probs"], abs=1e-6),
    }
    (pair,) = method().make_pairs(group)
    assert (pair.chosen, pair.rejected) == (case["best"], case["worst"])
    assert pair.columns["chosen_win_prob"] == pytest.approx(case["paper_win"], abs=1e-6)
    assert pair.columns["rejected_win_prob"] == pytest.approx(case["paper_lose"], abs=1e-6)


THOUGHTS = load("thought_po_derived.json")


@pytest.mark.parametrize("name", THOUGHTS["rows"])
def test_thought_po_holds_length_as_the_formula_says(name):
    case, rho, ddof = THOUGHTS["rows"][name], float(name.removeprefix("rho").split("_")[0]), int(name[-1])
    scores, lengths = np.array(THOUGHTS["rewards"]), np.array(THOUGHTS["lengths"])
    found = length_controlled(scores, lengths, rho=rho, ddof=ddof)
    assert found == pytest.approx(case["scores"], abs=1e-6)

    completions = tuple(Completion((i,), f"draft <R> {'x' * n}", "stop") for i, n in enumerate(lengths))
    judgement = Judgement(scores=tuple(THOUGHTS["rewards"]))
    group = ScoredGroup(Prompt("p", (0,), "k", "w"), completions, judgement, tuple(range(len(lengths))))
    (pair,) = registry.get("thought_po")(rho=rho).make_pairs(group)
    assert (pair.chosen, pair.rejected) == (case["chosen"], case["rejected"])


def test_thought_po_fits_strengths_as_the_formula_says():
    case, separable = THOUGHTS["elo"], THOUGHTS["elo_separable"]
    assert elo(np.array(case["battle"], float), ridge=0.0) == pytest.approx(case["elo_mle"], abs=1e-6)
    battles = np.array(separable["battle"], float)
    assert elo(battles, ridge=0.01) == pytest.approx(separable["elo_l2_0p01"], abs=1e-6)
    with pytest.raises(ValueError, match="won every comparison"):
        elo(battles, ridge=0.0)
