import pytest
import torch

from prefopt.errors import ConfigError
from prefopt.losses import sppo
from prefopt.methods.sppo import SPPO
from tests.methods.make_stats import batch, f64, means, pair_stats


def test_soft_by_hand():
    """beta = 1/4: targets 4 (0.75 - 0.5) = 1 and 4 (0.25 - 0.5) = -1; errors 2 and 3: (4 + 9) / 2."""
    assert sppo(f64([3.0]), f64([2.0]), f64([0.75]), f64([0.25]), beta=0.25).item() == 6.5


def test_loss_is_zero_at_its_targets():
    win, lose = f64([0.9, 0.6]), f64([0.2, 0.45])
    assert sppo((win - 0.5) / 0.01, (lose - 0.5) / 0.01, win, lose, beta=0.01).tolist() == [0.0, 0.0]
    assert sppo(f64([50.0]), f64([-50.0]), beta=0.01, variant="hard").item() == 0.0


def test_single_with_certainty_is_half_of_hard():
    a, b = f64([3.0, -40.0]), f64([2.0, 7.0])
    single = sppo(a, b, f64([1.0, 1.0]), beta=0.1, variant="single")
    assert torch.allclose(2 * single, sppo(a, b, beta=0.1, variant="hard"), rtol=1e-14)


def test_targets_are_cut_to_the_clamp():
    """beta = 1/4: targets 1 and -1 become 1/2 and -1/2; errors 5/2 and 5/2."""
    losses = sppo(f64([3.0]), f64([2.0]), f64([0.75]), f64([0.25]), beta=0.25, target_clamp=0.5)
    assert losses.item() == (2.5**2 + 2.5**2) / 2
    assert sppo(f64([0.5]), f64([-0.5]), beta=0.25, variant="hard", target_clamp=0.5).item() == 0
    assert SPPO(beta=0.25, variant="hard", target_clamp=0.5).loss_at_reference() == 0.5


def test_the_two_sides_are_separate_regressions():
    a, b = f64([3.0], grad=True), f64([2.0], grad=True)
    loss = sppo(a, b, f64([0.75]), f64([0.25]), beta=0.25)
    assert [g.item() for g in torch.autograd.grad(loss, (a, b))] == [2.0, 3.0]


def test_float64_columns_leave_the_loss_in_the_dtype_of_the_model():
    loss = sppo(torch.zeros(2), torch.zeros(2), f64([0.9, 0.6]), f64([0.2, 0.45]), beta=0.1)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("variant", "given", "message"),
    [
        ("soft", 1, "reads chosen_win_prob and rejected_win_prob"),
        ("soft", 0, "reads chosen_win_prob and rejected_win_prob"),
        ("single", 2, "reads chosen_win_prob, and nothing else"),
        ("single", 0, "reads chosen_win_prob, and nothing else"),
        ("hard", 1, "reads no probabilities"),
        ("firm", 0, "unknown variant"),
    ],
)
def test_function_refuses_probabilities_that_are_missing_or_not_read(variant, given, message):
    with pytest.raises(ValueError, match=message):
        sppo(f64([0.0]), f64([0.0]), *[f64([0.5])] * given, beta=0.1, variant=variant)


@pytest.mark.parametrize(
    ("variant", "columns"),
    [
        ("soft", {"chosen_win_prob": [0.9, 0.7], "rejected_win_prob": [0.2, 0.3]}),
        ("single", {"pair_win_prob": [0.9, 0.7]}),
        ("hard", {}),
    ],
)
def test_method_reads_the_columns_that_its_variant_needs(variant, columns):
    method = SPPO(beta=0.1, variant=variant)
    assert [column.name for column in method.needs.columns] == list(columns)
    assert all((column.low, column.high) == (0.0, 1.0) for column in method.needs.columns)
    stats = pair_stats([1.0, -1.0], [0.5, 2.0])
    out = method.loss(stats, batch(2, **columns))
    expected = sppo(
        stats.chosen_logps, stats.rejected_logps, *(f64(c) for c in columns.values()), beta=0.1, variant=variant
    )
    assert torch.equal(out.terms[0].value, expected)
    assert means(out)["rewards/chosen"] == 0.0
    assert "accuracy/logit" not in out.metrics


def test_authors_column_names_are_accepted():
    aliases = [alias for v in ("soft", "single") for c in SPPO(variant=v).needs.columns for alias in c.aliases]
    assert aliases == ["chosen_probs_win", "chosen_probs_lose", "chosen_probs"]


def test_loss_at_the_reference_is_known_for_hard_only():
    method = SPPO(variant="hard")
    assert method.loss_at_reference() == pytest.approx(5e5)
    stats = pair_stats([-3.0], [-4.0], [-3.0], [-4.0], lengths=((1,), (1,)))
    assert method.loss(stats, batch(1)).terms[0].value.item() == pytest.approx(5e5)
    assert SPPO().loss_at_reference() is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": float("inf")}, "method.beta: found inf, expected a finite number > 0"),
        ({"variant": "sof"}, "method.variant: found 'sof', expected one of soft, single, hard; did you mean 'soft'?"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_in_one_line(fields, message):
    with pytest.raises(ConfigError) as error:
        SPPO(**fields)
    assert str(error.value) == message


def test_describe_names_variant_and_eta():
    assert SPPO().describe() == "soft, beta 0.001 (eta 1000)"
