"""A sweep file becomes runs: which, with what settings, in what order, under what names."""

import pytest

from prefopt import settings as config
from prefopt.errors import ConfigError


def settings(runs):
    return [dict(run.settings) for run in runs]


def test_grid_is_all_combinations_in_the_order_of_the_file(runs):
    found = runs("""
        fixed: {train.max_steps: 5}
        grid: {method: [dpo, sppo], seed: [0, 1]}
    """)
    assert settings(found) == [
        {"train.max_steps": 5, "method": method, "seed": seed} for method in ("dpo", "sppo") for seed in (0, 1)
    ]
    assert found[0].argv == ("--train.max_steps=5", "--method=dpo", "--seed=0", f"--output={found[0].output}")
    assert found[0].output == f"runs/sweeps/sweep/runs/{found[0].id}"


def test_nested_and_dotted_keys_are_one_vocabulary(runs):
    dotted = runs("fixed: {method: tdpo, method.alpha: 0.3, optim.lr: 1e-3}\ngrid: {optim.args.eps: [1e-6]}")
    nested = runs("fixed: {method: {name: tdpo, alpha: 0.3}, optim: {lr: 1e-3}}\ngrid: {optim: {args: {eps: [1e-6]}}}")
    assert [run.id for run in dotted] == [run.id for run in nested]
    assert settings(dotted) == settings(nested)


def test_entries_of_the_list_meet_every_point_of_the_grid(runs):
    found = runs("""
        list: [{method: dpo}, {method: dpo, method.variant: hinge}]
        grid: {seed: [0, 1]}
    """)
    assert [(s["seed"], s.get("method.variant")) for s in settings(found)] == [
        (0, None),
        (0, "hinge"),
        (1, None),
        (1, "hinge"),
    ]


def test_key_under_a_condition_is_set_only_where_it_holds_and_equal_runs_are_one(runs):
    found = runs("""
        grid: {method: [dpo, tdpo], method.variant: [tdpo1, tdpo2], method.alpha: [0.3, 0.5]}
        where: {method.variant: {method: tdpo}, method.alpha: {method.variant: [tdpo2]}}
    """)
    assert settings(found) == [
        {"method": "dpo"},
        {"method": "tdpo", "method.variant": "tdpo1"},
        {"method": "tdpo", "method.variant": "tdpo2", "method.alpha": 0.3},
        {"method": "tdpo", "method.variant": "tdpo2", "method.alpha": 0.5},
    ]


SPACES = "optim.lr: {loguniform: [1e-5, 1e-3]}, method.beta: {uniform: [0.1, 0.5]}"


def test_draws_are_the_same_for_every_method_and_more_of_them_change_none(runs):
    few = runs(f"grid: {{method: [dpo, sppo]}}\nrandom: {{draws: 2, {SPACES}}}")
    more = runs(f"grid: {{method: [dpo, sppo]}}\nrandom: {{draws: 4, {SPACES}, seed: {{choice: [3, 4, 5]}}}}")
    drawn = [[(s["optim.lr"], s["method.beta"]) for s in settings(found)] for found in (few, more)]
    assert drawn[0] == [*drawn[1][:2], *drawn[1][4:6]]
    assert drawn[0][:2] == drawn[0][2:]
    assert len(set(drawn[1])) == 4
    assert all(1e-5 <= lr <= 1e-3 and 0.1 <= beta <= 0.5 for lr, beta in drawn[1])
    assert {s["seed"] for s in settings(more)} <= {3, 4, 5}
    again = runs(f"grid: {{method: [dpo, sppo]}}\nrandom: {{draws: 2, draw_seed: 1, {SPACES}}}")
    assert settings(again) != settings(few)


def test_loguniform_spends_as_many_draws_on_each_power_of_ten(runs):
    found = runs("fixed: {method: dpo}\nrandom: {draws: 300, optim.lr: {loguniform: [1e-6, 1e-3]}}")
    rates = [s["optim.lr"] for s in settings(found)]
    counts = [sum(low <= rate < 10 * low for rate in rates) for low in (1e-6, 1e-5, 1e-4)]
    assert sum(counts) >= 298  # rounding may put one on an edge
    assert all(70 <= count <= 130 for count in counts)


def test_id_is_of_the_settings_alone(runs, write):
    ids = {run.id for run in runs("output: here\ngrid: {seed: [0, 1]}\nfixed: {method: dpo, train.max_steps: 5}")}
    (write("").parent / "method.yaml").write_text("method: dpo\ntrain: {max_steps: 5}")
    same = runs("""
        output: there
        fixed: {config: method.yaml, train.save_every: 7, optim.lr: 0.002}
        list: [{seed: 1}, {seed: 0, optim.clip: 1.0}]
    """)
    assert {run.id for run in same} == ids  # a file, a default that is spelled out, what moves no trajectory
    other = runs("grid: {seed: [0, 1]}\nfixed: {method: dpo, train.max_steps: 6}")
    assert not ids & {run.id for run in other}
    assert all(run.id.startswith("dpo-") for run in other)


@pytest.mark.parametrize(
    ("key", "value", "flag"),
    [
        ("optim.clip", "none", "--optim.clip=none"),
        ("train.group_by_length", "false", "--train.group_by_length=false"),
        ("lora.target_modules", "[q_proj, v_proj]", "--lora.target_modules=q_proj,v_proj"),
        ("optim.args.betas", "[0.9, 0.95]", "--optim.args.betas=[0.9, 0.95]"),
        ("train.threads", "null", "--train.threads=none"),
    ],
)
def test_values_reach_the_run_as_flags(runs, key, value, flag):
    if key == "optim.clip":
        value = "-1"
        with pytest.raises(ConfigError, match=r"run 1 of 1: optim.clip: found -1.0, expected a number >= 0"):
            runs(f"fixed: {{method: dpo, {key}: {value}}}")
        return
    (run,) = runs(f"fixed: {{method: dpo, {key}: {value}}}")
    assert flag in run.argv
    config.parse(run.argv)


FILES = "model.path: base, data.train: pairs.jsonl"


def test_start_comes_first_and_the_others_take_its_model(runs):
    found = runs(f"""
        fixed: {{{FILES}, method.beta: 0.5, optim.lr: 1e-4}}
        start: {{method: sft, train.max_steps: 3, per: [seed]}}
        grid: {{method: [dpo, sppo], seed: [0, 1]}}
    """)
    starts, others = found[:2], found[2:]
    assert [run.argv[:6] for run in starts] == [
        (
            *("--model.path=base", "--data.train=pairs.jsonl", "--optim.lr=0.0001", f"--seed={seed}"),
            *("--method=sft", "--train.max_steps=3"),
        )
        for seed in (0, 1)
    ]
    assert len(others) == 4
    for run in others:
        start = starts[run.settings["seed"]]
        assert run.after == (start.id,)
        assert f"--model.path={start.output}/model" in run.argv
    # where the sweep lies is no part of what its runs are
    moved = runs(f"""
        output: elsewhere
        fixed: {{{FILES}, method.beta: 0.5, optim.lr: 1e-4}}
        start: {{method: sft, train.max_steps: 3, per: [seed]}}
        grid: {{method: [dpo, sppo], seed: [0, 1]}}
    """)
    assert [run.id for run in moved] == [run.id for run in found]
    changed = runs(f"""
        fixed: {{{FILES}, method.beta: 0.5, optim.lr: 1e-4}}
        start: {{method: sft, train.max_steps: 4, per: [seed]}}
        grid: {{method: [dpo, sppo], seed: [0, 1]}}
    """)
    assert not {run.id for run in changed} & {run.id for run in found}


@pytest.mark.parametrize(
    ("budget", "flags"),
    [
        ("{match: steps, value: 40}", ["--train.max_steps=40"] * 2),
        ("{match: pairs, value: 64}", ["--train.max_steps=16", "--train.max_steps=8"]),
        ("{match: tokens, value: 1e5}", ["--train.max_tokens=100000"] * 2),
        ("{match: wall, value: 90}", ["--train.max_seconds=90.0"] * 2),
    ],
)
def test_budget_ends_every_run_at_the_same(runs, budget, flags):
    found = runs(f"fixed: {{method: dpo}}\ngrid: {{train.global_batch: [4, 8]}}\nbudget: {budget}")
    assert [run.argv[-2] for run in found] == flags


# What is wrong with a file -------------------------------------------------------------------------------------------

BASE = "fixed: {method: dpo}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- dpo", "found a list, expected keys such as 'fixed:' and 'grid:'"),
        ("grit: {seed: [1]}", "grit: unknown, expected output, fixed, grid, list, random, where, start, budget"),
        ("method: dpo", "method: unknown, expected output, fixed"),
        ("grid: {seed: [0]}", "no run has a method; give it under fixed, grid or list"),
        ("fixed: {method: dpo, seed: 1, seed: 2}", ":1: not readable as YAML: key 'seed' given twice"),
        ("fixed: {method: dpo, optim.lr: 1, optim: {lr: 2}}", "fixed.optim.lr: given twice"),
        (BASE + "fixed2: 3", "fixed2: unknown"),
        (BASE + "output: 3", "output: found 3, expected a folder"),
        ("fixed: dpo", "fixed: found 'dpo', expected settings such as 'optim.lr: ...'"),
        (BASE + "grid: {seed: 3}", "grid.seed: found 3, expected a list of values"),
        (BASE + "grid: {seed: []}", "grid.seed: found [], expected a list of values"),
        (BASE + "grid: {method: [sppo]}", "grid.method: given in fixed too; remove one"),
        (BASE + "grid: {output: [a]}", "grid.output: the sweep sets it for each run; remove it"),
        (BASE + "list: {seed: 1}", "list: found {'seed': 1}, expected a list of settings, such as"),
        (BASE + "list: [3]", "list[0]: found 3, expected settings"),
        (BASE + "random: {optim.lr: {loguniform: [1, 2]}}", "random.draws: found None, expected a whole number"),
        (BASE + "random: {draws: 0, optim.lr: {uniform: [1, 2]}}", "random.draws: found 0, expected a whole number"),
        (BASE + "random: {draws: 2}", "random: found {'draws': 2}, expected at least one space"),
        (BASE + "random: {draws: 2, seed: 3}", "random.seed: found 3, expected one of uniform: [0, 1], loguniform"),
        (
            BASE + "random: {draws: 2, optim.lr: {loguniforn: [1, 2]}}",
            "random.optim.lr.loguniforn: found [1, 2], expected one of uniform: [0, 1], loguniform: [1e-6, 1e-4], "
            "choice: [a, b]; did you mean 'loguniform'?",
        ),
        (
            BASE + "random: {draws: 2, optim.lr: {loguniform: [0, 2]}}",
            "random.optim.lr.loguniform: found [0, 2], expected two numbers above 0",
        ),
        (
            BASE + "random: {draws: 2, optim.lr: {uniform: [2, 1]}}",
            "random.optim.lr.uniform: found [2, 1], expected two numbers, the lower one first",
        ),
        (BASE + "where: {seed: {method: dpo}}", "where.seed: no run sets 'seed', expected a setting of fixed, grid"),
        (
            BASE + "grid: {seed: [1]}\nwhere: {seed: {methot: dpo}}",
            "where.seed.methot: no run sets 'methot', expected a setting of fixed, grid, list or random; did you mean "
            "'method'?",
        ),
        (BASE + "grid: {seed: [1]}\nwhere: {seed: dpo}", "where.seed: found 'dpo', expected other settings"),
        (BASE + "grid: {seed: [1]}\nwhere: {seed: {method: sft}}", "where.seed: no run meets these conditions"),
        (
            BASE + "grid: {seed: [1], optim.lr: [1]}\nwhere: {seed: {optim.lr: 1}, optim.lr: {seed: 1}}",
            "where.seed: conditions run in a circle: seed -> optim.lr",
        ),
        (
            BASE + "budget: {match: token, value: 3}",
            "budget.match: found 'token', expected one of steps, pairs, tokens",
        ),
        (BASE + "budget: {match: steps, value: 2.5}", "budget.value: found 2.5, expected a number of steps"),
        (BASE + "budget: {match: wall, value: 0}", "budget.value: found 0, expected seconds > 0"),
        (BASE + "budget: {match: wall, valve: 0}", "budget.valve: unknown, expected match and value"),
        (
            "fixed: {method: dpo, testbed.pairs: 99, train.tokens_per_batch: 64}\nbudget: {match: pairs, value: 99}",
            "run 1 of 1: budget.match: found 'pairs', but train.tokens_per_batch varies the pairs per step",
        ),
        (
            BASE + "budget: {match: pairs, value: 1000}",
            "run 1 of 1: budget.value: 1,000 pairs are not a whole number of steps of train.global_batch 512, "
            "expected e.g. 1,024",
        ),
        (
            "fixed: {method: dpo, train.max_steps: 3}\nbudget: {match: steps, value: 2}",
            "fixed.train.max_steps: given together with budget, which ends the runs; remove it",
        ),
        (
            BASE + "start: {train.max_steps: 3}",
            "start.method: not given, expected the method of the start run, such as sft",
        ),
        (
            BASE + "start: {method: sft, per: [seeed]}\ngrid: {seed: [1]}",
            "start.per: 'seeed' does not vary, expected a setting of grid, list or random; did you mean 'seed'?",
        ),
        (
            BASE + "start: {method: sft, seed: 3, per: [seed]}\ngrid: {seed: [1]}",
            "start.seed: given here and in start.per; remove one",
        ),
        (
            "fixed: {method: dpo, data.train: p}\nstart: {method: sft}\ngrid: {model.path: [a, b]}",
            "grid.model.path: the runs start from the start run's model; name model.path in start.per, "
            "or give it under fixed",
        ),
        (BASE + "start: {method: sft}", "run 1 of 1: model.path: given without data.train"),
        (BASE + "minimize: loss", "minimize: given without search; add 'search: optuna' or remove it"),
        (BASE + "search: hyperband", "search: found 'hyperband', expected optuna"),
        (BASE + "search: optuna", "search: expected one metric of the evaluations, such as 'maximize: exact/reward'"),
        (BASE + "search: optuna\nminimize: loss", "search: found no spaces; give some under random"),
        # settings, which the run itself would refuse
        (
            "fixed: {method: dpo}\ngrid: {seed: [0, 1], optim.lrr: [1]}",
            "run 1 of 2 (seed=0, optim.lrr=1): optim.lrr: unknown setting; did you mean 'optim.lr'?",
        ),
        (
            "grid: {method: [dpo, sppo], method.target_clamp: [0.5]}",
            "run 1 of 2 (method=dpo, method.target_clamp=0.5): method.target_clamp: method 'dpo' has no "
            "'target_clamp'; it belongs to sppo",
        ),
        (
            "fixed: {method: dpo}\nlist: [{optim.lr: 1e-3}, {optim.lr: fast}]",
            "run 2 of 2 (optim.lr=fast): optim.lr: found 'fast', expected a number",
        ),
        (
            "fixed: {method: dpo}\nrandom: {draws: 1000000000, seed: {choice: [1]}}",
            "1,000,000,000 combinations",
        ),
        ("grid: {method: [dpo, tdpu]}", "run 2 of 2 (method=tdpu): unknown method 'tdpu'; did you mean 'tdpo'?"),
        (
            "fixed: {method: dpo, generate.stop: ['a b', c]}",
            "run 1 of 1: generate.stop: found ['a b', 'c'], whose items contain commas or spaces; give it in a",
        ),
    ],
)
def test_mistake_is_one_line_that_says_where_before_anything_starts(runs, text, expected):
    with pytest.raises(ConfigError) as found:
        runs(text)
    line = str(found.value)
    assert line.startswith("sweep.yaml:")
    assert expected in line
    assert "\n" not in line
