"""A classifier as judge: its scores are its own of what it was trained to read, however they are batched."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertForSequenceClassification,
    DebertaV2ForSequenceClassification,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaForSequenceClassification,
)

from prefopt import judges
from prefopt.data.encoder import Encoder
from prefopt.errors import ConfigError, DataError, RoundError, TrainError
from prefopt.judges.classifier import dtype_on
from prefopt.methods.reward_model import RewardModel
from prefopt.settings import JudgeConfig, LoraConfig, ModelConfig, RunConfig
from prefopt.training import adapter_loading, adapter_saving, model_sources
from prefopt.training.models import set_padding
from prefopt.types import PairRow
from tests.helpers import byte_bpe_tokenizer, tiny_llama
from tests.invariant.oracle import oracle_score, scorer_of
from tests.judges.conftest import QUESTIONS, question

CPU = torch.device("cpu")


def make(path, **settings):
    return judges.make(JudgeConfig(kind="reward_model", path=str(path), **settings), device=CPU)


def scores(found):
    return [score for judgement in found for score in judgement.scores]


def expected(classifier, tokenizer, asked, max_length=128):
    """Each row alone, encoded as training encodes it, by the classifier itself."""
    classifier.config.pad_token_id = None
    encoder, out = Encoder(tokenizer, max_length), []
    for q in asked:
        for response in q.responses:
            text = response.text if isinstance(q.prompt, str) else [{"role": "assistant", "content": response.text}]
            pair = encoder.pair(PairRow(q.prompt, text, None, {}, ""))
            with torch.no_grad():
                out.append(float(oracle_score(classifier, [*pair.prompt_ids, *pair.chosen_ids])))
    return out


@pytest.fixture(scope="module")
def classifier(places):
    return scorer_of(tiny_llama(len(places.tokenizer), max_position_embeddings=128))


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_scores_when_batched_then_they_are_those_of_each_row_alone(batch, places, classifier):
    found = make(places.classifier, batch=batch).judge(QUESTIONS)
    assert scores(found) == pytest.approx(expected(classifier, places.tokenizer, QUESTIONS), abs=1e-5)
    assert [judgement.problems for judgement in found] == [{}, {}]
    assert len({round(score, 4) for score in scores(found)}) == 5, "scores differ, so that something is compared"


def test_scores_when_the_prompt_is_a_conversation_then_it_is_read_through_the_classifiers_own_template(
    places, classifier
):
    asked = [question("red", "blue", prompt=[{"role": "user", "content": "Name a colour"}])]
    judge = make(places.chat)
    tokenizer = judge.classifier.tokenizer
    assert scores(judge.judge(asked)) == pytest.approx(expected(classifier, tokenizer, asked), abs=1e-5)


def test_conversations_when_the_classifier_has_no_template_then_its_tokenizer_is_named(places, tmp_path):
    asked = [question("red", "blue", prompt=[{"role": "user", "content": "Name a colour"}])]
    message = r"^judge.path: the prompts are conversations and the tokenizer of '.*classifier' has no chat template, "
    with pytest.raises(DataError, match=message):
        make(places.classifier).judge(asked)
    for path, prompts in ((places.classifier, ["text"]), (places.chat, ["text", asked[0].prompt])):
        judges.check_prompts(JudgeConfig(kind="reward_model", path=str(path)), prompts)
    with pytest.raises(DataError, match=message):
        judges.check_prompts(JudgeConfig(kind="reward_model", path=str(places.classifier)), ["text", asked[0].prompt])


def test_responses_when_they_are_empty_in_a_conversation_then_that_is_counted(places):
    prompt = [{"role": "user", "content": "Name a colour"}]
    (found,) = make(places.chat).judge([question("", "red", " \n", prompt=prompt)])
    assert found.problems == {"unreadable": 2}
    assert [math.isnan(score) for score in found.scores] == [True, False, True]


def test_scores_when_eos_pads_then_the_last_token_is_read(tmp_path, classifier):
    tokenizer = byte_bpe_tokenizer(["Name a colour: red green blue violet"], vocab_size=300, pad=False)
    model = scorer_of(tiny_llama(len(tokenizer)))
    tokenizer.pad_token_id = tokenizer.eos_token_id
    set_padding(model, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = make(tmp_path).judge(QUESTIONS)
    assert scores(found) == pytest.approx(expected(model, tokenizer, QUESTIONS), abs=1e-5)


def test_scores_when_the_judge_is_an_adapter_then_they_are_those_of_base_and_adapter(places, tmp_path):
    config = RunConfig(
        method=RewardModel(), method_name="m", model=ModelConfig(path=str(places.lm)), lora=LoraConfig(r=2)
    )
    lm = adapter_loading.load_policy(config, model_sources.find(str(places.lm), config.model), None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapter_saving.save(lm, tmp_path)
    merged = lm.eval().merge_and_unload()
    found = make(tmp_path).judge(QUESTIONS)
    assert scores(found) == pytest.approx(expected(merged, places.tokenizer, QUESTIONS), abs=1e-5)


def test_responses_when_they_are_long_or_unreadable_then_that_is_counted(places, classifier):
    asked = [question(" red", "", " red" * 60, " a</s> b", key="x")]
    (found,) = make(places.classifier, max_length=32).judge(asked)
    assert found.problems == {"unreadable": 2, "truncated": 1}
    assert [math.isnan(score) for score in found.scores] == [False, True, False, True]
    whole = [question(" red", " red" * 60)]
    assert [found.scores[0], found.scores[2]] == pytest.approx(
        expected(classifier, places.tokenizer, whole, 32), abs=1e-5
    )


def test_response_when_it_merges_with_the_prompt_then_each_is_tokenised_alone(places, classifier):
    prompt, text = "Name a colo", "ur"
    ids = [0, *places.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    ids += [*places.tokenizer(text, add_special_tokens=False)["input_ids"], 1]
    assert ids[1:-1] != places.tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
    (found,) = make(places.classifier).judge([question(text, prompt=prompt)])
    classifier.config.pad_token_id = None
    with torch.no_grad():
        assert found.scores == pytest.approx((float(oracle_score(classifier, ids)),), abs=1e-5)


def test_score_when_the_model_breaks_then_it_is_nan_and_counted(places, monkeypatch):
    judge = make(places.classifier)
    with torch.no_grad():
        judge.classifier.lm.score.weight.fill_(math.nan)
    (found,) = judge.judge(QUESTIONS[1:])
    assert found.problems == {"nan": 2}
    assert all(math.isnan(score) for score in found.scores)


# Encoders -------------------------------------------------------------------------------------------------------------


WORDS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]
WORDS += ["Name", "a", "colour", "number", "red", "green", "blue", "violet", ":", "seven"]


def save_encoder(folder, kind, *, model_max_length=None, **settings):
    """(a tiny classifier of this kind, its tokenizer), also in the folder."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=model_max_length, **names)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = kind.config_class(vocab_size=len(WORDS), num_labels=1, pad_token_id=1, **sizes | settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def test_scores_when_the_classifier_is_an_encoder_then_it_reads_two_texts_as_its_tokenizer_joins_them(tmp_path):
    model, tokenizer = save_encoder(
        tmp_path, BertForSequenceClassification, max_position_embeddings=16, model_max_length=12
    )
    long = question(" red", " green" * 20, key="long")
    found = make(tmp_path).judge([*QUESTIONS, long])
    assert found[-1].problems == {"truncated": 1}
    assert [judgement.problems for judgement in found[:-1]] == [{"truncated": 1}, {}]
    for asked, judgement in zip([*QUESTIONS, long], found, strict=True):
        for response, score in zip(asked.responses, judgement.scores, strict=True):
            how = {"truncation": True, "max_length": 12, "return_token_type_ids": True, "return_tensors": "pt"}
            ids = tokenizer(asked.prompt, response.text, **how)
            with torch.no_grad():
                assert score == pytest.approx(float(model(**ids).logits), abs=1e-5)


DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}


@pytest.mark.parametrize(
    ("kind", "settings", "usual", "most"),
    [
        (BertForSequenceClassification, {}, 20, 20),
        (RobertaForSequenceClassification, {}, 18, 18),  # positions begin behind the padding's id
        (DebertaV2ForSequenceClassification, DEBERTA | {"position_biased_input": True}, 20, 20),
        (DebertaV2ForSequenceClassification, DEBERTA | {"position_biased_input": False}, 20, None),  # relative alone
    ],
    ids=["bert", "roberta", "deberta", "deberta relative"],
)
def test_length_of_an_encoder_is_what_it_has_positions_for(kind, settings, usual, most, tmp_path):
    model, tokenizer = save_encoder(tmp_path, kind, max_position_embeddings=20, **settings)
    judge = make(tmp_path)
    assert judge.classifier.max_length == usual
    long = question(" red" * 40, key="long")
    assert judge.judge([long])[0].problems == {"truncated": 1}
    if most is not None:
        with pytest.raises(
            DataError, match=rf"^judge.max_length: found {most + 1}, and '.*' takes at most {most} tokens$"
        ):
            make(tmp_path, max_length=most + 1)
        return
    (found,) = make(tmp_path, max_length=50).judge([long])
    assert found.problems == {}
    ids = tokenizer(long.prompt, long.responses[0].text, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        assert found.scores[0] == pytest.approx(float(model(**ids).logits), abs=1e-5)


# Code that comes with the weights -------------------------------------------------------------------------------------

REMOTE = """
from dataclasses import dataclass
import torch
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.utils import ModelOutput

@dataclass
class Output(ModelOutput):
    logits: torch.Tensor = None
    score: torch.Tensor = None

class Objectives(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.heads = torch.nn.Linear(config.hidden_size, 3, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        last = attention_mask.sum(1) - 1
        states = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.heads(states[torch.arange(len(last)), last])
        return Output(logits=logits, score=logits.sum(1)) if self.config.scored else Output(logits=logits)
"""


def remote(folder, places, scored=True):
    """A model of three objectives whose output has one score, as ArmoRM's has nineteen."""
    lm = tiny_llama(len(places.tokenizer), max_position_embeddings=128)
    torch.manual_seed(1)
    heads = torch.randn(3, lm.config.hidden_size)
    lm.save_pretrained(folder)
    places.tokenizer.save_pretrained(folder)
    (folder / "objectives.py").write_text(REMOTE)
    from safetensors.torch import load_file, save_file

    weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if k != "lm_head.weight"}
    save_file({**weights, "heads.weight": heads}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Objectives"], "scored": scored, "pad_token_id": None}
    config |= {"auto_map": {"AutoModelForSequenceClassification": "objectives.Objectives"}}
    (folder / "config.json").write_text(json.dumps(config))
    return scorer_of(lm), heads


def test_scores_when_the_output_has_a_score_of_its_own_then_it_is_read_with_remote_code_only(
    places, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "armo"
    body, heads = remote(folder, places)
    found = make(folder, trust_remote_code=True).judge(QUESTIONS)
    with torch.no_grad():
        body.score.weight.copy_(heads.sum(0, keepdim=True))
    assert scores(found) == pytest.approx(expected(body, places.tokenizer, QUESTIONS), abs=1e-4)
    with pytest.raises(TrainError, match=r"^judge.path: '.*armo' "):
        make(folder)


def test_scores_when_remote_code_gives_several_numbers_then_it_is_refused(places, tmp_path):
    folder = tmp_path / "several"
    remote(folder, places, scored=False)
    with pytest.raises(RoundError, match=r"^judge.path: '.*several' gives 3 numbers for a text, expected one$"):
        make(folder, trust_remote_code=True).judge(QUESTIONS)


# What is no judge -----------------------------------------------------------------------------------------------------


def test_path_when_it_is_no_classifier_with_one_logit_then_it_is_refused(places, tmp_path):
    from transformers import AutoModelForSequenceClassification

    with pytest.raises(TrainError, match=r"^judge.path: '.*lm' has no weights for score.weight, .*expected a trained"):
        make(places.lm)
    two = AutoModelForSequenceClassification.from_config(tiny_llama(len(places.tokenizer)).config)
    two.save_pretrained(tmp_path / "two")
    places.tokenizer.save_pretrained(tmp_path / "two")
    with pytest.raises(TrainError, match=r"^judge.path: '.*two' is a classifier with 2 logits, expected one logit$"):
        make(tmp_path / "two")
    with pytest.raises(DataError, match=r"^judge.max_length: found 999, and '.*classifier' takes at most 128 tokens$"):
        make(places.classifier, max_length=999)


def test_adapter_when_it_is_of_a_language_model_then_it_is_refused(places, tmp_path):
    from prefopt.methods.sft import SFT

    config = RunConfig(method=SFT(), method_name="m", model=ModelConfig(path=str(places.lm)), lora=LoraConfig(r=2))
    adapter_saving.save(
        adapter_loading.load_policy(config, model_sources.find(str(places.lm), config.model), None), tmp_path
    )
    with pytest.raises(
        TrainError, match=r"^judge.path: '.*' is an adapter of a language model, expected a classifier's"
    ):
        make(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"^judge.path: found none, expected the folder or hub id of a classifier with one logit$"),
        ({"path": "./no/such"}, r"^judge.path: './no/such' does not exist, expected the folder of a model or a hub id"),
        ({"path": "m", "max_length": 1}, r"^judge.max_length: found 1, expected at least 2$"),
        (
            {"path": "m", "url": "http://x"},
            r"^judge.url: found 'http://x', which judge 'reward_model' does not read; it",
        ),
    ],
)
def test_settings_when_wrong_then_they_are_refused_before_anything_is_loaded(settings, message):
    with pytest.raises((ConfigError, TrainError), match=message):
        judges.check(JudgeConfig(kind="reward_model", **settings))


def test_judge_when_described_then_its_weights_are_known_by_their_hash(places):
    described = make(places.classifier, max_length=50).describe()
    assert described["kind"] == "reward_model"
    assert len(described["sha256"]) == 16
    assert described["max_length"] == 50
    assert (described["dtype"], described["device"]) == ("float32", "cpu")
    assert described["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("device", "own", "opened"),
    [
        *(("cuda", "float16", "float16"), ("cuda", "bfloat16", "bfloat16"), ("cuda", "float32", "float32")),
        *(("cpu", "float16", "float32"), ("cpu", "bfloat16", "float32")),
    ],
)
def test_dtype_is_the_classifiers_own_where_the_device_has_units_for_it(device, own, opened):
    config = PreTrainedConfig(dtype=getattr(torch, own))
    assert dtype_on(torch.device(device), config) == opened
