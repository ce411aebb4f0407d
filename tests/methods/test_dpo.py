import math

import pytest
import torch

from prefopt import dpo_variants
from prefopt.dpo_variants import VARIANTS
from prefopt.errors import ConfigError
from prefopt.losses import dpo
from prefopt.methods.dpo import DPO
from tests.methods.make_stats import batch, f64, means, pair_stats

LN2 = math.log(2)
# h = 0, ln 3, -ln 3; with beta = 1 the sigmoid of u = h is 1/2, 3/4, 1/4
CHOSEN, REJECTED = f64([1.0, math.log(3.0), 0.0]), f64([1.0, 0.0, math.log(3.0)])


def same(found, expected):
    assert torch.allclose(found, f64(expected), rtol=0, atol=1e-12), found


def test_sigmoid_by_hand():
    """-ln 1/2, -ln 3/4, -ln 1/4."""
    same(dpo(CHOSEN, REJECTED, beta=1.0), [LN2, math.log(4 / 3), math.log(4)])


def test_cdpo_by_hand():
    """With e = 1/4: 3/4 of the loss and 1/4 of the loss of the swapped pair."""
    losses = dpo(CHOSEN, REJECTED, beta=1.0, variant="cdpo", label_smoothing=0.25)
    a, b = math.log(4 / 3), math.log(4)
    same(losses, [LN2, 0.75 * a + 0.25 * b, 0.75 * b + 0.25 * a])


def test_robust_by_hand():
    """With e = 1/4: (3/4 of the loss minus 1/4 of the swapped loss) / (1/2)."""
    losses = dpo(CHOSEN, REJECTED, beta=1.0, variant="robust", label_smoothing=0.25)
    a, b = math.log(4 / 3), math.log(4)
    same(losses, [LN2, 1.5 * a - 0.5 * b, 1.5 * b - 0.5 * a])


def test_robust_is_unbiased_under_label_noise():
    """(1 - e) of the loss of the pair and e of the swapped pair's is the sigmoid loss: what the variant is for."""
    kept = dpo(CHOSEN, REJECTED, beta=0.7, variant="robust", label_smoothing=0.2)
    flipped = dpo(REJECTED, CHOSEN, beta=0.7, variant="robust", label_smoothing=0.2)
    same(0.8 * kept + 0.2 * flipped, dpo(CHOSEN, REJECTED, beta=0.7).tolist())


def test_hinge_by_hand():
    """u = beta h with beta = 1/2 and h = 0, 1, 4, -2: 1 - u = 1, 1/2, below 0, 2."""
    same(dpo(f64([0.0, 1.0, 4.0, -2.0]), f64([0.0] * 4), beta=0.5, variant="hinge"), [1.0, 0.5, 0.0, 2.0])


def test_ipo_sum_by_hand():
    """1 / (2 beta) = 2 with beta = 1/4; h = 2, 0, 5: squares of 0, -2, 3."""
    same(dpo(f64([3.0, 0.0, 5.0]), f64([1.0, 0.0, 0.0]), beta=0.25, variant="ipo_sum"), [0.0, 4.0, 9.0])


def test_ipo_mean_by_hand():
    """Log-ratios 8 over 4 tokens and 3 over 3: h = 2 - 1 = 1, minus 1 / (2 beta) = 2, squared: 1."""
    lengths = {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([3])}
    same(dpo(f64([8.0]), f64([3.0]), beta=0.25, variant="ipo_mean", **lengths), [1.0])


def test_a_large_negative_logit_stays_finite_with_its_gradient():
    chosen = torch.tensor([-1e4], requires_grad=True)
    loss = dpo(chosen, torch.zeros(1), beta=1.0)
    assert loss.item() == 1e4
    assert torch.autograd.grad(loss, chosen)[0].item() == -1.0


@pytest.mark.parametrize(
    "method",
    [
        DPO(),
        DPO(variant="cdpo", label_smoothing=0.1),
        DPO(variant="robust", label_smoothing=0.1),
        DPO(variant="ipo_sum"),
        DPO(variant="ipo_mean"),
        DPO(variant="hinge"),
    ],
    ids=lambda m: m.variant,
)
def test_loss_at_the_reference_is_the_value_that_the_method_promises(method):
    stats = pair_stats([-3.0, -9.0], [-4.0, -2.0], [-3.0, -9.0], [-4.0, -2.0])
    (term,) = method.loss_of(stats, batch(2), method.first_state(stats, batch(2))).terms
    same(term.value.detach(), [method.loss_at_reference()] * 2)
    assert term.count.tolist() == [1.0, 1.0]


def test_loss_at_the_reference_has_the_known_values():
    assert DPO().loss_at_reference() == LN2
    assert DPO(variant="hinge").loss_at_reference() == 1.0
    assert DPO(variant="ipo_sum", beta=0.25).loss_at_reference() == 4.0
    assert DPO(reference_free=True).loss_at_reference() is None


def test_reference_free_drops_the_reference_from_the_loss_and_keeps_it_in_the_rewards():
    stats = pair_stats([-3.0, -9.0], [-4.0, -2.0], [-1.0, -9.0], [-4.0, -5.0])
    out = DPO(reference_free=True).loss(stats, batch(2))
    same(out.terms[0].value.detach(), dpo(f64([-3.0, -9.0]), f64([-4.0, -2.0]), beta=0.1).tolist())
    same(out.metrics["rewards/chosen"][0], [-0.2, 0.0])
    same(out.metrics["rewards/rejected"][0], [0.0, 0.3])
    assert out.metrics["accuracy/logit"][0].tolist() == [1.0, 0.0]  # of -3 + 4 and -9 + 2
    assert out.metrics["rewards/accuracies"][0].tolist() == [0.0, 0.0]


def test_metrics_by_hand():
    stats = pair_stats(
        [-3.0, -9.0], [-4.0, -2.0], [-4.0, -9.0], [-4.0, -3.0],
    )  # fmt: skip
    found = means(DPO(beta=0.5).loss(stats, batch(2)))
    expected = {
        "rewards/chosen": 0.25,
        "rewards/rejected": 0.25,
        "rewards/margins": 0.0,
        "rewards/accuracies": 0.5,
        "accuracy/logit": 0.5,
    }
    assert found == pytest.approx(expected)


def test_ipo_mean_takes_the_sign_of_the_logit_from_means_over_tokens():
    """Sums 4 against 3, but 1 against 1.5 per token."""
    stats = pair_stats([4.0], [3.0], lengths=((4,), (2,)))
    assert DPO(variant="ipo_mean").loss(stats, batch(1)).metrics["accuracy/logit"][0].tolist() == [0.0]
    assert DPO(variant="ipo_sum").loss(stats, batch(1)).metrics["accuracy/logit"][0].tolist() == [1.0]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"variant": "sigmoid", "label_smoothing": 0.1}, "is not read by variant 'sigmoid'"),
        ({"variant": "robust", "label_smoothing": 0.5}, "expected 0 <= label_smoothing < 0.5"),
        ({"variant": "cdpo", "label_smoothing": -0.1}, "expected 0 <= label_smoothing < 0.5"),
        ({"variant": "ipo_mean"}, "needs chosen_lengths and rejected_lengths"),
        ({"variant": "ipo_sum", "chosen_lengths": torch.ones(3)}, "reads no lengths"),
        ({"variant": "ipo"}, "unknown variant 'ipo'"),
    ],
)
def test_function_refuses_what_it_does_not_read(knobs, message):
    with pytest.raises(ValueError, match=message):
        dpo(CHOSEN, REJECTED, beta=1.0, **knobs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": -1}, "method.beta: found -1, expected a finite number > 0"),
        ({"beta": 0.0}, "method.beta: found 0.0, expected a finite number > 0"),
        ({"beta": float("nan")}, "method.beta: found nan, expected a finite number > 0"),
        ({"variant": "ipo_sun"}, "method.variant: found 'ipo_sun', expected one of sigmoid"),
        ({"label_smoothing": 0.1}, "method.label_smoothing: found 0.1, expected 0 for variant sigmoid"),
        ({"variant": "cdpo"}, "method.label_smoothing: found 0.0, expected a number between 0 and 0.5"),
        ({"variant": "robust", "label_smoothing": 0.5}, "method.label_smoothing: found 0.5, expected a number between"),
        ({"variant": "cdpo", "label_smoothing": float("nan")}, "method.label_smoothing: found nan"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_in_one_line(fields, message):
    with pytest.raises(ConfigError) as error:
        DPO(**fields)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_describe_names_the_variant():
    assert DPO().describe() == "sigmoid, beta 0.1"
    assert DPO(variant="cdpo", label_smoothing=0.1).describe() == "cdpo, beta 0.1, label_smoothing 0.1"


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_where_policy_and_reference_are_equal_is_the_one_that_is_promised(variant):
    smoothed = {"label_smoothing": 0.1} if variant in ("cdpo", "robust") else {}
    method = DPO(variant=variant, **smoothed)
    stats = pair_stats([-3.0, -5.0], [-2.0, -7.0], [-3.0, -5.0], [-2.0, -7.0])
    losses = method.loss_of(stats, batch(2), method.first_state(stats, batch(2))).terms[0].value
    promised = method.loss_at_reference()
    if promised is None:
        assert variant == "r_dpo"
        promised = f64([math.log1p(math.exp(-0.05)), math.log1p(math.exp(0.05 * 3))])
    same(losses, torch.as_tensor(promised, dtype=torch.float64).expand(2).tolist())


SMALL = f64([0.4, -1.2, 0.0]), f64([-0.7, 0.3, 2.0])
LENGTHS = {"chosen_lengths": torch.tensor([4, 2, 3]), "rejected_lengths": torch.tensor([3, 5, 3])}


@pytest.mark.parametrize(
    ("variant", "settings", "tolerance"),
    [
        ("r_dpo", {"alpha": 0.0, **LENGTHS}, 1e-12),
        ("dpop", {"penalty_weight": 0.0}, 1e-12),
        ("f_alpha", {"alpha": 1e-9}, 1e-6),
        ("chi_po", {"exponent": 0.0, "log_weight": 1.0}, 1e-12),
    ],
)
def test_variants_at_the_end_of_their_range_are_dpo(variant, settings, tolerance):
    found = dpo(*SMALL, beta=0.3, variant=variant, **settings)
    assert torch.allclose(found, dpo(*SMALL, beta=0.3), rtol=tolerance, atol=tolerance)


def test_dpo_shift_of_factor_1_is_dpo_and_nca_without_its_middle_term_is_bco_without_shift():
    same(dpo_variants.dpo_shift(*SMALL, beta=0.3, factor=1.0), dpo(*SMALL, beta=0.3).tolist())
    same(dpo_variants.bco(*SMALL, beta=0.3), dpo(*SMALL, beta=0.3, variant="nca", biased=True).tolist())


def test_r_dpo_asks_less_of_a_longer_chosen_completion():
    """u = 0 and a chosen completion that is 10 tokens longer: -log s(10 alpha) is below ln 2, and above with minus."""
    lengths = {"chosen_lengths": torch.tensor([12]), "rejected_lengths": torch.tensor([2])}
    found = [
        dpo(f64([0.0]), f64([0.0]), beta=1.0, variant="r_dpo", alpha=0.1, sign=sign, **lengths)
        for sign in ("plus", "minus")
    ]
    same(torch.cat(found), [math.log1p(math.exp(-1)), math.log1p(math.exp(1))])


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"tau": 0.1}, "method.tau: found 0.1, expected nothing for variant sigmoid; discopop read it"),
        ({"variant": "dpop", "penalty_weight": -1.0}, "method.penalty_weight: found -1.0, expected a number > 0"),
        ({"variant": "exo", "eps": 0.5}, "method.eps: found 0.5, expected a number > 0 and < 0.5"),
        ({"variant": "f_alpha", "alpha": 1.0}, "method.alpha: found 1.0, expected a number > 0 and < 1 for f_alpha"),
        (
            {"variant": "nca", "reference_free": True},
            "method.reference_free: found True, expected false for variant nca",
        ),
        ({"variant": "dpop", "penalty": "nowhere"}, "method.penalty: found 'nowhere', expected one of inside_beta"),
    ],
)
def test_options_of_another_variant_or_out_of_range_are_refused(settings, line):
    with pytest.raises(ConfigError) as caught:
        DPO(**settings)
    assert str(caught.value).startswith(line)


def test_beta_and_options_default_to_those_of_the_variant():
    assert (DPO().beta, DPO(variant="sigmoid_norm").beta, DPO(variant="nca", beta=0.2).beta) == (0.1, 5.0, 0.2)
    assert DPO(variant="dpop").describe() == "dpop, beta 0.3, penalty_weight 50, penalty inside_beta"


def test_the_card_of_a_variant_shows_its_own_equation_and_paper():
    method = DPO(variant="apo_zero")
    assert method.equation() == "1 - s(beta D_w) + s(beta D_l)"
    assert "2408.06266" in method.paper()
