"""Weighted sources: how often each pair comes, and that it is a function of (seed, epoch)."""

import json
from collections import Counter

import numpy as np
import pytest

from prefopt.data.loader import FileBatches
from prefopt.data.mixture import Mixture, apportion, mixture_of
from prefopt.data.pairs import Concatenated, Subset
from prefopt.errors import DataError
from tests.data.test_loader import pairs


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [
        (10, [1, 1], [5, 5]),
        (10, [3, 1, 0], [8, 2, 0]),  # 7.5 and 2.5: the first of equal remainders
        (7, [1, 1, 1], [3, 2, 2]),
        (9, [1e308, 1e308, 1e308], [3, 3, 3]),  # their sum is not finite
        (9, [1e-300, 2e-300], [3, 6]),
    ],
)
def test_apportion_by_hand(total, weights, expected):
    assert apportion(total, weights) == expected


def test_epoch_when_weighted_then_takes_each_source_by_its_share_in_whole_passes_and_a_remainder():
    mixture = Mixture([0, 10, 40], [3, 1], seed=0)  # 30 of the 40 pairs of an epoch from the 10, 10 from the 30
    for epoch in range(6):
        count = Counter(mixture.rows(epoch).tolist())
        assert [count[row] for row in range(10)] == [3] * 10
        assert [count[row] for row in range(10, 40)].count(1) == 10
        assert sum(count.values()) == len(mixture) == 40
    uneven = Mixture([0, 7, 20], [1, 1], seed=0)
    assert sorted(Counter(uneven.rows(0).tolist())[row] for row in range(7)) == [1] * 4 + [2] * 3


def test_source_when_epochs_follow_then_no_pair_comes_again_before_all_others_have():
    mixture = Mixture([0, 7, 20], [1, 1], seed=4)
    seen = Counter()
    for epoch in range(9):
        seen.update(mixture.rows(epoch).tolist())
        for source in (range(7), range(7, 20)):
            counts = [seen[row] for row in source]
            assert max(counts) - min(counts) <= 1, (epoch, counts)


def test_rows_are_a_function_of_seed_and_epoch():
    bounds = [0, 7, 20]
    found = [Mixture(bounds, [1, 2], seed=1).rows(epoch).tolist() for epoch in (3, 0, 3)]
    assert found[0] == found[2] != found[1]
    assert found[1] != Mixture(bounds, [1, 2], seed=2).rows(0).tolist()


@pytest.mark.parametrize("tokens", [None, 400])
@pytest.mark.parametrize("grouped", [False, True])
def test_batches_when_weighted_then_an_epoch_has_the_mixtures_pairs_in_an_order_of_its_own(grouped, tokens):
    whole = Concatenated([pairs(10, seed=1), pairs(30, seed=2)])
    mixture = Mixture(whole.bounds, [3, 1], seed=5)
    batches = FileBatches(whole, 6, 5, "rows", grouped, tokens, mixture)
    for epoch in range(3):
        rows = [row for batch in batches.order(epoch) for row in batch]
        assert sorted(rows) == sorted(mixture.rows(epoch).tolist())
        assert rows != mixture.rows(epoch).tolist()
    assert batches.order_hash != FileBatches(whole, 6, 5, "rows", grouped, tokens).order_hash
    last = batches.steps(3) - 1
    again = FileBatches(whole, 6, 5, "rows", grouped, tokens, mixture)
    assert again.global_batch(last) == [whole[row] for row in batches.order(2)[-1]]


def test_shares_are_each_sources_part_of_an_epoch():
    whole = Concatenated([pairs(10, seed=1), pairs(30, seed=2)])
    shares = FileBatches(whole, 6, 5, "rows", True, None, Mixture(whole.bounds, [3, 1], 5)).grouped
    assert [(share, list(part)) for share, part in shares] == [(0.75, whole[:10]), (0.25, whole[10:])]


def test_mixture_of_what_a_split_has_left_knows_where_each_source_ends():
    whole = Concatenated([pairs(10), pairs(30)])
    left = Subset(whole, np.array([0, 3, 4, 12, 13, 39]))
    found = mixture_of(left, {"a": 1.0, "b": 1.0}, 0)
    assert found.bounds == (0, 3, 6)
    assert found.lines(["a", "b"])[1:] == [
        "  a: 3 (50.0%), each of its 3 is drawn 1 times",
        "  b: 3 (50.0%), each of its 3 is drawn 1 times",
    ]
    with pytest.raises(DataError, match=r"^data.weights: all prompts of a are held out, so it has no training pairs"):
        mixture_of(Subset(whole, np.array([12, 13])), {"a": 1.0, "b": 1.0}, 0)


def test_run_when_sources_have_weights_then_its_report_says_what_an_epoch_takes(server, command, task, tmp_path):
    lines = task.pairs.read_text().splitlines(keepends=True)
    for name, part in (("few.jsonl", lines[:10]), ("many.jsonl", lines[10:40]), ("none.jsonl", ["{\n"])):
        (tmp_path / name).write_text("".join(part))
    settings = {"data__train": "few.jsonl,many.jsonl,none.jsonl", "data__weights": "3,1,0", "data__eval_fraction": 0}
    settings |= {"train__tokens_per_batch": 400, "dry_run": "true"}
    ended = server.train(command("dpo", tmp_path / "run", **settings), cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert "none.jsonl" not in ended.out.partition("settings that differ from the defaults")[0], (
        "a source of weight 0 is left out"
    )
    assert (
        "pairs per epoch, by data.weights: 40\n"
        "  few.jsonl: 30 (75.0%), each of its 10 is drawn 3 times\n"
        "  many.jsonl: 10 (25.0%), each of its 30 is drawn 0.333 times\n"
        "steps of up to 400 tokens: "
    ) in ended.out


def test_held_out_files_when_several_are_named_then_all_are_evaluated(server, command, task, tmp_path):
    lines = task.pairs.read_text().splitlines(keepends=True)
    for name, part in (("a.jsonl", lines[:3]), ("b.jsonl", lines[3:8])):
        (tmp_path / name).write_text("".join(part))
    argv = command("dpo", tmp_path / "run", data__eval="a.jsonl,b.jsonl", train__max_steps=1)
    ended = server.train(argv, cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert "warning: 8 of 8 held-out pairs have a prompt that is also in the training data" in ended.out
    places = [json.loads(line)["where"] for line in (tmp_path / "run/eval_pairs.jsonl").read_text().splitlines()]
    assert places == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", *(f"b.jsonl:{i}" for i in range(1, 6))]
