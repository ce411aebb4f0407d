"""Two real processes on one file: encoded once, the same plan on both, and disjoint shares of about as many tokens."""

import json
from pathlib import Path

import pytest

from prefopt.data.encode import encode_file
from prefopt.data.loader import FileBatches
from prefopt.data.mixture import Mixture
from prefopt.data.pairs import input_tokens
from prefopt.methods.sft import SFT
from tests.dist.ranks import run_ranks
from tests.helpers import byte_bpe_tokenizer
from tests.invariant.steps import Bench, two_models

BUDGET, STEPS = 1500, 12


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"prompt": f"Question {i}:" + " why" * (i * 7 % 23), "chosen": " a" * (1 + i * 5 % 31), "rejected": " b" * 9}
        for i in range(300)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    byte_bpe_tokenizer(["Question why: a b"], vocab_size=280).save_pretrained(folder / "tokenizer")
    return folder, run_ranks(_look, str(folder))


def _look(runtime, folder):
    import torch
    from transformers import AutoTokenizer

    import prefopt.data.encode as encode

    built, real = [], encode._build
    encode._build = lambda *args: built.append(1) or real(*args)
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tokenizer")
    found = encode_file(f"{folder}/pairs.jsonl", tokenizer, max_length=120, cache_dir=f"{folder}/cache")
    mixture = Mixture([0, 100, 300], [2, 1], 0)
    batches = FileBatches(found.pairs, 8, 0, found.fingerprint, False, BUDGET, mixture)
    batcher = Bench(runtime, SFT(), two_models(torch.float32)).run.batcher
    taken = []
    for step in range(STEPS):
        pairs = batches.global_batch(step)
        passes = [numbers for numbers, _ in batcher.micro_batches(pairs, 4)]
        taken.append(([pair.where for pair in pairs], passes, input_tokens(pairs).tolist()))
    held_out = found.pairs[:37]
    evaluated = [number for numbers, _ in batcher.micro_batches(held_out, 4) for number in numbers]
    return {"built": len(built), "hash": batches.order_hash, "steps": batches.steps(2), "taken": taken, "eval": evaluated}


def test_file_when_two_ranks_ask_for_it_then_one_encodes_it(ranks):
    folder, answers = ranks
    assert sum(answer["built"] for answer in answers) == 1
    assert len(list(Path(folder, "cache").glob("*/rows.arrow"))) == 1


def test_plan_is_the_same_on_both(ranks):
    first, second = ranks[1]
    assert (first["hash"], first["steps"]) == (second["hash"], second["steps"])
    assert [where for where, _, _ in first["taken"]] == [where for where, _, _ in second["taken"]]


def test_shares_of_a_step_are_disjoint_cover_it_and_have_as_many_tokens_and_passes(ranks):
    for (where, mine, tokens), (_, theirs, _) in zip(*(answer["taken"] for answer in ranks[1]), strict=True):
        numbers = [[i for one in passes for i in one] for passes in (mine, theirs)]
        assert sorted(numbers[0] + numbers[1]) == list(range(len(where)))
        assert len(mine) == len(theirs)
        shares = [sum(tokens[i] for i in one) for one in numbers]
        assert sum(shares) <= BUDGET
        assert abs(shares[0] - shares[1]) <= max(tokens), shares
        assert max(shares) <= 1.25 * min(shares), shares


def test_held_out_pairs_are_each_evaluated_by_one_of_them(ranks):
    first, second = (answer["eval"] for answer in ranks[1])
    assert sorted(first + second) == list(range(37))
