import torch

from prefopt.losses import sft
from prefopt.methods.sft import SFT
from prefopt.types import PairStats
from tests.methods.make_stats import batch, f64


def test_sft_is_the_negative_log_likelihood_counted_in_tokens():
    """Completions of 4 and 2 tokens with log-probabilities -6 and -3: 9 nats over 6 tokens, 1.5 per token."""
    stats = PairStats(f64([-6.0, -3.0], grad=True), None, torch.tensor([4, 2]), None)
    out = SFT().loss(stats, batch(2))
    (term,) = out.terms
    assert term.value.tolist() == [6.0, 3.0]
    assert term.count.tolist() == [4, 2]
    assert all(not value.requires_grad for value, _ in out.metrics.values())
    assert torch.autograd.grad(term.value.sum(), stats.chosen_logps)[0].tolist() == [-1.0, -1.0]


def test_sft_function_keeps_the_pairs_apart():
    assert sft(f64([-6.0, -3.0])).tolist() == [6.0, 3.0]


def test_sft_needs_no_reference_and_no_rejected_side():
    needs = SFT().needs
    assert needs.reference == "none"
    assert needs.rows == "chosen_only"
    assert SFT().loss_at_reference() is None
