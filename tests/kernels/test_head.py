"""The wrapped head: statistics from inside the module's call, and nothing else about the model changes."""

import pytest
import torch
from torch import nn

from prefopt.errors import TrainError
from prefopt.kernels.head import HeadRequest, StatsLinear, make_head_aware
from prefopt.kernels.token_stats import token_stats


class TinyLM(nn.Module):
    def __init__(self, head=None, tied=False):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.lm_head = nn.Linear(4, 11, bias=False) if head is None else head
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self):
        return self.lm_head


def test_head_without_a_request_is_the_stock_head():
    lm, x = TinyLM(), torch.randn(2, 3, 4)
    before, names = lm.lm_head(x), list(lm.state_dict())
    head = make_head_aware(lm)
    assert head is lm.lm_head
    assert type(head) is StatsLinear
    assert torch.equal(head(x), before)
    assert list(lm.state_dict()) == names


def test_head_with_a_request_returns_the_statistics_in_order():
    torch.manual_seed(0)
    lm, x, ref = TinyLM(), torch.randn(5, 4), torch.randn(5, 4)
    labels = torch.randint(11, (5,))
    head = make_head_aware(lm)
    out = head(x, request=HeadRequest(labels, ("kl", "entropy"), ref, head.weight, scale=0.5, softcap=3.0))
    stats = token_stats(
        x, head.weight, labels, ref_hidden=ref, ref_weight=head.weight, want=("kl", "entropy"), scale=0.5, softcap=3.0
    )
    assert type(out) is tuple
    assert out[1] is None
    assert out[3] is None
    for found, expected in zip((out[0], out[2], out[4]), (stats.logp, stats.kl, stats.entropy), strict=True):
        assert torch.equal(found, expected)


def test_head_tied_to_the_embedding_stays_tied_and_gathers_both_gradients():
    torch.manual_seed(0)
    lm = TinyLM(tied=True)
    head = make_head_aware(lm)
    assert head.weight is lm.embed.weight
    ids, labels = torch.tensor([1, 2, 3]), torch.tensor([2, 3, 4])
    head(lm.embed(ids), request=HeadRequest(labels))[0].sum().backward()
    found = head.weight.grad.clone()
    head.weight.grad = None
    head(lm.embed(ids)).log_softmax(-1).gather(1, labels[:, None]).sum().backward()
    assert torch.allclose(found, head.weight.grad, atol=1e-6)


def test_head_made_aware_twice_is_left_as_it_is():
    lm = TinyLM()
    assert make_head_aware(lm) is make_head_aware(lm)


class Adapter(nn.Linear):
    pass


@pytest.mark.parametrize("head", [Adapter(4, 11), nn.Identity()])
def test_head_of_another_type_is_refused_by_its_name(head):
    with pytest.raises(TrainError, match=type(head).__name__) as error:
        make_head_aware(TinyLM(head=head))
    assert "\n" not in str(error.value)
    assert type(head) is not StatsLinear


def test_model_from_transformers_saves_and_generates_as_before(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    lm = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([[1, 5, 9]])
    logits, text = lm(ids).logits, lm.generate(ids, max_new_tokens=4, do_sample=False)
    make_head_aware(lm)
    assert torch.equal(lm(ids).logits, logits)
    assert torch.equal(lm.generate(ids, max_new_tokens=4, do_sample=False), text)
    lm.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again.lm_head) is nn.Linear
    assert torch.equal(again.eval()(ids).logits, logits)
