import math

import pytest
import torch

from prefopt.errors import ConfigError
from prefopt.methods.confpo import ConfPO, unsure_tokens
from prefopt.types import PairStats, TokenStats, TokenView
from tests.methods.make_stats import batch, f64, means


def stats_of(chosen, rejected):
    """One pair from the probabilities of its tokens."""
    probabilities = f64([*chosen, *rejected], grad=True)
    lengths = torch.tensor([len(chosen), len(rejected)])
    view = TokenView(TokenStats(probabilities.log()), torch.arange(2).repeat_interleave(lengths), lengths, 1)
    sums = view.sums(view.stats.logp)
    return PairStats(sums[:1], sums[1:], lengths[:1], lengths[1:], token_view=view), probabilities


def test_loss_is_simpos_on_the_tokens_below_the_mean_probability():
    """Means 0.5 and 0.4: 0.25 is selected of the chosen tokens, 0.1 and 0.2 of the rejected ones."""
    stats, leaf = stats_of([0.75, 0.25, 0.5], [0.9, 0.1, 0.2])
    out = ConfPO(beta=2.0, gamma=0.5).loss(stats, batch(1))
    gap = math.log(0.25) - (math.log(0.1) + math.log(0.2)) / 2
    assert out.terms[0].value.item() == pytest.approx(math.log1p(math.exp(-(2 * gap - 0.5))))
    out.terms[0].value.sum().backward()
    assert (leaf.grad != 0).tolist() == [False, True, False, False, True, True]
    assert means(out)["selected/chosen"] == pytest.approx(1 / 3)
    assert means(out)["selected/pairs"] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 7, 10])
def test_tokens_of_equal_probability_are_never_selected(tokens, dtype):
    for probability in (0.9, 0.3, 1e-5):
        lengths = torch.tensor([tokens, 2])
        logps = torch.full((tokens + 2,), math.log(probability), dtype=dtype)
        index = torch.arange(2).repeat_interleave(lengths)
        assert not unsure_tokens(TokenView(TokenStats(logps), index, lengths, 1)).any()


def test_pair_without_a_selected_token_has_loss_and_gradient_0_and_counts():
    stats, leaf = stats_of([0.9, 0.1], [0.3])
    out = ConfPO().loss(stats, batch(1))
    assert out.terms[0].value.item() == 0
    assert out.terms[0].count.item() == 1
    out.terms[0].value.sum().backward()
    assert leaf.grad.tolist() == [0.0, 0.0, 0.0]
    assert means(out)["selected/pairs"] == 0


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"gamma": -1.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=f"method.{next(iter(settings))}: "):
        ConfPO(**settings)
