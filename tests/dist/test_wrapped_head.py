"""The policy inside each backend's wrapper: what two ranks train is what the plain formula says, and beside it is not.

Weights are compared after plain gradient descent. Two ranks hold completions of very different lengths, so that a
gradient that was averaged in the wrong way, or not at all, is far off.
"""

import copy
import random
from dataclasses import dataclass, replace

import pytest
import torch

from prefopt.settings import ModelConfig, OptimConfig, ReferenceConfig, RunConfig, TrainConfig
from prefopt.data.collate import collate
from prefopt.training import adapters
from prefopt.training import adapter_loading
from prefopt.training import model_sources
from prefopt.training.backends import make_backend
from prefopt.training.forward import (
    ALL_STATISTICS,
    PolicyWithReference,
    pair_stats,
    loss_token_states,
    sum_by_sequence,
    token_stats_of,
)
from prefopt.training.optimizers import make_optimizer
from prefopt.kernels.token_stats import token_stats
from prefopt.types import EncodedPair
from tests.dist.ranks import run_ranks
from tests.training.test_lora import write_adapter
from tests.fork_server import BACKENDS
from tests.invariant.oracle import oracle_stats
from tests.invariant.steps import BOS, FIRST, VOCAB, two_models
from tests.invariant.two_terms import TwoTerms

METHOD = TwoTerms()  # its terms are counted in pairs, in tokens and in weights
WANT = ("ref_logp", "kl")


def rows(lengths, seed):
    """A pair for each (chosen, rejected) length."""
    draw = random.Random(seed)

    def ids(length):
        return [draw.randrange(FIRST, VOCAB) for _ in range(length)]

    return [
        EncodedPair(
            prompt_ids=[BOS, *ids(3)],
            chosen_ids=ids(chosen),
            rejected_ids=ids(rejected),
            chosen_mask=[True] * chosen,
            rejected_mask=[True] * rejected,
            columns={"trust": draw.uniform(0.01, 0.2)},
            where=f"rows:{i + 1}",
        )
        for i, (chosen, rejected) in enumerate(lengths)
    ]


SHORT, LONG = rows([(3, 4), (5, 3), (4, 4)], 0), rows([(14, 8), (9, 13), (11, 12), (12, 10)], 1)
# what each rank is given, micro-batch by micro-batch
ONE_EACH = ([SHORT], [LONG])
TWO_EACH = ([SHORT[:1], SHORT[1:]], [LONG[:3], LONG[3:]])
NONE_ON_ONE = ([SHORT], [[]])
NONE_AT_FIRST = ([SHORT[:1], SHORT[1:]], [[], LONG])


@dataclass(frozen=True)
class Case:
    """How a policy is made and trained.

    Args: model, reference: folders of `places`. shares: see above. evaluate: between the steps.
        left_out: a key of DeepSpeed's settings that a backend writes and that is then taken out again.
    """

    model: str = "base"
    reference: str = "reference"
    shares: tuple = ONE_EACH
    frozen_head: bool = False
    steps: int = 1
    evaluate: bool = False
    lr: float = 1.0  # 1: the change of the weights is the gradient
    left_out: str | None = None

    def config(self, places):
        return RunConfig(
            method=METHOD,
            method_name="under_test",
            model=ModelConfig(path=str(places / self.model)),
            reference=ReferenceConfig(path=str(places / self.reference)),
            optim=OptimConfig(name="sgd", lr=self.lr, schedule="constant", warmup_steps=0, clip=0),
        )


CASES = {
    "all weights": Case(),
    "tied embeddings": Case("tied", "tied reference"),
    "frozen head": Case(frozen_head=True),
    "adapter": Case("adapter", "base"),
    "adapter and trained head": Case("headed", "base", steps=2, lr=0.1),
    "two micro-batches": Case(shares=TWO_EACH),
    "no pair on one rank": Case(shares=NONE_ON_ONE),
    "no pair in one micro-batch": Case(shares=NONE_AT_FIRST),
    "an evaluation between two steps": Case(steps=2, lr=0.1, evaluate=True),
}
UNCLIPPED = Case(left_out="gradient_clipping")


def load(case, places, runtime):
    """(language model, reference) as a run loads them."""
    config = case.config(places)
    start = model_sources.find(config.model.path, config.model)
    reference = model_sources.choose_reference(config, start)
    with runtime.sharded_loading():
        lm = adapter_loading.load_policy(config, start, reference)
        if isinstance(reference, model_sources.ModelSource):
            reference = adapter_loading.load_frozen(reference, config.model, "reference.path")
    if case.frozen_head:
        lm.get_output_embeddings().requires_grad_(False)
    return lm, reference


# By the plain formula -------------------------------------------------------------------------------------------------


def plain(case, places, runtime):
    """{name: weight} before and after, in one process, from whole logits."""
    lm, _ = load(case, places, runtime)
    reference, _ = load(Case(model=case.reference), places, runtime)
    before = copy.deepcopy(lm.state_dict())
    pairs = [pair for share in case.shares for micro in share for pair in micro]
    trained = [p for p in lm.parameters() if p.requires_grad]
    for _ in range(case.steps):
        stats = oracle_stats(lm, reference, pairs, METHOD.needs)
        terms = METHOD.loss(stats, collate(pairs, pad_id=2, columns=("trust",))).terms
        loss = sum(term.weight * term.value.sum() / term.count.sum() for term in terms)
        with torch.no_grad():
            for p, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                p -= case.lr * gradient
    return before, lm.state_dict()


# On two ranks ---------------------------------------------------------------------------------------------------------


def _trained(runtime, case, places, calls):
    """{name: weight} after the steps, as far as this rank has them. Args: calls: one of CALLS."""
    config = case.config(places)
    lm, reference = load(case, places, runtime)
    policy = PolicyWithReference(lm, reference, config.kernel)
    backend = make_backend(runtime, config)
    if case.left_out is not None:
        del runtime.deepspeed_settings[case.left_out]
    wrapped, _ = backend.prepare(policy, make_optimizer(config.optim, lm, fused=False))
    backend.set_lr(case.lr)
    for _ in range(case.steps):
        if case.evaluate:
            wrapped.eval()
            with torch.no_grad():
                CALLS[calls](wrapped, policy, collate(SHORT, pad_id=2, columns=("trust",)))
        wrapped.train()
        _step(runtime, backend, lambda batch: CALLS[calls](wrapped, policy, batch), case.shares)
    return {name: backend.full_tensor(w).clone() for name, w in lm.state_dict(keep_vars=True).items()}


def _through(wrapped, policy, batch):
    return pair_stats(wrapped, batch, WANT)


def _policy_beside(wrapped, policy, batch):
    return pair_stats(policy, batch, WANT)


def _head_beside(wrapped, policy, batch):
    """Statistics of the head's weight, without a call of the wrapper or of the head."""
    with torch.no_grad():
        ref_hidden = loss_token_states(policy.reference, policy.reference_attention, batch)
    hidden = loss_token_states(policy.lm, policy.attention, batch)
    reference = {"ref_hidden": ref_hidden, "ref_weight": policy.reference.lm_head.weight}
    return sum_by_sequence(token_stats(hidden, policy.lm.lm_head.weight, batch.labels, want=WANT, **reference), batch)


CALLS = {"through": _through, "policy beside": _policy_beside, "head beside": _head_beside}


def _step(runtime, backend, stats_of, shares):
    """One step of the loop: terms are divided by their counts over all ranks, and backends average over ranks."""
    pairs = [pair for share in shares for micro in share for pair in micro]
    counts = {
        "preference": len(pairs),
        "nll": sum(len(pair.chosen_ids) for pair in pairs),
        "trusted": sum(pair.columns["trust"] for pair in pairs),
    }
    mine = shares[runtime.rank]
    for number, micro in enumerate(mine):
        last = number == len(mine) - 1
        batch = collate(micro, pad_id=2, columns=("trust",))
        with backend.micro_batch(last):
            terms = METHOD.loss(stats_of(batch), batch).terms
            loss = sum(term.weight * term.value.sum() / counts[term.name] for term in terms)
            backend.backward(loss * runtime.world, last)
    backend.step()
    backend.zero_grad()


def _all(runtime, places):
    """{what: weights} of this rank for CASES, then for the same step with other calls, or the error that came."""
    answers = {name: _trained(runtime, case, places, "through") for name, case in CASES.items()}
    if runtime.backend.startswith("zero"):
        answers["clipping left out"] = _trained(runtime, UNCLIPPED, places, "through")
    for calls in ("policy beside", "head beside"):
        try:
            answers[calls] = _trained(runtime, CASES["all weights"], places, calls)
        except RuntimeError as error:
            answers[calls] = str(error)
    return answers


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders: models `base`, `reference` and both with tied embeddings; adapters `adapter` and `headed` of `base`."""
    root = tmp_path_factory.mktemp("places")
    for prefix, tied in (("", False), ("tied ", True)):
        policy, reference = two_models(torch.float32, tied)
        policy.save_pretrained(root / (prefix.strip() or "base"))
        reference.save_pretrained(root / f"{prefix}reference")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write_adapter(root / "adapter", root / "base", 1)
        write_adapter(root / "headed", root / "base", 3, modules_to_save=["lm_head"])
    return root


@pytest.fixture(scope="module")
def expected(places, runtime):
    """{name: weight} before and after a case by the plain formula, computed once."""
    return {name: plain(case, places, runtime) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def trained(places):
    """What `_all` gives on each rank under a backend, forked once."""
    done = {}

    def of(backend):
        if backend not in done:
            done[backend] = run_ranks(_all, places, backend=backend)
        return done[backend]

    return of


def largest(weights, others):
    assert weights.keys() == others.keys()
    return max(float((weights[name] - others[name]).abs().max()) for name in weights)


def gaps(expected, ranks, what):
    """The largest difference of a weight on each rank that holds whole weights."""
    found = [answers[what] for answers in ranks if answers[what]]
    assert found
    return [largest(expected, weights) for weights in found]


each_backend = pytest.mark.parametrize(
    "backend", [pytest.param(backend, marks=pytest.mark.slow if backend == "zero1" else ()) for backend in BACKENDS]
)


@each_backend
@pytest.mark.parametrize("name", CASES)
def test_policy_that_two_ranks_train_is_the_one_of_the_plain_formula(name, backend, trained, expected):
    before, after = expected[name]
    lr = CASES[name].lr
    assert largest(before, after) > 0.5 * lr, "nothing to be wrong about"
    assert max(gaps(after, trained(backend), name)) <= 1e-5 * lr


@each_backend
def test_policy_called_beside_its_wrapper_is_wrong_under_ddp_and_right_where_hooks_sit_on_its_parts(
    backend, trained, expected
):
    found = gaps(expected["all weights"][1], trained(backend), "policy beside")
    if backend == "ddp":  # which averages gradients only after a forward of its own, and says nothing
        assert min(found) > 0.5
    else:  # hooks on parameters and modules, the head's among them
        assert max(found) <= 1e-5


NO_WEIGHT_THERE = {
    "zero3": "index -1 is out of bounds for dimension 0 with size 0",
    "fsdp2": "aten.embedding.default got mixed torch.Tensor and DTensor",
}


@each_backend
def test_head_computed_beside_its_module_is_wrong_under_ddp_and_stops_where_weights_are_sharded(
    backend, trained, expected
):
    ranks = trained(backend)
    if backend in NO_WEIGHT_THERE:
        for answers in ranks:
            assert NO_WEIGHT_THERE[backend] in answers["head beside"]
        return
    found = gaps(expected["all weights"][1], ranks, "head beside")
    if backend == "ddp":
        assert min(found) > 0.5
    else:  # ZeRO-1 and 2: weights are whole, and the hooks that reduce gradients sit on them
        assert max(found) <= 1e-5


@pytest.mark.parametrize("backend", [pytest.param("zero1", marks=pytest.mark.slow), "zero2", "zero3"])
def test_clipping_that_is_off_is_off_where_a_setting_left_out_would_mean_1(backend, trained, expected):
    before, after = expected["all weights"]

    def norm(weights):
        return sum(float((weights[name] - before[name]).double().norm() ** 2) for name in before) ** 0.5

    found = trained(backend)[0]
    assert norm(after) > 10
    assert norm(found["all weights"]) == pytest.approx(norm(after), rel=1e-4)
    assert norm(found["clipping left out"]) == pytest.approx(1.0, rel=1e-3)


def _types(runtime, places):
    config = replace(CASES["all weights"].config(places), train=TrainConfig(mixed_precision="bf16"))
    lm, reference = load(CASES["all weights"], places, runtime)
    policy = PolicyWithReference(lm, reference, config.kernel)
    model, _ = make_backend(runtime, config).prepare(policy, make_optimizer(config.optim, lm, fused=False))
    stats = token_stats_of(model, collate(SHORT, pad_id=2), ALL_STATISTICS)
    return {name: value.dtype for name, value in vars(stats).items()}


def test_statistics_in_bf16_come_out_of_fsdp2_in_float32(places):
    for types in run_ranks(_types, places, backend="fsdp2", mixed_precision="bf16"):
        assert types == dict.fromkeys(["logp", *ALL_STATISTICS], torch.float32)
