import pytest
import torch

from prefopt.data.collate import collate
from prefopt.types import EncodedPair

LONG = EncodedPair([0, 5, 6], [7, 8, 1], [9, 1], [True, False, True], [True, True], {"win": 0.5}, "f:1")
SHORT = EncodedPair([0], [3], [4, 4, 1], [True], [True, True, True], {"win": 1.0}, "f:2")


def test_collate_when_two_pairs_then_every_tensor_is_as_by_hand():
    batch = collate([LONG, SHORT], pad_id=99, columns=("win",))
    P = 99
    assert batch.input_ids.tolist() == [[0, 5, 6, 7, 8, 1], [0, 3, P, P, P, P], [0, 5, 6, 9, 1, P], [0, 4, 4, 1, P, P]]
    assert batch.attention_mask.tolist() == [[1] * 6, [1] * 2 + [0] * 4, [1] * 5 + [0], [1] * 4 + [0] * 2]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 4
    # Hidden state t-1 predicts token t; token 8 is not scored.
    assert batch.loss_index.tolist() == [2, 4, 6, 14, 15, 18, 19, 20]
    assert batch.labels.tolist() == [7, 1, 3, 9, 1, 4, 4, 1]
    assert batch.sequence_index.tolist() == [0, 0, 1, 2, 2, 3, 3, 3]
    assert batch.chosen_lengths.tolist() == [2, 1]
    assert batch.rejected_lengths.tolist() == [2, 3]
    assert batch.columns["win"].tolist() == [0.5, 1.0]
    assert batch.columns["win"].dtype == torch.float64
    assert batch.where == ("f:1", "f:2")
    tensors = [value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)]
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


def test_collate_when_only_chosen_is_needed_then_no_rejected_rows():
    batch = collate([LONG, SHORT], pad_id=99, need_rejected=False)
    assert batch.input_ids.shape == (2, 6)
    assert batch.rejected_lengths is None
    assert batch.labels.tolist() == [7, 1, 3]


def test_collate_when_padded_further_then_the_scored_tokens_are_the_same():
    plain, wide = (collate([LONG, SHORT], pad_id=2, **kw) for kw in ({}, {"extra_padding": 3, "pad_to_multiple_of": 8}))
    assert wide.input_ids.shape == (4, 16)
    assert torch.equal(plain.labels, wide.labels)
    assert wide.attention_mask.sum() == plain.attention_mask.sum()
    assert torch.equal(wide.input_ids.flatten()[wide.loss_index + 1], wide.labels)


@pytest.mark.parametrize("need_rejected", [True, False])
def test_collate_when_there_is_no_pair_then_one_row_of_padding(need_rejected):
    batch = collate([], pad_id=2, need_rejected=need_rejected, columns=("win",), pad_to_multiple_of=4)
    assert batch.input_ids.tolist() == [[2, 2, 2, 2]]
    assert batch.pairs == 0
    assert batch.loss_index.shape == batch.labels.shape == batch.sequence_index.shape == (0,)
    assert batch.columns["win"].shape == (0,)
    assert batch.where == ()
    assert (batch.rejected_lengths is not None) == need_rejected
    assert batch.loss_index.dtype == batch.chosen_lengths.dtype == torch.int64


def test_collate_when_pad_is_a_real_token_then_masks_do_not_care():
    a, b = (collate([LONG, SHORT], pad_id=pad) for pad in (1, 99))
    assert torch.equal(a.loss_index, b.loss_index)
    assert torch.equal(a.attention_mask, b.attention_mask)


def test_collate_when_a_pair_cannot_be_scored_then_it_raises():
    with pytest.raises(ValueError, match="without a prompt token"):
        collate([EncodedPair([], [3], None, [True], None)], pad_id=0, need_rejected=False)
    with pytest.raises(ValueError, match="a mask is not as long"):
        collate([EncodedPair([0], [3, 4], None, [True], None)], pad_id=0, need_rejected=False)
    with pytest.raises(ValueError, match="f:9: no rejected side"):
        collate([EncodedPair([0], [3], None, [True], None, {}, "f:9")], pad_id=0)
