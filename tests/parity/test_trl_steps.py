"""The losses that TRL has too: three steps of our trainer are three steps of its DPOTrainer.

The policy is not the reference, rows are ragged, both sides take the same token ids in two micro-batches, without
clipping. What differs on the way from text to ids is in test_trl_tokens.
"""

from dataclasses import replace

import pytest
import torch

from prefopt import registry
from prefopt.engine import trainer as trainer_module
from prefopt.methods import dpo as dpo_module
from prefopt.methods import sppo as sppo_module
from tests.helpers import byte_bpe_tokenizer
from tests.invariant.faults import mask_shifted, states_shifted
from tests.invariant.steps import random_pairs, two_models
from tests.parity.trajectory import BATCH, BOUNDS, beyond, ours

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")

# ours: (method, its settings, TRL's, learning rate)
LOSSES = {
    "sigmoid": ("dpo", {}, {"loss_type": ["sigmoid"]}, 0.1),
    "ipo_mean": ("dpo", {"variant": "ipo_mean"}, {"loss_type": ["ipo"]}, 0.1),
    "hinge": ("dpo", {"variant": "hinge"}, {"loss_type": ["hinge"]}, 0.1),
    "robust": (
        "dpo",
        {"variant": "robust", "label_smoothing": 0.1},
        {"loss_type": ["robust"], "label_smoothing": 0.1},
        0.1,
    ),
    "sppo_hard": ("sppo", {"variant": "hard", "beta": 0.1}, {"loss_type": ["sppo_hard"]}, 1e-3),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def rows(seed):
    """Ragged pairs of which every token is scored: TRL knows no mask with holes."""
    return [
        replace(p, chosen_mask=[True] * len(p.chosen_ids), rejected_mask=[True] * len(p.rejected_ids))
        for p in random_pairs(pairs=BATCH, seed=seed)
    ]


BATCHES = [rows(0)] * 3  # the same pairs in each step: that the loss moves is the steps' doing


@pytest.fixture(scope="module")
def models():
    return two_models(torch.float32)


@pytest.fixture(scope="module")
def theirs(models, tmp_path_factory):
    """TRL's trajectory for each loss, made once."""
    from tests.parity import trl_side

    torch.set_num_threads(1)
    tokenizer, folder, made = byte_bpe_tokenizer(["a b c"]), tmp_path_factory.mktemp("trl"), {}

    def ask(name):
        if name not in made:
            _, _, settings, lr = LOSSES[name]
            made[name] = trl_side.trajectory(models, BATCHES, lr, tokenizer, folder, beta=0.1, **settings)
        return made[name]

    return ask


@pytest.fixture
def our(runtime, models):
    def run(name, batches=BATCHES, scale=1, **changes):
        method, settings, _, lr = LOSSES[name]
        return ours(runtime, registry.get(method)(**{**settings, **changes}), models, batches, lr * scale)

    return run


@each_loss
def test_steps_when_ids_are_the_same_then_loss_gradients_and_update_are_trls(name, theirs, our):
    expected, found = theirs(name), our(name)
    assert len(expected.losses) == len(found.losses) == 3
    assert abs(expected.losses[-1] / expected.losses[0] - 1) > 0.01, "the loss has hardly moved"
    assert not beyond(expected, found)


@each_loss
def test_rows_when_they_reach_the_models_then_ids_and_masks_are_trls(name, theirs, our):
    expected, found = theirs(name), our(name)
    for model in ("policy", "reference"):
        assert len(expected.seen[model]) == 3 * 2 * BATCH
        assert sorted(found.seen[model]) == sorted(expected.seen[model])


def test_soft_sppo_when_the_probabilities_are_hard_then_it_is_half_of_trls(theirs, our):
    """The paper has a factor 1/2 that TRL leaves out: half its loss and gradients, the same steps at twice the rate."""
    certain = {"chosen_win_prob": 1.0, "rejected_win_prob": 0.0}
    found = our("sppo_hard", [[replace(p, columns=certain) for p in b] for b in BATCHES], scale=2, variant="soft")
    doubled = [{name: 2 * tensor for name, tensor in gradients.items()} for gradients in found.gradients]
    found = replace(found, losses=[2 * loss for loss in found.losses], gradients=doubled)
    assert not beyond(theirs("sppo_hard"), found)


# Faults on our side: the comparison sees each of them, in all of its figures.


@each_loss
def test_comparison_when_the_sign_of_the_loss_is_flipped_then_it_fails(name, theirs, our, monkeypatch):
    module = {"dpo": dpo_module, "sppo": sppo_module}[LOSSES[name][0]]
    loss = getattr(module, LOSSES[name][0])
    monkeypatch.setattr(module, loss.__name__, lambda *args, **settings: -loss(*args, **settings))
    assert beyond(theirs(name), our(name)).keys() == BOUNDS.keys()


@each_loss
@pytest.mark.parametrize("fault", [mask_shifted, states_shifted], ids=lambda fault: fault.__name__)
def test_comparison_when_the_mask_is_shifted_then_it_fails(fault, name, theirs, our, monkeypatch):
    monkeypatch.setattr(trainer_module, "collate", fault)
    assert beyond(theirs(name), our(name)).keys() == BOUNDS.keys()


def test_comparison_when_label_smoothing_is_dropped_then_it_fails(theirs, our, monkeypatch):
    loss = dpo_module.dpo
    monkeypatch.setattr(dpo_module, "dpo", lambda *args, **kw: loss(*args, **{**kw, "label_smoothing": 0.0}))
    assert beyond(theirs("robust"), our("robust")).keys() == BOUNDS.keys()
