"""Methods that train a classifier with one logit: how it is opened, where its score is read, what is saved of it.

That steps are right however they are cut, padded, laid out or spread: tests/invariant, as for any method.
"""

import copy
import re
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from prefopt.data.collate import collate
from prefopt.errors import ConfigError, TrainError
from prefopt.settings import LoraConfig, ModelConfig, RunConfig
from prefopt.training import (
    adapter_checks,
    adapter_loading,
    adapter_saving,
    adapters,
    first_batch,
    model_sources,
    models,
)
from prefopt.training.forward import Scorer, scores_of
from prefopt.training.metrics import read_lines
from tests.helpers import byte_bpe_tokenizer
from tests.invariant.methods import methods
from tests.invariant.oracle import oracle_score, oracle_step, scorer_of
from tests.invariant.precise import models_of
from tests.invariant.steps import BOUNDS, Bench, difference, random_pairs, two_models

METHODS = {name: method for name, method in methods().items() if method.needs.output == "scores"}
each_method = pytest.mark.parametrize("name", METHODS)
NAME, METHOD = next(iter(METHODS.items()))
PLAIN = [name for name in METHODS if "-" not in name]  # as a command would name them


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders: `lm`, a `classifier` made from it, one with `two` logits, an `encoder`."""
    root = tmp_path_factory.mktemp("places")
    lm = two_models(torch.float32)[0]
    lm.save_pretrained(root / "lm")
    scorer_of(lm).save_pretrained(root / "classifier")
    two = AutoModelForSequenceClassification.from_config(lm.config)
    assert two.config.num_labels == 2
    two.save_pretrained(root / "two")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=1, **small)).save_pretrained(root / "encoder")
    return root


def settings(path, seed=0, dtype="float64", method=METHOD, **lora):
    model = ModelConfig(path=str(path), dtype=dtype)
    return RunConfig(method=method, method_name="under_test", model=model, lora=LoraConfig(**lora), seed=seed)


def opened(config):
    """The model with which a run with these settings starts, with all checks of a run."""
    start = model_sources.find(config.model.path, config.model)
    adapter_checks.check(config, start, models.load_config(start.base, config.model))
    return adapter_loading.load_policy(config, start, model_sources.choose_reference(config, start))


# What is opened -------------------------------------------------------------------------------------------------------


def test_head_when_the_model_is_a_language_model_then_it_depends_on_the_seed_alone(places):
    def head(seed):
        torch.rand(3)
        return opened(settings(places / "lm", seed)).score.weight

    first, again, other = head(0), head(0), head(1)
    assert first.shape == (1, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_body_when_the_model_is_a_language_model_then_it_is_the_language_models(places):
    lm, classifier = two_models(torch.float32)[0], opened(settings(places / "lm"))
    for name, weight in lm.model.state_dict().items():
        assert torch.equal(weight.double(), classifier.model.state_dict()[name]), name


def test_classifier_when_it_is_one_already_then_it_is_continued(places):
    expected, found = scorer_of(two_models(torch.float32)[0]), opened(settings(places / "classifier"))
    assert torch.equal(found.score.weight, expected.score.weight.double())


@pytest.mark.parametrize(
    ("place", "lora", "message"),
    [
        ("two", {}, r"^model.path: '.*two' is a classifier with 2 logits, expected one logit$"),
        ("two", {"r": 2}, r"^model.path: '.*two' is a classifier with 2 logits, expected one logit$"),
        (
            "encoder",
            {},
            r"^model.path: BertForSequenceClassification does not read its score at the last token, expected",
        ),
        (
            "classifier",
            {"r": 2, "target_modules": ("score",)},
            r"^lora.target_modules: 'score' is the output head, which",
        ),
    ],
)
def test_model_when_it_is_no_classifier_with_one_logit_then_it_is_refused_before_it_is_loaded(
    place, lora, message, places, monkeypatch
):
    monkeypatch.setattr(models, "_load", None)
    with pytest.raises((TrainError, ConfigError), match=message):
        opened(settings(places / place, **lora))


def test_adapter_when_it_is_of_the_other_kind_then_it_is_refused(places, tmp_path):
    language = next(m for m in methods().values() if m.needs.output == "token_stats")
    for mine, other in ((METHOD, language), (language, METHOD)):
        folder = tmp_path / mine.needs.output
        adapter_saving.save(opened(settings(places / "lm", method=mine, r=2)), folder)
        with pytest.raises(ConfigError, match=r"^model.path: '.*' is an adapter of a (classifier|language model), and"):
            opened(settings(folder, method=other))


# Where the score is read ----------------------------------------------------------------------------------------------


def test_score_when_the_pad_token_stands_in_a_row_then_it_is_still_that_of_the_last_token():
    """transformers looks for the last token that does not pad; here EOS pads and ends each row."""
    classifier = scorer_of(two_models(torch.float64)[0])
    pairs = random_pairs()
    for pair in pairs:
        pair.chosen_ids[-1] = pair.rejected_ids[-1] = 1
    with torch.no_grad():
        whole = [p.prompt_ids + p.chosen_ids for p in pairs] + [p.prompt_ids + p.rejected_ids for p in pairs]
        expected = torch.stack([oracle_score(classifier, ids) for ids in whole])
        classifier.config.pad_token_id = 1
        found = scores_of(Scorer(classifier), collate(pairs, pad_id=1))
    assert (found - expected).abs().max() < 1e-12


@each_method
def test_step_when_activations_are_recomputed_then_loss_and_gradients_are_the_oracles(name, runtime):
    method, model_pair = METHODS[name], models_of("llama", torch.float64)
    rows = random_pairs(method.needs.columns, pairs=4)
    bench = Bench(runtime, method, model_pair, layout="packed_prefix_shared")
    models.recompute_activations(bench.run.policy.lm)
    calls = []
    layer = bench.run.policy.lm.base_model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    gap, where = difference(oracle_step(*model_pair, method, rows), bench.step(rows, 4))
    assert gap <= BOUNDS[torch.float64], where
    assert len(calls) == 2, "forward, and again for the backward pass"


def test_score_when_autocast_then_it_is_float32_and_near():
    classifier = scorer_of(two_models(torch.float32)[0])
    model, batch = Scorer(classifier), collate(random_pairs(), pad_id=2)
    with torch.no_grad():
        exact = scores_of(model, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = scores_of(model, batch)
            hidden = model.backbone(input_ids=batch.input_ids).last_hidden_state.flatten(0, 1)
            assert classifier.score(hidden).dtype == torch.bfloat16, "the head itself is a stock one"
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.1 * exact.abs().max()
    assert not torch.equal(found, found.bfloat16().float()), "the head rounds to float32"


def _faults():
    def last_shifted(batch):
        return SimpleNamespace(**vars(batch) | {"last_index": batch.last_index - 1, "pairs": batch.pairs})

    def sides_swapped(batch):
        return SimpleNamespace(**vars(batch) | {"last_index": batch.last_index.roll(batch.pairs), "pairs": batch.pairs})

    return last_shifted, sides_swapped


@pytest.mark.parametrize("fault", _faults(), ids=lambda f: f.__name__)
def test_step_0_when_a_score_is_read_elsewhere_then_the_run_stops_and_names_the_row(fault, runtime, monkeypatch):
    tokenizer = byte_bpe_tokenizer(["any text"], vocab_size=300)
    bench = Bench(runtime, METHOD, two_models(torch.float32), tokenizer=tokenizer)
    pairs = random_pairs()
    bench.check_first_batch(pairs)
    monkeypatch.setattr(first_batch, "to_device", lambda batch, device: fault(batch))
    with pytest.raises(TrainError, match=r"^step 0: rows:\d \(chosen\): the score is .*, an independent path gives"):
        bench.check_first_batch(pairs)


# Adapters -------------------------------------------------------------------------------------------------------------


def perturbed(lm):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return lm


def test_adapter_when_it_is_new_then_the_head_is_trained_whole_and_a_step_is_the_same_however_it_is_cut(
    runtime, places
):
    lm = perturbed(opened(settings(places / "lm", r=2, target_modules=("q_proj",))))
    trained = {name for name, p in lm.named_parameters() if p.requires_grad}
    assert trained == {
        *(f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{x}.default.weight" for i in (0, 1) for x in "AB"),
        "base_model.model.score.modules_to_save.default.weight",
    }
    assert adapters.describe_policy(lm).endswith("(LoRA r 2, alpha 4 on q_proj, and score whole)")
    rows = random_pairs()
    whole = Bench(runtime, METHOD, (lm, lm)).step(rows, 8)
    assert len(whole[1]) == len(trained)
    for micro in (1, 3):
        gap, where = difference(whole, Bench(runtime, METHOD, (lm, lm)).step(rows, micro))
        assert gap <= BOUNDS[torch.float64], where
    merged = copy.deepcopy(lm).merge_and_unload()
    with torch.no_grad():
        batch = collate(rows, pad_id=2)
        assert (scores_of(Scorer(lm), batch) - scores_of(Scorer(merged), batch)).abs().max() < 1e-10


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapter_when_it_is_saved_then_peft_opens_it_and_it_is_continued(places, tmp_path):
    lm = perturbed(opened(settings(places / "lm", r=2)))
    adapter_saving.save(lm, tmp_path)
    ids = torch.tensor([[0, 7, 8]])
    with torch.no_grad():
        expected = lm(input_ids=ids).logits
        theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(
            tmp_path, num_labels=1, dtype=torch.float64
        )
        theirs.config.pad_token_id = None
        again = opened(settings(tmp_path))
        assert (theirs(input_ids=ids).logits - expected).abs().max() < 1e-12
        assert (again(input_ids=ids).logits - expected).abs().max() < 1e-12
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in lm.named_parameters() if p.requires_grad
    }


# Whole runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_run_when_it_ends_then_it_has_learned_and_transformers_opens_its_model(name, server, command, task, tmp_path):
    ended = server.train(command(name, tmp_path / "run"))
    assert ended.status == 0, ended.err
    assert re.search(r"step 0: \d pairs scored again by an independent path agree to 0.0001\n", ended.out)
    lines = [line for line in read_lines(tmp_path / "run/metrics.jsonl") if line["split"] == "eval"]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.02
    assert lines[-1]["rewards/accuracies"] > 0.7
    assert not any(key.startswith(("logps/", "kl/", "entropy")) for key in lines[-1])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model").eval()
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == task.tokenizer.pad_token_id
    texts = ["Human: name colour 3.\n\nAssistant: red", "Human: name colour 13.\n\nAssistant: red green blue"]
    padded = task.tokenizer([f"{text}</s>" for text in texts], padding=True, return_tensors="pt")
    with torch.no_grad():
        together = model(**padded).logits[:, 0]
        alone = [model(**task.tokenizer(f"{text}</s>", return_tensors="pt")).logits[0, 0] for text in texts]
    assert together.tolist() == pytest.approx([float(score) for score in alone], abs=1e-5)


def test_run_when_eos_pads_then_the_model_that_is_saved_knows_of_no_padding(server, command, task, tmp_path):
    tokenizer = byte_bpe_tokenizer([task.pairs.read_text()], vocab_size=300, pad=False)
    model = tmp_path / "model"
    lm = two_models(torch.float32)[0]
    lm.resize_token_embeddings(len(tokenizer))
    lm.config.pad_token_id = tokenizer.eos_token_id
    lm.save_pretrained(model)
    tokenizer.save_pretrained(model)
    ended = server.train(
        command(PLAIN[0], tmp_path / "run", model__path=model, train__max_steps=2, train__save_every=1)
    )
    assert ended.status == 0, ended.err
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model")
    assert saved.config.pad_token_id is None
    with pytest.raises(ValueError, match="no padding token is defined"):
        saved(input_ids=torch.zeros(2, 3, dtype=torch.long))
