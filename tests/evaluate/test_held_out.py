"""What held-out pairs decide: intervals by hand, the warning, and the table at the end of a run."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from prefopt.data.split import sample
from prefopt.evaluate.held_out import final_figures, too_few
from prefopt.evaluate.intervals import deciding_count, mean_interval, wilson
from prefopt.settings import parse
from prefopt.storage import Damaged
from prefopt.types import EncodedPair

REAL = ["--model.path", "m", "--data.train", "d.jsonl"]


@pytest.mark.parametrize(("right", "count"), [(0, 5), (3, 8), (40, 97), (97, 97)])
def test_wilson_interval_when_compared_with_scipy_then_is_the_same(right, count):
    expected = stats.binomtest(right, count).proportion_ci(method="wilson")
    found = wilson(right / count, count)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_deciding_count_when_the_share_is_60_percent_then_is_the_first_whose_test_rejects_one_half():
    # |0.6 - 0.5| > 1.96 sqrt(0.25 / n), so n > 96.04
    assert deciding_count(0.6) == 97
    assert not wilson(0.6, 96).excludes(0.5)


def test_mean_interval_when_counts_differ_then_is_the_ratio_and_else_students_t():
    values, counts = [1.0, 2.0, 4.0], [1.0, 1.0, 2.0]
    plain = mean_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (plain.low, plain.high) == pytest.approx((expected.low, expected.high))
    assert mean_interval(values, counts).mean == (1 + 2 + 8) / 4
    # residuals (1 - 2.75), (2 - 2.75), 2 (4 - 2.75), over the four counts
    error = math.sqrt((1.75**2 + 0.75**2 + 2.5**2) * 3 / 2) / 4
    assert mean_interval(values, counts).high - 2.75 == pytest.approx(stats.t.ppf(0.975, 2) * error)
    assert math.isnan(mean_interval([1.0]).low)


@pytest.mark.parametrize(("pairs", "warned"), [(0, False), (1, True), (31, True), (32, False)])
def test_held_out_set_when_below_32_pairs_then_is_warned_of(pairs, warned):
    assert (too_few(parse(["--method", "dpo", *REAL]), pairs) is not None) == warned


@pytest.mark.parametrize(
    ("argv", "pairs", "line"),
    [
        (
            ["--method", "tdpo", *REAL],
            8,
            "warning: 8 held-out pairs are few: the 95% interval of an accuracy of 60% among them is 29% to 85%; it "
            "excludes 50% from 97 pairs on (name more with --data.eval)",
        ),
        (["--method", "dpo", *REAL, "--eval.max_pairs", "16"], 16, "(raise --eval.max_pairs)"),
        (["--method", "reward_model", "--testbed.eval_pairs", "4"], 4, "(raise --testbed.eval_pairs)"),
        (
            ["--method", "sft", *REAL],
            16,
            "the standard error of their mean loss is 25% of the spread between pairs, and 10% with 97",
        ),
    ],
)
def test_warning_when_held_out_pairs_are_few_then_names_the_effect_and_the_size_that_decides(argv, pairs, line):
    assert line in too_few(parse(argv), pairs)


def test_sample_of_held_out_pairs_is_the_same_every_time_and_part_of_a_larger_one():
    pairs = [EncodedPair([i], [1], [2], [True], [True]) for i in range(50)]
    ten, twenty = ([pair.prompt_ids[0] for pair in sample(pairs, most)] for most in (10, 20))
    assert ten == sorted(np.random.default_rng(0).permutation(50)[:10].tolist())
    assert set(ten) < set(twenty)
    assert sample(pairs, 50) is pairs


def write(folder, steps, evaluations, pairs):
    train = [{"step": step, "split": "train", "pairs": 4, **figures} for step, figures in enumerate(steps, 1)]
    held = [{"step": step, "split": "eval", "pairs": len(pairs), **figures} for step, figures in evaluations.items()]
    lines = sorted(train + held, key=lambda line: line["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = max(evaluations, default=0)
    (folder / "eval_pairs.jsonl").write_text("".join(json.dumps({"step": last, **pair}) + "\n" for pair in pairs))


def test_final_figures_when_a_run_ends_then_have_intervals_and_no_accuracy_before_training(tmp_path):
    steps = [{"loss": 1.0 - step / 100, "rewards/accuracies": 0.5} for step in range(1, 21)]
    evaluations = {
        0: {"loss": 0.6931, "rewards/accuracies": 0.5, "rewards/margins": 0.0},
        20: {"loss": 0.5, "rewards/accuracies": 0.75, "rewards/margins": 1234.5},
    }
    pairs = [{"loss/loss": loss, "rewards/margins": 1234.5} for loss in (0.4, 0.5, 0.5, 0.6)]
    write(tmp_path, steps, evaluations, pairs)
    title, head, *rows = final_figures(parse(["--method", "dpo", *REAL]), tmp_path)
    assert title == "figures of the model of step 20, with 95% intervals over 4 held-out pairs:"
    assert " ".join(head.split()) == "at the start held out training, steps 19 to 20"
    cells = {row.split()[0]: row.split()[1:] for row in rows}
    low, high = (f"{value:.3g}" for value in stats.ttest_1samp([0.4, 0.5, 0.5, 0.6], 0).confidence_interval(0.95))
    assert cells["loss"] == ["0.6931", "0.5", f"({low}", "to", f"{high})", "0.805"]
    share = wilson(0.75, 4)
    assert cells["rewards/accuracies"] == ["-", "0.75", f"({share.low:.3g}", "to", f"{share.high:.3g})", "0.5"]
    assert cells["rewards/margins"][1] == "1234"

    # of another reference, or of a judge, the start is a figure
    other = parse(["--method", "dpo", *REAL, "--reference.path", "r"])
    judge = parse(["--method", "reward_model", *REAL])
    for config in (other, judge):
        row = next(row for row in final_figures(config, tmp_path) if "rewards/accuracies" in row)
        assert row.split()[1] == "0.5"


def test_final_figures_when_eval_select_chose_then_are_of_that_step_and_else_nothing_is_needed(tmp_path):
    steps = [{"loss": 1.0} for _ in range(4)]
    write(tmp_path, steps, {2: {"loss": 0.3}, 4: {"loss": 0.6}}, [{"loss/loss": 0.6}] * 3)
    title, _, row = final_figures(parse(["--method", "sft", *REAL, "--eval.select", "loss"]), tmp_path)
    assert "step 2, the one that eval.select loss chose" in title
    assert row.split() == ["loss", "0.3", "1"], "the pairs' figures are of another step: no interval"
    with (tmp_path / "eval_pairs.jsonl").open("a") as file:
        file.write('{"cut\n{}\n')
    with pytest.raises(Damaged, match=r"eval_pairs.jsonl:4: is not as it was written"):
        final_figures(parse(["--method", "sft", *REAL]), tmp_path)
    write(tmp_path, steps, {}, [])
    assert final_figures(parse(["--method", "sft", *REAL]), tmp_path)[-1].split() == ["loss", "1"]
    assert final_figures(parse(["--method", "sft", *REAL]), tmp_path / "none") == []
