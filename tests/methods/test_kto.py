import math

import pytest
import torch

from prefopt.errors import ConfigError
from prefopt.methods.kto import KTO, kto
from prefopt.types import LABEL, LossState, PairStats
from tests.methods.make_stats import batch, f64, means


def stats_of(logps, ref):
    return PairStats(f64(logps, grad=True), None, torch.ones(len(logps)), None, chosen_ref_logps=f64(ref))


def test_loss_is_the_saturating_one_of_either_label():
    out = KTO(beta=1.0, undesirable_weight=2.0).loss(
        stats_of([math.log(3), math.log(3)], [0.0, 0.0]),
        batch(2, **{LABEL.name: [1, 0]}),
        LossState({"mismatched": f64([0.0])}),
    )
    assert out.terms[0].value.tolist() == pytest.approx([0.25, 2 * 0.75])
    assert means(out) == pytest.approx(
        {
            "rewards/chosen": math.log(3),
            "rewards/rejected": math.log(3),
            "logps/chosen": math.log(3),
            "logps/rejected": math.log(3),
            "z0": 0.0,
        }
    )


def test_reference_point_has_no_gradient_and_is_not_negative():
    stats, rows = stats_of([1.0, -1.0], [0.0, 0.0]), batch(2, **{LABEL.name: [1, 0]})
    below = KTO().loss(stats, rows, LossState({"mismatched": f64([-4.0, 1.0])}))
    assert (
        below.terms[0].value.tolist()
        == KTO().loss(stats, rows, LossState({"mismatched": f64([0.0])})).terms[0].value.tolist()
    )
    loss = kto(f64([1.0], grad=True), f64([1.0]), f64(0.5), beta=2.0)
    assert loss.item() == pytest.approx(1 / (1 + math.exp(1.0)))


def test_desirable_completions_become_likelier_and_others_less_likely():
    stats = stats_of([0.0, 0.0], [0.0, 0.0])
    KTO().loss(stats, batch(2, **{LABEL.name: [1, 0]}), LossState({"mismatched": f64([0.0])})).terms[
        0
    ].value.sum().backward()
    assert stats.chosen_logps.grad.tolist() == pytest.approx([-0.025, 0.025])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "method.beta: found 0.0, expected a finite number > 0"),
        ({"desirable_weight": -1.0}, "method.desirable_weight: found -1.0, expected a finite number >= 0"),
        (
            {"desirable_weight": 0.0, "undesirable_weight": 0.0},
            "method.desirable_weight: found 0.0, expected one of the two",
        ),
        ({"z0": "batch"}, "method.z0: found 'batch', expected one of global_batch, micro_batch, process_means"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        KTO(**settings)
    assert str(caught.value).startswith(message)


def test_options_that_depend_on_the_cut_say_so():
    assert not KTO().depends_on_cut
    assert KTO(z0="micro_batch").depends_on_cut
    assert KTO(z0="process_means").depends_on_cut
