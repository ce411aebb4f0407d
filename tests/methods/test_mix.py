import math
import re

import pytest
import torch

from prefopt.errors import ConfigError
from prefopt.methods.dpo import DPO
from prefopt.methods.mix import Part
from prefopt.methods.simpo import SimPO
from prefopt.settings import from_dict, parse
from tests.invariant.oracle import oracle_step
from tests.invariant.steps import BOUNDS, Bench, difference, random_pairs, two_models
from tests.methods.make_stats import batch, pair_stats

LN2 = math.log(2)


def of(text):
    return parse(["--method", "mix", "--method.parts", text]).method


def test_mix_is_the_weighted_sum_of_its_parts():
    stats = pair_stats([-3.0, -6.0], [-5.0, -1.0], [-4.0, -5.0], [-4.0, -2.0])
    out = of("dpo:0.5,simpo:2,nll:0.1").loss(stats, batch(2))
    first, second = (method.loss(stats, batch(2)) for method in (DPO(), SimPO()))
    assert [(term.name, term.weight) for term in out.terms] == [("dpo/loss", 0.5), ("simpo/loss", 2), ("nll/nll", 0.1)]
    assert [term.count.tolist() for term in out.terms] == [[1, 1], [1, 1], [4, 2]]
    for found, method in zip(out.terms, (first, second), strict=False):
        assert found.value.tolist() == method.terms[0].value.tolist()
    for name, value in first.metrics.items():
        assert torch.equal(out.metrics[f"dpo/{name}"][0], value[0])
        if name.startswith("rewards/"):
            assert torch.equal(out.metrics[name][0], value[0])


def test_a_part_alone_with_weight_1_is_its_method():
    stats = pair_stats([-3.0, -6.0], [-5.0, -1.0])
    (term,) = of("sigmoid:1").loss(stats, batch(2)).terms
    assert term.value.tolist() == DPO().loss(stats, batch(2)).terms[0].value.tolist()


def test_needs_are_those_of_all_parts_together():
    needs = of("simpo:1,wpo:1,tdpo:1,alpha_dpo:1,bco:1,rebel:1").needs
    assert (needs.reference, needs.statistics) == ("token", ("log_sum_p2",))
    assert needs.batch_values == ("alpha_dpo/margins", "bco/rewards")
    assert needs.state.keys() == {f"alpha_dpo/{n}" for n in ("mean", "std", "steps")} | {"bco/delta", "bco/delta_count"}
    assert [column.name for column in needs.columns] == ["chosen_score", "rejected_score"]
    assert of("simpo:1,nll:1").needs.reference == "none"
    assert not of("dpo:1,nll:1").needs.with_state


def test_loss_at_the_reference_is_known_where_that_of_every_part_is():
    stats = pair_stats([-3.0], [-5.0], [-3.0], [-5.0], ((4,), (3,)))
    method = of("sigmoid:0.5,apo_zero:2,nca:1")
    assert method.loss_at_reference() == pytest.approx(0.5 * LN2 + 2 + 2 * LN2)
    found = sum(term.weight * term.value for term in method.loss(stats, batch(1)).terms)
    assert found.tolist() == pytest.approx([method.loss_at_reference()])
    assert of("sigmoid:0.5,nll:1").loss_at_reference() is None


@pytest.mark.parametrize("micro", [8, 3])
def test_step_of_parts_that_read_tokens_batch_and_state_is_the_oracles_however_it_is_cut(micro, runtime):
    method = of("aot:0.5,bco:0.2,alpha_dpo:0.3,wpo:1,ld_dpo:1,tdpo:0.1,tis_dpo:1,tgdpo:1,nll:0.1")
    models, pairs = two_models(torch.float64), random_pairs()
    gap, where = difference(oracle_step(*models, method, pairs), Bench(runtime, method, models).step(pairs, micro))
    assert gap <= BOUNDS[torch.float64], where


@pytest.mark.parametrize(
    "text",
    [
        "dpo:0.8,bco:0.2,nll:1.0",
        "[{name: dpo, weight: 0.8, beta: 0.2, variant: ipo_mean}, bco:0.2, {name: nll, reduction: sum}]",
        "{dpo: 1, nll: 0.125}",
    ],
)
def test_parts_from_text_yaml_and_the_run_card_are_the_same(text, tmp_path):
    config = parse(["--method", "mix", "--method.parts", text])
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    (tmp_path / "own.yaml").write_text(f"method:\n  name: mix\n  parts: {text if text[0] in '[{' else f'[{text}]'}\n")
    assert from_dict(config.to_dict()) == config
    for name in ("run.yaml", "own.yaml"):
        again = parse(["--config", str(tmp_path / name)])
        assert (again.method, hash(again.method)) == (config.method, hash(config.method))


def test_a_parts_settings_have_the_types_that_its_method_declares():
    (part,) = of("[{name: bco, beta: 1, delta: none}]").parts
    assert part == Part("bco", 1.0, (("beta", 1.0), ("delta", "none")))
    assert isinstance(part.settings[0][1], float)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dpoo:1", "unknown part 'dpoo'; did you mean 'dpo'? expected nll, a method or a variant"),
        ("rpo:1", "method 'rpo' is ambiguous"),
        ("dpo:x", "part 'dpo': weight: found 'x', expected a number"),
        ("dpo:0", "part 'dpo': weight: found 0.0, expected a finite number > 0"),
        ("dpo:1,dpo:2", "part 'dpo': found it twice"),
        ("sft:1", "part 'sft': it reads rows chosen_only, expected a loss of pairs (likelihood of the chosen"),
        ("reward_model:1", "part 'reward_model': it trains a classifier"),
        ("thought_po:1", "part 'thought_po': it trains completions with thoughts"),
        ("mix:1", "part 'mix': a mixture is no part of a mixture"),
        ("[{name: dpo, betta: 3}]", "part 'dpo' has no setting 'betta'; did you mean 'beta'?"),
        ("[{name: dpo, beta: -3}]", "part 'dpo': beta: found -3.0, expected a finite number > 0"),
        ("[{name: nll, reduction: mean}]", "part 'nll': reduction: found 'mean', expected one of token_mean"),
        ("[{weight: 3}]", "found {'weight': 3}, expected a name and a weight such as nll:0.5"),
        ("", "found (), expected a name and a weight"),
    ],
)
def test_bad_parts_are_refused_in_one_line_that_names_them(text, said):
    with pytest.raises(ConfigError, match=rf"^(--)?method\.parts: {re.escape(said)}"):
        of(text)
