"""Mixed precision: float32 statistics, losses near those of float32, and a scaler that skips, counts and gives up."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from prefopt.data.collate import collate
from prefopt.errors import TrainError
from prefopt.kernels.token_stats import token_stats
from prefopt.settings import KernelConfig, OptimConfig
from prefopt.training.forward import ALL_STATISTICS, PolicyWithReference, token_stats_of
from prefopt.training.metrics import read_lines
from tests.dist.ranks import run_ranks
from tests.helpers import byte_bpe_tokenizer
from tests.invariant.methods import methods
from tests.invariant.oracle import oracle_step
from tests.invariant.steps import Bench, random_pairs, two_models

METHODS = methods()
TOKEN = next(name for name, m in METHODS.items() if m.needs.reference == "token")
HALF = {"bf16": (torch.bfloat16, 2**-8), "fp16": (torch.float16, 2**-11)}  # name -> (type, rounding of one number)
each_half = pytest.mark.parametrize("half", HALF)


@each_half
def test_statistics_when_the_forward_pass_is_autocast_then_they_are_float32_and_near(half):
    dtype, rounding = HALF[half]
    policy, reference = two_models(torch.float32)
    model = PolicyWithReference(policy, reference, KernelConfig(token_tile=4, vocab_tile=16))
    batch = collate(random_pairs(), pad_id=2)
    want = (*ALL_STATISTICS, "log_sum_p2")
    exact = token_stats_of(model, batch, want)
    with torch.autocast("cpu", dtype=dtype):
        found = token_stats_of(model, batch, want)
    for name, value in vars(exact).items():
        other = getattr(found, name)
        assert other.dtype == torch.float32
        assert 0 < (other - value).abs().max() < 16 * rounding, name


@pytest.mark.parametrize("tiles", [{}, {"token_tile": 3, "vocab_tile": 7}], ids=["whole", "tiled"])
@each_half
def test_head_when_autocast_then_a_scaled_gradient_is_near_or_seen_to_overflow(half, tiles):
    """What comes in is multiplied by the scaler's factor: it goes out multiplied, or the scaler sees an overflow."""
    dtype, rounding = HALF[half]
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).requires_grad_() for n in (8, 40))
    ref_hidden, ref_weight = (torch.randn(n, 16, generator=generator) for n in (8, 40))
    labels = torch.randint(40, (8,), generator=generator)

    def gradients(scale, autocast):
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            stats = token_stats(
                hidden, weight, labels, ref_hidden=ref_hidden, ref_weight=ref_weight, want=("kl", "entropy"), **tiles
            )
        loss = (stats.logp + 0.5 * stats.kl + 0.1 * stats.entropy).sum() * scale
        return torch.autograd.grad(loss, (hidden, weight))

    exact = gradients(1.0, False)
    for scale in (1.0, 2.0**10, 2.0**20, 2.0**40):
        for expected, found in zip(exact, gradients(scale, True), strict=True):
            assert found.dtype == torch.float32
            right = (found / scale - expected).norm() <= 8 * rounding * expected.norm()
            assert right or (scale > 2**10 and not found.isfinite().all()), f"finite and wrong at a scale of {scale:g}"


# The scaler, on two processes -----------------------------------------------------------------------------------------


def _steps_in_fp16(runtime):
    """What each kind of step gives on this rank: (metrics line, whether the weights moved, the scale afterwards)."""
    method, models, answers = METHODS[TOKEN], two_models(torch.float32), {}
    assert type(runtime.accelerator.scaler) is torch.amp.GradScaler

    def step(scale, spoil=None, clip=0.0, gradients=False):
        runtime.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        bench = Bench(runtime, method, models)
        optim = OptimConfig(name="sgd", lr=1.0, warmup_ratio=0.0, clip=clip)
        bench.run.config = replace(bench.run.config, optim=optim)
        policy = bench.run.policy.lm
        before = copy.deepcopy(policy.state_dict())
        if spoil is not None and runtime.rank == 1:
            spoil(policy)
        try:
            loss, grads = bench.step(random_pairs(method.needs.columns), 2)
        except TrainError as error:
            return str(error)
        moved = math.sqrt(sum(float((w - before[n]).norm() ** 2) for n, w in policy.state_dict().items()))
        return loss, bench.line, moved, runtime.accelerator.scaler.get_scale(), grads if gradients else None

    def nan_gradient(policy):
        policy.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))

    def nan_weight(policy):
        with torch.no_grad():
            policy.lm_head.weight[7] = float("nan")

    answers["usual"] = step(2.0**14, gradients=True)
    answers["clipped"] = step(2.0**14, clip=0.5)
    answers["overflow"] = step(2.0**40)
    answers["one rank overflows"] = step(2.0**14, nan_gradient)
    answers["nothing to halve"] = step(1.0, nan_gradient)
    answers["loss not finite"] = step(2.0**14, nan_weight)
    return answers


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(_steps_in_fp16, mixed_precision="fp16")


def test_step_when_fp16_then_loss_norm_and_gradients_are_near_those_of_float32(ranks):
    method = METHODS[TOKEN]
    loss, gradients, _ = oracle_step(*two_models(torch.float32), method, random_pairs(method.needs.columns))
    norm = math.sqrt(sum(float(g.norm() ** 2) for g in gradients.values()))
    for answers in ranks:
        found, line, moved, _, others = answers["usual"]
        assert found == pytest.approx(loss, rel=1e-2)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-2)
        assert line["skipped_step"] == 0
        assert line["loss_scale"] == 2.0**14
        assert moved == pytest.approx(norm, rel=1e-2)
        for name, gradient in gradients.items():
            assert 0 < (gradient - others[name]).norm() <= 2e-2 * gradient.norm(), name
    for name in gradients:
        assert torch.equal(*(answers["usual"][4][name] for answers in ranks)), "processes drift apart"


def test_step_when_fp16_and_clipped_then_it_is_the_unscaled_gradient_that_is_clipped(ranks):
    for answers in ranks:
        _, line, moved, _, _ = answers["clipped"]
        assert line["grad_norm"] == pytest.approx(answers["usual"][1]["grad_norm"])
        assert line["grad_norm"] > 0.5
        assert moved == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(("what", "scale"), [("overflow", 2.0**40), ("one rank overflows", 2.0**14)])
def test_step_when_a_scaled_gradient_overflows_then_all_skip_it_and_halve_the_scale(what, scale, ranks):
    for answers in ranks:
        loss, line, moved, after, _ = answers[what]
        assert math.isfinite(loss)
        assert line["skipped_step"] == 1
        assert line["loss_scale"] == scale
        assert "grad_norm" not in line
        assert moved == 0
        assert after == scale / 2


def test_step_when_no_scale_helps_or_the_loss_is_not_finite_then_all_stop_with_one_line(ranks):
    for what, words in (("nothing to halve", "gradient norm nan"), ("loss not finite", "first pairs with such a loss")):
        first, second = (answers[what] for answers in ranks)
        assert first == second
        assert first.startswith("step 1: the loss or its gradient is not finite (" + words)


# Whole runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def losses(server, command, tmp_path_factory):
    """Evaluation losses of the same run in each precision, and what was said."""
    answers = {}
    for precision in ("no", *HALF):
        output = tmp_path_factory.mktemp("precision") / precision
        settings = {"train__mixed_precision": precision, "train__max_steps": 8, "train__save_every": 8}
        ended = server.train(command(TOKEN.partition("-")[0], output, **settings))
        assert ended.status == 0, ended.err
        answers[precision] = read_lines(output / "metrics.jsonl"), ended.out
    return answers


@each_half
def test_run_when_in_half_precision_then_it_learns_what_float32_learns(half, losses):
    exact, found = ([line for line in losses[p][0] if line["split"] == "eval"] for p in ("no", half))
    assert exact[-1]["loss"] < 0.8 * exact[0]["loss"]
    for mine, other in zip(exact, found, strict=True):
        assert other["loss"] == pytest.approx(mine["loss"], rel=0.05)
    assert [line["loss"] for line in exact] != [line["loss"] for line in found]
    tolerance = {"bf16": "0.1", "fp16": "0.02"}[half]
    assert f"independent path agree to {tolerance}, " in losses[half][1]
    steps = [line for line in losses[half][0] if line["split"] == "train"]
    assert all(("loss_scale" in line) == ("skipped_step" in line) == (half == "fp16") for line in steps)


def test_check_when_a_fault_is_above_what_fp16_rounds_then_it_stops(runtime):
    tokenizer = byte_bpe_tokenizer(["any text"], vocab_size=300)
    _, reference = two_models(torch.float32)
    bench = Bench(runtime, METHODS[TOKEN], (reference, reference), tokenizer=tokenizer)
    bench.run.config = replace(bench.run.config, train=replace(bench.run.config.train, mixed_precision="fp16"))
    bench.check_first_batch(random_pairs())
    bench.run.policy._scaling = (1.5, None)
    with pytest.raises(TrainError, match="an independent path gives"):
        bench.check_first_batch(random_pairs())
