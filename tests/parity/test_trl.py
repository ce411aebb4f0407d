"""Against TRL: three steps of our trainer are three steps of its DPOTrainer, and how the ids that lead there differ.

All that imports TRL is in this file, since the import takes seconds. docs/against_trl.md quotes what is found here.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefopt import registry
from prefopt.methods import dpo as dpo_module
from prefopt.methods import sppo as sppo_module
from prefopt.training import batching
from tests.helpers import byte_bpe_tokenizer
from tests.invariant.faults import mask_shifted, states_shifted
from tests.invariant.steps import random_pairs, two_models
from tests.parity import differences
from tests.parity.rows import CHAT_TOKENIZERS, PLAIN_TOKENIZERS, chat, plain, tokenizer
from tests.parity.trajectory import BATCH, BOUNDS, beyond, ours

ROOT = Path(__file__).parents[2]
HARMLESS = ROOT.parent / "shared" / "data" / "hh-harmless" / "train.jsonl"
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")

# Steps. The policy is not the reference, rows are ragged, both sides take the same token ids in two micro-batches of
# four, without clipping.

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
WHOLE = {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1}  # TRL sorts within a micro-batch
# variants that differ from these in a formula of the same log-ratios: their steps are compared, the faults not again
VARIANTS = {
    "sigmoid_norm": ("dpo", {"variant": "sigmoid_norm", "beta": 0.1}, {"loss_type": ["sigmoid_norm"]}, 0.1),
    "apo_zero": ("dpo", {"variant": "apo_zero"}, {"loss_type": ["apo_zero"]}, 0.1),
    "apo_down": ("dpo", {"variant": "apo_down"}, {"loss_type": ["apo_down"]}, 0.1),
    "exo_pair": (
        "dpo",
        {"variant": "exo", "beta": 0.1, "eps": 0.1},
        {"loss_type": ["exo_pair"], "label_smoothing": 0.1},
        0.1,
    ),
    "nca_pair": ("dpo", {"variant": "nca", "beta": 0.1}, {"loss_type": ["nca_pair"]}, 0.1),
    "bco_pair": ("dpo", {"variant": "bco", "beta": 0.1, "delta": "none"}, {"loss_type": ["bco_pair"]}, 0.1),
    "aot": ("dpo", {"variant": "aot", "beta": 0.1}, {"loss_type": ["aot"]} | WHOLE, 0.1),
    "aot_unpaired": ("dpo", {"variant": "aot_unpaired", "beta": 0.1}, {"loss_type": ["aot_unpaired"]} | WHOLE, 0.1),
    "discopop": ("dpo", {"variant": "discopop", "beta": 0.1}, {"loss_type": ["discopop"]}, 0.1),
    "f_js": ("dpo", {"variant": "f_js"}, {"loss_type": ["sigmoid"], "f_divergence_type": "js_divergence"}, 0.1),
    "f_alpha": (
        "dpo",
        {"variant": "f_alpha", "alpha": 0.3},
        {"loss_type": ["sigmoid"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
        0.1,
    ),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def rows(seed):
    """Ragged pairs of which every token is scored: TRL knows no mask with holes."""
    return [
        replace(p, chosen_mask=[True] * len(p.chosen_ids), rejected_mask=[True] * len(p.rejected_ids))
        for p in random_pairs(pairs=BATCH, seed=seed)
    ]


MAX_LENGTH = 48  # at which about half of the plain rows are cut
BATCHES = [rows(0)] * 3  # the same pairs in each step: that the loss moves is the steps' doing


@pytest.fixture(scope="module")
def models():
    return two_models(torch.float32)


@pytest.fixture(scope="module")
def theirs(models, tmp_path_factory):
    """TRL's trajectory for each loss, made once."""
    from tests.parity import trl_side

    torch.set_num_threads(1)
    any_tokenizer, folder, made = byte_bpe_tokenizer(["a b c"]), tmp_path_factory.mktemp("trl"), {}

    def ask(name):
        if name not in made:
            _, _, settings, lr = (LOSSES | VARIANTS)[name]
            made[name] = trl_side.trajectory(models, BATCHES, lr, any_tokenizer, folder, beta=0.1, **settings)
        return made[name]

    return ask


@pytest.fixture
def our(runtime, models):
    def run(name, batches=BATCHES, scale=1, **changes):
        method, settings, _, lr = (LOSSES | VARIANTS)[name]
        return ours(runtime, registry.get(method)(**{**settings, **changes}), models, batches, lr * scale)

    return run


@pytest.mark.parametrize("name", LOSSES | VARIANTS)
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
    monkeypatch.setattr(batching, "collate", fault)
    assert beyond(theirs(name), our(name)).keys() == BOUNDS.keys()


def test_comparison_when_label_smoothing_is_dropped_then_it_fails(theirs, our, monkeypatch):
    loss = dpo_module.dpo
    monkeypatch.setattr(dpo_module, "dpo", lambda *args, **kw: loss(*args, **{**kw, "label_smoothing": 0.0}))
    assert beyond(theirs("robust"), our("robust")).keys() == BOUNDS.keys()


# Ids and masks.


@pytest.fixture(scope="module")
def page():
    return (ROOT / "docs" / "against_trl.md").read_text()


@pytest.fixture
def both(tmp_path):
    """(our rows, TRL's rows) of the same file."""
    from tests.parity import trl_side

    def both(rows, tokenizer, max_length=512):
        theirs = trl_side.encoded(rows, tokenizer, tmp_path, max_length=max_length)
        return differences.ours(rows, tokenizer, tmp_path, max_length), theirs

    return both


@pytest.mark.parametrize(("rows", "tokenizers"), [(plain, PLAIN_TOKENIZERS), (chat, CHAT_TOKENIZERS)])
def test_rows_when_encoded_by_both_then_differ_as_the_page_says(rows, tokenizers, both, page):
    counts = {}
    for name, settings in tokenizers.items():
        made = tokenizer(**settings)
        counts[name] = differences.count(*both(rows(), made), made)
    assert len(rows()) == 50
    assert not any("other ids" in column for column in counts.values())
    assert differences.table(counts) in page


def test_dialogues_when_encoded_by_both_then_differ_as_the_page_says(both, page):
    if not HARMLESS.exists():
        pytest.skip("the dialogues are not part of the repository")
    rows, made = [json.loads(line) for line in HARMLESS.read_text().splitlines()[:50]], tokenizer()
    counts = differences.count(*both(rows, made, 4096), made)
    assert differences.table({"HH dialogues": counts}) in page


def test_boundary_when_a_token_spans_it_then_trl_scores_a_piece_of_the_prompt(both):
    rows, made = plain(), tokenizer()
    ours, theirs = both(rows, made)
    spanning = [i for i, row in enumerate(ours) if getattr(row, "reason", "") == "token spans the boundary"]
    assert spanning
    for i in spanning:
        scored = [
            made.decode([token for token, keep in zip(*theirs[i][side], strict=True) if keep]) for side in theirs[i]
        ]
        assert any(text != rows[i][side] + made.eos_token for text, side in zip(scored, theirs[i], strict=True))


def test_rows_when_too_long_then_are_cut_as_the_page_says(both, page):
    made = tokenizer()
    whole, _ = both(plain(), made)
    ours, theirs = both(plain(), made, MAX_LENGTH)
    good = [i for i, row in enumerate(whole) if isinstance(row, dict)]
    whole, ours, theirs = ([rows[i] for i in good] for rows in (whole, ours, theirs))
    counts = {
        "TRL": differences.cuts(theirs, whole, made.eos_token_id),
        "prefopt": differences.cuts(ours, whole, made.eos_token_id),
    }
    assert differences.table(counts) in page
