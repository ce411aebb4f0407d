"""The plan before a run: bytes known by hand, what must grow and shrink, which backend, and mistakes in one line."""

import pytest

from prefopt.planner import plan_report
from prefopt.planner.advice import advice, in_16_bits, recommended
from prefopt.planner.backend_plans import micro_batch_of, plans_of
from prefopt.planner.memory import BACKENDS, GB
from prefopt.planner.model_counts import read_model
from prefopt.planner.numbers import number, span
from prefopt.planner.step_time import flops
from prefopt.settings.plan import parse_plan

SMALL = (256, 688, 6, 4, 4, 8192, False)
BIG = (4096, 14336, 32, 32, 8, 128256, False)  # 8.03e9 parameters
MIDDLE = (2048, 8192, 16, 32, 8, 128256, True)  # 1.24e9


def llama(folder, shape):
    from transformers import LlamaConfig

    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = shape
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: llama(folder / name, shape) for name, shape in (("small", SMALL), ("big", BIG), ("middle", MIDDLE))}


@pytest.fixture(scope="module")
def planned(models):
    """(the model, {backend: plan}) of a run with these flags."""

    def planned(*flags, model="small", method="tdpo", **own):
        words = [word for name, value in own.items() for word in (f"--{name}", str(value))]
        found, plans = plans_of(*parse_plan(["--method", method, "--model.path", models[model], *words, *flags]))
        return found, {plan.memory.backend: plan for plan in plans}

    return planned


def backends(planned, *flags, **own):
    return {name: plan.memory for name, plan in planned(*flags, **own)[1].items()}


BF16 = ("--train.mixed_precision", "bf16")
LORA = ("--lora.r", "8")
ONE_PASS = ("--train.global_batch", "32")  # of four ranks, eight pairs each
RECOMPUTE = ("--model.gradient_checkpointing", "true")


def test_parameters_are_those_of_the_formula(planned):
    model, _ = planned()
    hidden, intermediate, layers, _, _, vocabulary, _ = SMALL
    layer = 4 * hidden**2 + 3 * hidden * intermediate
    assert model.matrices == layers * layer
    assert model.largest_layer == layer + 2 * hidden
    assert model.parameters == 2 * vocabulary * hidden + layers * (layer + 2 * hidden) + hidden
    assert planned(*LORA)[0].trained == layers * 8 * (8 * hidden + 3 * (hidden + intermediate))
    assert planned(model="big")[0].parameters == 8_030_261_248


def test_a_tied_head_counts_once(planned):
    model, _ = planned(model="middle")
    assert model.tied
    assert model.parameters == 1_235_814_400


def test_bytes_at_rest_are_those_of_the_papers_arithmetic(planned):
    """Rajbhandari et al., 2020, section 3: 2 + 2 + 12 bytes of a weight in 16 bits; in 32, AdamW has 16.

    Gradients add up in float32: 4 bytes in place of 2, beside the 2 of the last micro-batch where ZeRO-1 holds them.
    """
    weights = planned()[0].parameters
    one, zero1, zero2, zero3, fsdp2 = (
        backends(planned, *flags, gpus=4)[name]
        for name, flags in (
            ("single process", ()),
            ("zero1", BF16),
            ("zero2", BF16),
            ("zero3", BF16),
            ("fsdp2", ONE_PASS),
        )
    )
    assert (one.weights, one.gradients, one.optimizer, one.reference) == (
        4 * weights,
        4 * weights,
        8 * weights,
        4 * weights,
    )
    assert (zero1.weights, zero1.gradients, zero1.optimizer) == (2 * weights, 6 * weights, 12 * weights / 4)
    assert (zero2.weights, zero2.gradients, zero2.optimizer) == (2 * weights, 4 * weights / 4, 12 * weights / 4)
    assert (zero3.weights, zero3.gradients, zero3.optimizer) == (weights / 2, weights, 3 * weights)
    assert (fsdp2.weights, fsdp2.gradients, fsdp2.optimizer, fsdp2.reference) == (
        weights,
        weights,
        2 * weights,
        weights,
    )


@pytest.mark.parametrize("backend", ["zero1", "zero2", "zero3", "zero3 offload", "fsdp2"])
def test_more_gpus_never_hold_more_each(planned, backend):
    flags = ("--train.global_batch", "1024")  # accumulates with any of them
    totals = [backends(planned, *flags, model="big", gpus=n)[backend] for n in (2, 8, 64)]
    assert totals[0].optimizer > totals[1].optimizer > totals[2].optimizer or backend == "zero3 offload"
    assert totals[0].total >= totals[1].total >= totals[2].total
    assert totals[0].host >= totals[1].host >= totals[2].host


@pytest.mark.parametrize(
    ("more", "less", "part"),
    [
        ((), RECOMPUTE, "activations"),
        ((), ("--train.micro_batch", "2"), "activations"),
        ((), ("--data.max_length", "512"), "activations"),
        ((), BF16, "activations"),
        ((), LORA, "optimizer"),
        ((), LORA, "reference"),
        ((), ("--reference.cache", "hidden"), "reference"),
        ((), ("--optim.name", "sgd"), "optimizer"),
        ((), ("--kernel.cache_mb", "0"), "head"),
        ((*LORA,), (*LORA, "--model.quantize", "nf4"), "weights"),
    ],
)
def test_what_saves_memory_saves_it(planned, more, less, part):
    before, after = (backends(planned, *flags, model="middle")["single process"] for flags in (more, less))
    assert getattr(after, part) < getattr(before, part)
    assert after.total < before.total


def test_fsdp2_holds_whole_gradients_where_a_step_has_several_micro_batches(planned):
    once, twice = (backends(planned, "--train.global_batch", n, gpus=4)["fsdp2"] for n in ("32", "64"))
    assert twice.gradients == 4 * once.gradients
    assert twice.total > once.total


def test_a_method_that_reads_no_reference_holds_none(planned):
    assert backends(planned, method="sft")["ddp"].reference == 0
    assert backends(planned, "--reference.cache", "logps", method="dpo")["ddp"].reference == 0


def test_a_classifier_has_one_row_of_head_and_no_logits(planned):
    model, rows = planned(method="reward_model")
    assert model.head == model.hidden_size
    assert model.parameters == planned()[0].parameters - (model.vocabulary - 1) * model.hidden_size
    assert rows["ddp"].memory.head == rows["ddp"].memory.reference == 0
    assert planned(*LORA, method="reward_model")[0].trained < model.trained


def test_activations_grow_with_rows_and_layers_as_they_do(planned):
    one, two = (backends(planned, "--train.micro_batch", n)["ddp"].activations for n in ("4", "8"))
    assert two == pytest.approx(2 * one, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "own", "expected"),
    [
        (("--train.micro_batch", "2", *RECOMPUTE), {"model": "big", "gpus": 8}, {"zero3", "fsdp2"}),
        (
            ("--model.dtype", "bfloat16", "--train.micro_batch", "2", *LORA),
            {"model": "big", "gpus": 1},
            {"single process"},
        ),
        ((*BF16, "--train.micro_batch", "2"), {"model": "middle", "gpus": 8}, {"ddp", "zero1"}),
    ],
)
def test_recommended_backend(planned, flags, own, expected):
    rows = list(planned(*flags, **own)[1].values())
    assert recommended(rows).memory.backend in expected


def test_communication_slows_what_communicates(planned):
    fast, slow = (planned(model="big", gpus=8, bandwidth=b)[1] for b in (200, 2))
    assert slow["single process"].seconds == fast["single process"].seconds
    for backend in ("ddp", "zero1", "zero2", "zero3", "fsdp2"):
        assert slow[backend].seconds[1] > fast[backend].seconds[1]
        assert fast[backend].seconds[0] < fast[backend].seconds[1]


def test_flops_are_six_for_each_weight_and_token_and_two_for_the_reference(models):
    """Without attention, which the shortest rows make small: 6 + 2 a weight of the backbone, and those of the head."""
    own, config = parse_plan(
        ["--method", "dpo", "--model.path", models["small"], "--data.max_length", "4", "--train.layout", "padded"]
    )
    model = read_model(config, micro_batch_of(own, config))
    backbone, head = 8 * 4 * model.matrices, 2 * model.vocabulary * model.hidden_size * (1 + 2 + 1)
    assert flops(own, config, model) == pytest.approx(64 * 2 * (backbone + 2 * head), rel=0.01)


def test_page_when_nothing_fits_then_names_the_settings_to_change(models):
    page = plan_report.report(*parse_plan(["--method", "dpo", "--model.path", models["big"], "--gpus", "1"]))
    assert "recommended" not in page
    last = page.splitlines()[-1]
    assert last.startswith("no backend fits; change --train.micro_batch 1, --model.gradient_checkpointing true")
    assert "single process then needs" in last


def test_command_prints_a_row_for_each_backend_and_the_cache(server, models, tmp_path):
    ended = server.train(
        ["--method", "dpo", "--model.path", models["small"], "--gpus", "2", "--pairs", "1000"],
        command="plan",
        cwd=tmp_path,
    )
    assert ended.status == 0, ended.err
    table = {line.partition("  ")[0]: line for line in ended.out.splitlines()}
    assert [*BACKENDS] == [name for name in table if name in BACKENDS]
    # 1000 pairs, two sides, 512 tokens each, 256 wide in two bytes
    assert (
        f"reference cache of 1,000 pairs on disk: {1000 * 2 * 512 * 256 * 2 / GB:.3g} GB with reference.cache hidden"
        in ended.out
    )
    assert ended.out.splitlines()[-1].startswith("recommended: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--gpus", "0"), "--gpus: found 0, expected a number >= 1"),
        (("--gpus", "many"), "--gpus: found 'many', expected an integer"),
        (("--gpu_memory", "-1"), "--gpu_memory: found -1.0, expected a number > 0"),
        (("--tflops", "450,200"), "--tflops: found 450,200, expected the lowest and the highest TFLOP/s, e.g. 200,450"),
        (("--gpu_memmory", "80"), "--gpu_memmory: unknown setting; did you mean 'gpu_memory'?"),
        (("--train.micro_bach", "2"), "did you mean"),
        (("--completion_tokens", "1024"), "--completion_tokens: found 1024, expected less than data.max_length (1024)"),
        (("--prompt_tokens", "900", "--completion_tokens", "500"), "expected a sum of at most data.max_length (1024)"),
    ],
)
def test_bad_input_is_one_line(server, models, tmp_path, flags, expected):
    ended = server.train(["--method", "dpo", "--model.path", models["small"], *flags], command="plan", cwd=tmp_path)
    assert ended.status == 2
    assert ended.err.count("\n") == 1
    assert expected in ended.err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), "--model.path: not given, expected the model to train"),
        (("--model.path", "./nowhere"), "model.path: './nowhere' does not exist"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(server, tmp_path, flags, expected):
    ended = server.train(["--method", "dpo", *flags], command="plan", cwd=tmp_path)
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert expected in ended.err


def test_a_run_in_float32_when_bf16_is_much_faster_then_is_advised_to_take_it(models):
    words = ["--method", "tdpo", "--model.path", models["middle"], "--gpus", "8"]
    own, config = parse_plan(words)
    lines = advice(own, config, plans_of(own, config)[1])
    assert lines[1].startswith("recommended: --train.mixed_precision bf16 with ")
    assert lines[0].startswith("with these settings, in float32: ")
    slow, fast = (recommended(plans_of(own, c)[1]).seconds for c in (config, in_16_bits(own, config)))
    assert slow[1] > 3 * fast[1]
    assert f"{span(fast)} s per step instead of {span(slow)}" in lines[1]
    for flags in (BF16, ("--tflops", "10,20")):  # it is bf16 already, or the speeds are the user's
        own, config = parse_plan([*words, *flags])
        assert in_16_bits(own, config) is None


def test_hosts_memory_of_a_node_is_that_of_the_ranks_on_it(planned):
    model, rows = planned(model="middle", gpus=16, gpus_per_node=4)
    both = 4 * 2 * model.parameters  # policy and reference in float32, as they are read
    assert rows["single process"].host == both
    assert rows["ddp"].host == rows["fsdp2"].host == 4 * both
    assert rows["zero3"].host == 4 * both / 16
    assert rows["zero3 offload"].host == 4 * rows["zero3 offload"].memory.host > rows["zero3"].host


def test_hours_of_an_epoch_are_its_steps(planned):
    assert planned()[1]["ddp"].hours is None
    row = planned("--train.global_batch", "64", pairs=64_000)[1]["ddp"]
    assert row.hours == pytest.approx([1000 * seconds / 3600 for seconds in row.seconds])
    assert next(plan_report.table([row])).endswith("  h per epoch")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1224.4, "1,224"),
        (999.7, "1,000"),
        (36.61, "36.6"),
        (0.0312, "0.0312"),
        (2e-5, "0.00002"),
        (0, "0"),
        (1e9, "1,000,000,000"),
    ],
)
def test_numbers_have_no_exponent(value, text):
    assert number(value) == text
