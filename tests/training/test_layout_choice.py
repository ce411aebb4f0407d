"""Which layouts are exact for real architectures, what attention is told, and which layout a micro-batch takes."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from prefopt.data.collate import collate
from prefopt.data.layouts import LAYOUTS
from prefopt.errors import ConfigError
from prefopt.settings import KernelConfig, parse
from prefopt.training import layout_choice as subject
from prefopt.training.attention import Rows
from prefopt.training.forward import ALL_STATISTICS, PolicyWithReference, loss_token_states, token_stats_of
from prefopt.types import EncodedPair
from tests.invariant.steps import VOCAB, random_pairs, two_models
from tests.training.architectures import ARCHITECTURES, tiny_model

CPU = torch.device("cpu")
_HEADS = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_HEADS, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
# name -> (model type, settings, what the line says of why rows stay padded)
NOT_EXACT = {
    "mamba": ("mamba", {"state_size": 4}, "layers of type linear_attention carry state along"),
    "mamba 2": ("mamba2", {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1}, "layers of type linear_att"),
    "rwkv": ("rwkv", {}, "state-space or recurrent layers carry state along the whole row"),
    "lfm2": ("lfm2", {**_LLAMA, "layer_types": ["conv", "full_attention"]}, "layers of type conv carry"),
    "bloom": ("bloom", {"n_head": 4}, "ALiBi measures distances along the row"),
    "falcon with alibi": ("falcon", {"alibi": True, "num_attention_heads": 4}, "ALiBi measures distances"),
    "gpt-neo": (
        "gpt_neo",
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 8},
        "its attention counts a window along the row",
    ),
    # takes no positions, counts them itself: nothing in its config says so
    "trocr": ("trocr", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}, "hidden states differ"),
}


def settings(*flags):
    return parse(["--method", "dpo", "--model.path", "m", "--data.train", "pairs.jsonl", *flags])


def build(kind, more=None):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, **_TOKENS, **(more or {})}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).eval()


def choose(lm, *flags, reference=None):
    policy = PolicyWithReference(lm, reference, KernelConfig())
    return subject.choose_layouts(settings(*flags), policy, CPU)


# What is exact --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOT_EXACT)
def test_auto_when_a_layout_would_not_be_exact_then_rows_are_padded_and_one_line_says_why(name):
    kind, more, why = NOT_EXACT[name]
    lm = build(kind, more)
    layouts, line = choose(lm)
    assert layouts.allowed == ("padded",)
    assert line.startswith(f"layout: padded rows only, for the policy ({type(lm).__name__}): {why}")
    assert "\n" not in line
    with pytest.raises(
        ConfigError, match=r"^train.layout: 'packed' is not exact for the policy .* expected auto or pad"
    ):
        choose(lm, "--train.layout", "packed")


@pytest.mark.parametrize("name", [name for name, (_, _, why) in NOT_EXACT.items() if "differ" not in why])
def test_layout_when_named_and_the_config_rules_it_out_then_refused_before_weights_are_loaded(name):
    kind, more, why = NOT_EXACT[name]
    config = AutoConfig.for_model(kind, **{"hidden_size": 32, "num_hidden_layers": 2, **more})
    subject.check_architecture(settings(), config)
    with pytest.raises(ConfigError, match=f"^train.layout: 'prefix_shared' is not exact for model.path: .*{why}"):
        subject.check_architecture(settings("--train.layout", "prefix_shared"), config)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_auto_when_a_layout_is_exact_then_it_is_allowed_and_gives_the_same_statistics(name):
    # learned positions among them: a model that takes position ids finds the right ones in any cell
    policy, reference = tiny_model(name, seed=0), tiny_model(name, seed=1)
    layouts, line = choose(policy, reference=reference)
    assert (layouts.allowed, line) == (LAYOUTS, None)
    model, pairs = PolicyWithReference(policy, reference, KernelConfig()), random_pairs(pairs=4)
    padded = token_stats_of(model, collate(pairs, pad_id=2), ALL_STATISTICS)
    for layout in LAYOUTS[1:]:
        found = token_stats_of(model, collate(pairs, pad_id=2, **layouts.settings(layout)), ALL_STATISTICS)
        for statistic in ("logp", *ALL_STATISTICS):
            expected = getattr(padded, statistic)
            torch.testing.assert_close(getattr(found, statistic), expected, rtol=1e-4, atol=1e-5, msg=statistic)


def test_auto_when_only_the_reference_is_not_exact_then_rows_are_padded():
    layouts, line = choose(build("llama", _LLAMA), reference=build("bloom", {"n_head": 4}))
    assert layouts.allowed == ("padded",)
    assert (
        line == "layout: padded rows only, for the reference (BloomForCausalLM): ALiBi measures distances along the row"
    )


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_auto_when_attention_has_a_window_then_longer_sequences_stay_padded(kind):
    head = {"head_dim": 8} if kind == "gemma2" else {}
    lm = build(kind, {**_LLAMA, **head, "sliding_window": 8})
    layouts, line = choose(lm)
    assert (layouts.allowed, layouts.longest) == (LAYOUTS, 8)
    assert line == (
        "layout: batches with sequences of more than 8 tokens are padded: the model's attention has a sliding window"
    )
    named, _ = choose(lm, "--train.layout", "packed_prefix_shared")
    within, beyond = ([EncodedPair([5] * p, [6] * 4, [7] * 3, [True] * 4, [True] * 3)] for p in (4, 5))
    assert [named.of(pairs, True) for pairs in (within, beyond, within + beyond)] == [
        "packed_prefix_shared",
        "padded",
        "padded",
    ]
    kind = layouts.kind
    hidden = [
        loss_token_states(lm, kind, collate(within, pad_id=2, layout=x)) for x in ("padded", "packed_prefix_shared")
    ]
    torch.testing.assert_close(*hidden)
    assert choose(lm, "--data.max_length", "8")[1] is None
    with pytest.raises(
        ConfigError, match=r"its attention window is 8 tokens, sequences have up to 1024 .--data.max_length 8 t"
    ):
        subject.check_architecture(settings("--train.layout", "packed"), lm.config)


def test_auto_when_all_layers_of_a_windowed_model_see_everything_then_there_is_no_window():
    more = {"use_sliding_window": False, "sliding_window": 8, "head_dim": 8}
    layouts, line = choose(build("qwen3", {**_LLAMA, **more}))
    assert (layouts.longest, line) == (None, None)


def test_auto_when_an_adapter_has_dropout_then_prompts_are_not_shared_and_one_line_says_why():
    layouts, line = choose(build("llama", _LLAMA), "--lora.r", "4", "--lora.dropout", "0.1")
    assert layouts.allowed == ("padded", "packed")
    assert line == (
        "layout: not prefix_shared or packed_prefix_shared, for the policy (LlamaForCausalLM): lora.dropout would drop "
        "the same entries of a shared prompt for both completions"
    )


def test_probe_when_it_has_run_then_nothing_random_has_moved_and_the_mode_is_as_it_was():
    lm = build("llama", _LLAMA).train()
    before = torch.random.get_rng_state()
    choose(lm)
    assert torch.equal(before, torch.random.get_rng_state())
    assert lm.training


def probe(lm, kind, layout, dtype):
    """How far the probe finds a layout from padded rows."""
    plain, other = (subject.probe_states(lm, kind, name, CPU, dtype) for name in ("padded", layout))
    return subject.relative_gap(plain, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_probe_when_positions_are_not_heard_then_it_is_far_beyond_its_tolerance(layout, dtype):
    lm, _ = two_models(dtype)
    policy = PolicyWithReference(lm, None, KernelConfig())
    assert probe(lm, policy.attention, layout, dtype) <= subject._TOLERANCE[dtype]
    deaf = lm.model.forward
    lm.model.forward = lambda position_ids, **rest: deaf(**rest)
    gap = probe(lm, policy.attention, layout, dtype)
    # rotary positions are relative: packed sequences are told apart by what they see
    assert gap > 2 * subject._TOLERANCE[dtype] or layout == "packed"


# Settings -------------------------------------------------------------------------------------------------------------


def test_settings_when_they_cannot_go_together_then_refused_in_one_line():
    for flags, message in {
        ("--train.layout", "prefixshared"): "expected one of auto, padded, packed, prefix_shared, packed_prefix_shared",
        (
            "--train.layout",
            "prefix_shared",
            "--model.attention",
            "flash_attention_2",
        ): "no mask for shared prompts; expected",
    }.items():
        with pytest.raises(ConfigError, match=message):
            settings(*flags)
    with pytest.raises(
        ConfigError, match="reads no rejected completions that could share a prompt; expected auto, pad"
    ):
        parse(["--method", "sft", "--train.layout", "packed_prefix_shared"])
    flex = settings("--model.attention", "flex_attention")
    subject.check_settings(flex, torch.device("cuda"))
    with pytest.raises(
        ConfigError, match=r"^model.attention: found 'flex_attention', which has no backward pass on the C"
    ):
        subject.check_settings(flex, CPU)


# What attention is told -----------------------------------------------------------------------------------------------


def rows_of(pairs, **how):
    batch = collate(pairs, pad_id=2, **how)
    return Rows(batch.input_ids, batch.attention_mask, batch.position_ids, batch.segments)


def test_dense_mask_when_a_pair_shares_its_prompt_then_as_by_hand():
    pair = EncodedPair([5], [6, 7], [8], [True] * 2, [True])
    (mask,) = rows_of([pair], layout="prefix_shared", extra_padding=1).visible().int().tolist()
    assert mask == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 1]]


def block_mask_and_visible(layout, one_row):
    rows = rows_of(random_pairs(pairs=12), layout=layout, one_row=one_row, pad_to_multiple_of=128)
    return rows.arguments("blocks", torch.float32)["attention_mask"], rows.visible()


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("one_row", [False, True])
def test_block_mask_when_made_then_it_is_the_dense_mask(layout, one_row):
    block_mask, visible = block_mask_and_visible(layout, one_row)
    index, row = torch.arange(visible.shape[1]), torch.arange(len(visible))[:, None, None]
    assert torch.equal(block_mask.mask_mod(row, 0, index[:, None], index), visible)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_when_on_the_cpu_then_its_output_is_that_of_the_dense_mask():
    from torch.nn.attention.flex_attention import flex_attention

    block_mask, visible = block_mask_and_visible("packed_prefix_shared", True)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, len(visible), 2, visible.shape[1], 16, generator=generator)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None])
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=block_mask), expected, rtol=1e-5, atol=1e-5)


def _varlen(module, query, key, value, attention_mask, cu_seq_lens_q, max_length_q, **settings):
    """What flash attention computes of one row of sequences with these lengths."""
    out = []
    edges = cu_seq_lens_q.tolist()
    assert cu_seq_lens_q.dtype == torch.int32
    assert (query.shape[0], edges[0], edges[-1]) == (1, 0, query.shape[2])
    assert max_length_q == max(np.diff(edges))
    groups = query.shape[1] // key.shape[1]
    for start, end in pairwise(edges):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        out.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    return torch.cat(out, 2).transpose(1, 2), None


def test_varlen_attention_when_rows_are_packed_then_the_lengths_it_is_given_make_it_exact():
    AttentionInterface.register("plain_varlen", _varlen)
    AttentionMaskInterface.register("plain_varlen", lambda **_: None)
    lm, pairs = two_models(torch.float32)[0], random_pairs(pairs=6)
    expected = loss_token_states(lm, "dense", collate(pairs, pad_id=2))
    lm.set_attn_implementation("plain_varlen")
    for more in ({}, {"extra_padding": 5}):
        found = loss_token_states(lm, "varlen", collate(pairs, pad_id=2, layout="packed", one_row=True, **more))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert subject.possible_layouts(SimpleNamespace(rows="pairs"), "varlen") == ("padded", "packed")


def test_policy_when_made_then_its_checkpoint_and_its_plain_calls_know_nothing_of_units(tmp_path):
    lm, _ = two_models(torch.float32)
    ids, mask = torch.arange(5, 25).view(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    before = lm(input_ids=ids, attention_mask=mask).logits
    written = lm.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=2)
    PolicyWithReference(lm, None, KernelConfig())
    assert torch.equal(lm(input_ids=ids, attention_mask=mask).logits, before)
    again = lm.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=2)
    assert torch.equal(written, again)
    lm.save_pretrained(tmp_path)
    assert "prefopt" not in (tmp_path / "config.json").read_text()


def test_policy_when_its_code_asks_for_the_name_of_its_attention_then_the_name_stays():
    """Sparse attention of this kind masks nothing under a name that it does not know."""
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "n_group": 1}
    small |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "topk_group": 1}
    small |= {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 16, "first_k_dense_replace": 2, "vocab_size": 50}
    lm = DeepseekV32ForCausalLM(DeepseekV32Config(**small)).eval()
    ids = torch.arange(5, 45)[None]
    before = lm(input_ids=ids).logits
    PolicyWithReference(lm, None, KernelConfig())
    assert torch.equal(lm(input_ids=ids).logits, before)
    assert "sparse" in (subject._never_exact(lm.config) or "")


# What is chosen -------------------------------------------------------------------------------------------------------

SHAPE = subject.Shape(layers=6, width=256, weights=5_000_000)


def pairs_of(*sizes):
    return [EncodedPair([5] * p, [6] * c, [7] * r, [True] * c, [True] * r) for p, c, r in sizes]


def of(pairs, kind="per_segment", shape=SHAPE, device="cpu", allowed=LAYOUTS):
    return subject.Layouts(allowed, kind, shape, device).of(pairs, need_rejected=True)


@pytest.mark.parametrize("prompt", [64, 128, 256, 512])
def test_auto_when_prompts_are_long_then_they_are_shared(prompt):
    assert "shared" in of(pairs_of(*[(prompt, 128, 128)] * 4))


def test_auto_when_lengths_differ_widely_then_rows_are_packed():
    assert of(pairs_of((10, 400, 20), (30, 15, 20), (100, 30, 60))) == "packed_prefix_shared"
    assert of(pairs_of((1, 400, 20), (1, 15, 300)), allowed=("padded", "packed")) == "packed"


def test_auto_when_calls_cost_more_than_cells_then_rows_are_padded():
    # the testbed: hundreds of pairs of a few tokens, a model of 60k parameters
    assert of(pairs_of(*[(3, 4, 4)] * 256), shape=subject.Shape(layers=2, width=64, weights=40_000)) == "padded"


def test_auto_when_a_dense_mask_would_lose_then_rows_are_padded():
    assert of(pairs_of(*[(512, 512, 512)] * 4), kind="dense") == "padded"
    assert "shared" in of(pairs_of(*[(512, 512, 512)] * 4))
    assert "shared" in of(pairs_of(*[(512, 128, 128)] * 4), kind="dense")


def test_auto_when_there_is_nothing_to_save_then_rows_are_padded():
    assert of(pairs_of(*[(1, 128, 128)] * 4)) == "padded"
    assert of([]) == "padded"


def test_prediction_when_rows_grow_then_each_part_of_it_is_as_by_hand():
    parts = np.array([[4, 2], [1, 1], [4, 3], [1, 2]])
    shape = subject.Shape(layers=2, width=10, weights=100)

    def work(layout, kind, device="cpu"):
        return subject.work(parts, layout, kind, shape, device)

    cells = {"padded": 28, "packed": 3 * 7, "prefix_shared": 18, "packed_prefix_shared": 18}
    for layout, count in cells.items():
        assert work(layout, "dense").linear == count * 100
    assert work("packed_prefix_shared", "per_segment").linear == (9 + 4) * 100
    assert work("padded", "per_segment") == (2800, 2 * 10 * 28 * 7 / 2, 0, 0, 2)
    assert work("prefix_shared", "dense") == (1800, 0, 2 * 10 * 18 * 9, 18 * 9, 2)
    first, second = 6**2 / 2 + 2**2 / 2, 3 * 7 + 2 * 3
    assert work("prefix_shared", "per_segment") == (1800, 2 * 10 * first, 2 * 10 * second, 0, 2 * 4)
    # where a mask is dear, the second branches are the ends of causal calls
    second = 7**2 / 2 + 3**2 / 2
    assert work("prefix_shared", "per_segment", "cuda") == (1800, 2 * 10 * (first + second), 0, 0, 2 * 4)
    assert subject.seconds(subject.Work(1, 2, 3, 4, 5), subject.Work(2, 2, 2, 2, 2)) == 7.5


def test_shape_when_read_from_a_model_then_embeddings_and_head_are_left_out():
    lm = build("llama", _LLAMA)
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64
    assert subject.shape_of(lm) == subject.Shape(layers=2, width=32, weights=2 * layer)
