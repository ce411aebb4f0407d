"""Where tokens stand, by hand; what each cell may see; a batch shown with its masks."""

import numpy as np
import pytest
import torch

from prefopt.data.collate import collate
from prefopt.data.encoder import Encoder
from prefopt.data.encoding_report import show_batch
from prefopt.data.layouts import LAYOUTS, block_and_branch, positions_of, rows_of
from prefopt.types import EncodedPair, PairRow
from tests.invariant.steps import random_pairs

P = 99
LONG = EncodedPair([0, 5, 6], [7, 8, 1], [9, 1], [True, False, True], [True, True], {}, "f:1")
SHORT = EncodedPair([0], [3], [4, 4, 1], [True], [True, True, True], {}, "f:2")


def test_prefix_shared_when_two_pairs_then_every_tensor_is_as_by_hand():
    batch = collate([LONG, SHORT], pad_id=P, layout="prefix_shared")
    assert batch.input_ids.tolist() == [[0, 5, 6, 7, 8, 1, 9, 1], [0, 3, 4, 4, 1, P, P, P]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4], [0, 1, 1, 2, 3, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1] * 8, [1] * 5 + [0] * 3]
    assert batch.segments.tolist() == [[0, 3, 3, 2], [8, 1, 1, 3]]
    # the first token of the rejected side is scored from the prompt's last cell, as is that of the chosen one
    assert batch.loss_index.tolist() == [2, 4, 8, 2, 6, 8, 10, 11]
    assert batch.labels.tolist() == [7, 1, 3, 9, 1, 4, 4, 1]
    assert batch.sequence_index.tolist() == [0, 0, 1, 2, 2, 3, 3, 3]


def test_packed_when_two_pairs_then_rows_are_as_long_as_the_longest_sequence():
    batch = collate([LONG, SHORT], pad_id=P, layout="packed")
    assert batch.input_ids.tolist() == [[0, 5, 6, 7, 8, 1], [0, 5, 6, 9, 1, P], [0, 4, 4, 1, 0, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 0, 1]]
    assert batch.segments.tolist() == [[0, 6, 0, 0], [16, 2, 0, 0], [6, 5, 0, 0], [12, 4, 0, 0]]
    assert batch.loss_index.tolist() == [2, 4, 16, 8, 9, 12, 13, 14]
    assert batch.labels.tolist() == [7, 1, 3, 9, 1, 4, 4, 1]


def test_packed_prefix_shared_when_one_row_then_pairs_stand_behind_each_other():
    batch = collate([LONG, SHORT], pad_id=P, layout="packed_prefix_shared", one_row=True, pad_to_multiple_of=8)
    assert batch.input_ids.tolist() == [[0, 5, 6, 7, 8, 1, 9, 1, 0, 3, 4, 4, 1, P, P, P]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 1, 2, 3, 0, 0, 0]]
    assert batch.segments.tolist() == [[0, 3, 3, 2], [8, 1, 1, 3]]
    assert batch.loss_index.tolist() == [2, 4, 8, 2, 6, 8, 10, 11]


def test_visible_when_a_pair_and_a_sequence_share_a_row_then_as_by_hand():
    block, branch = block_and_branch(np.array([[0, 2, 1, 2], [5, 2, 0, 0]]), 8)
    assert block.tolist() == [0, 0, 0, 0, 0, 1, 1, -8]
    assert branch.tolist() == [0, 0, 1, 2, 2, 0, 0, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("one_row", [False, True])
def test_any_layout_when_collated_then_each_sequence_reads_as_it_was_encoded(layout, one_row):
    pairs = random_pairs(pairs=20)
    batch = collate(pairs, pad_id=P, layout=layout, one_row=one_row)
    plain = collate(pairs, pad_id=P)
    for name in ("labels", "sequence_index", "chosen_lengths", "rejected_lengths"):
        assert torch.equal(getattr(batch, name), getattr(plain, name)), name
    if layout == "padded":
        assert batch.segments is None
        return
    tokens, positions = batch.input_ids.flatten().numpy(), batch.position_ids.flatten().numpy()
    sequences = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    used = np.zeros(tokens.size, int)
    for sequence, (prompt, completion) in enumerate(sequences):
        cells = positions_of(batch.segments, sequence, len(sequences))
        used[cells] = 1
        assert tokens[cells].tolist() == prompt + completion
        assert positions[cells].tolist() == list(range(len(cells)))
        assert len(set(cells // batch.input_ids.shape[1])) == 1, "a sequence lies in one row"
    assert used.tolist() == batch.attention_mask.flatten().tolist()
    real = sum(len(p.prompt_ids) * (2 - ("shared" in layout)) + len(p.chosen_ids + p.rejected_ids) for p in pairs)
    assert int(batch.attention_mask.sum()) == real, "no cell is used twice"
    if layout.startswith("packed") and one_row:
        assert batch.input_ids.shape == (1, real)


def test_rows_when_packed_then_the_longest_come_first_and_none_is_longer_than_the_longest_unit():
    lengths = np.array([3, 9, 5, 4, 1, 5])
    assert rows_of(lengths, "packed") == [[1], [2, 3], [5, 0, 4]]
    assert rows_of(lengths, "packed", one_row=True) == [[0, 1, 2, 3, 4, 5]]
    assert rows_of(lengths, "prefix_shared", one_row=True) == [[0], [1], [2], [3], [4], [5]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_when_there_is_no_pair_then_one_row_of_padding(layout):
    batch = collate([], pad_id=2, layout=layout)
    assert (batch.input_ids.tolist(), batch.segments, batch.pairs) == ([[2]], None, 0)


def test_collate_when_only_chosen_is_needed_then_it_packs_and_refuses_to_share():
    batch = collate([LONG, SHORT], pad_id=P, need_rejected=False, layout="packed", one_row=True)
    assert batch.input_ids.tolist() == [[0, 5, 6, 7, 8, 1, 0, 3]]
    assert batch.labels.tolist() == [7, 1, 3]
    with pytest.raises(ValueError, match="layout prefix_shared: there is no rejected side"):
        collate([LONG], pad_id=P, need_rejected=False, layout="prefix_shared")


def test_show_batch_when_prompts_are_shared_then_each_side_reads_as_if_it_stood_alone(tokenizer):
    rows = [PairRow(f"Name a {what}:", " An apple", " Pears", {}, f"f:{i}") for i, what in enumerate(("fruit", "tree"))]
    pairs = [Encoder(tokenizer, 99).pair(row) for row in rows]

    def shown(**layout):
        text = show_batch(collate(pairs, pad_id=2, **layout), tokenizer)
        return [
            line for line in text.splitlines() if not line.startswith("  chosen:") and "rejected:" not in line
        ], text

    plain, _ = shown()
    for layout in LAYOUTS[1:]:
        for one_row in (False, True):
            assert shown(layout=layout, one_row=one_row)[0] == plain
    prompt, chosen, rejected = map(len, (pairs[0].prompt_ids, pairs[0].chosen_ids, pairs[0].rejected_ids))
    _, text = shown(layout="packed_prefix_shared", one_row=True)
    assert f"  chosen: {prompt + chosen} tokens, {chosen} scored, row 0 from column 0\n" in text
    assert (
        f"  rejected: {prompt + rejected} tokens, {rejected} scored, row 0 from column 0, prompt shared, "
        f"{chosen} tokens of the other side unseen\n"
    ) in text
