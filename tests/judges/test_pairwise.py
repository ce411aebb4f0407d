"""A classifier that reads two responses: every pair in both orders, as it was trained to read them; PairRM too."""

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DebertaV2Config, PreTrainedTokenizerFast

from prefopt import judges
from prefopt.data.comparison import BothOrders
from prefopt.errors import DataError, TrainError
from prefopt.judges import pairrm
from prefopt.ranking import order_scores, win_probabilities
from prefopt.settings import JudgeConfig
from prefopt.types import PairRow
from tests.helpers import tiny_llama
from tests.invariant.oracle import oracle_score, scorer_of
from tests.judges.conftest import QUESTIONS, question

CPU = torch.device("cpu")


def make(path, **settings):
    return judges.make(JudgeConfig(kind="pairwise", path=str(path), **settings), device=CPU)


@pytest.fixture(scope="module")
def classifier(places):
    return scorer_of(tiny_llama(len(places.tokenizer), max_position_embeddings=128))


@pytest.mark.parametrize("batch", [1, 16])
def test_logits_when_batched_then_they_are_those_of_each_order_alone(batch, places, classifier):
    encoder = BothOrders(places.tokenizer, 128)
    found = make(places.classifier, batch=batch).judge(QUESTIONS)
    for asked, judgement in zip(QUESTIONS, found, strict=True):
        assert judgement.problems == {}
        for i, first in enumerate(asked.responses):
            for j, second in enumerate(asked.responses):
                if i == j:
                    assert judgement.logits[i][j] == 0.0
                    continue
                pair = encoder.pair(PairRow(asked.prompt, first.text, second.text, {}, ""))
                with torch.no_grad():
                    expected = float(oracle_score(classifier, [*pair.prompt_ids, *pair.chosen_ids]))
                assert judgement.logits[i][j] == pytest.approx(expected, abs=1e-5)
    assert win_probabilities(found[0]).shape == (3, 3)
    assert len(set(order_scores(found[0]).tolist())) == 3


def test_logits_when_responses_are_equal_unreadable_or_long_then_that_is_counted(places):
    asked = question(" red", " red", "", " blue" * 90, key="x")
    (found,) = make(places.classifier, max_length=80).judge([asked])
    table = torch.tensor(found.logits)
    assert table[0, 1] == table[1, 0] == 0.0
    assert found.problems == {"unreadable": 3, "truncated": 2}
    assert table.isnan().sum() == 6
    assert table[2].isnan().tolist() == [True, True, False, True]


def test_logits_when_the_model_breaks_then_they_are_nan_and_counted(places):
    judge = make(places.classifier)
    with torch.no_grad():
        judge.classifier.lm.score.weight.fill_(math.inf)
    (found,) = judge.judge(QUESTIONS[1:])
    assert found.problems == {"nan": 1}
    assert math.isnan(found.logits[0][1])
    assert math.isnan(found.logits[1][0])


def test_judge_when_there_is_nothing_to_compare_then_it_says_so(places):
    (found,) = make(places.classifier).judge([question(" red")])
    assert found.logits == ((0.0,),)
    assert make(places.classifier).judge([]) == []


# PairRM ---------------------------------------------------------------------------------------------------------------


WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *pairrm.MARKS,
    *["Name", "a", "colour", "number", "red", "green", "blue", "seven", ":", "."],
]


@pytest.fixture(scope="module")
def pair_rm(tmp_path_factory):
    """(folder, model, tokenizer) of the published form: its configuration, its names of weights, a tiny encoder."""
    folder = tmp_path_factory.mktemp("pairrm")
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(list(pairrm.MARKS))
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=16, **names)
    config = DebertaV2Config(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,  # as the published one names 512
        relative_attention=True,
        position_buckets=8,
        max_relative_positions=-1,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
        architectures=["DebertaV2PairRM"],
        n_tasks=1,
        drop_out=0.05,
        source_prefix_id=4,
        cand1_prefix_id=5,
        cand2_prefix_id=6,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = pairrm.PairRM(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


def by_hand(model, rows):
    """The published computation of one row: head([source; candidate 1]) minus head([source; candidate 2])."""
    ids = torch.tensor([rows])
    with torch.no_grad():
        states = model.pretrained_model(ids, output_hidden_states=True).hidden_states[-1][0]
        at = [rows.index(mark) for mark in (4, 5, 6)]
        one, other = (torch.cat((states[at[0]], states[at[k]])) for k in (1, 2))
        layers = model.head_layer
        score = [layers[4](torch.tanh(layers[1](pair))) for pair in (one, other)]
    return float(score[0] - score[1])


def test_pairrm_when_its_folder_is_named_then_its_form_is_read(pair_rm):
    folder, model, _ = pair_rm
    assert {name.split(".")[0] for name in model.state_dict()} == {"pretrained_model", "head_layer"}
    asked = question("red green", "blue .", "seven", prompt="Name a colour :")
    (found,) = make(folder, batch=2).judge([asked])
    words = {word: i for i, word in enumerate(WORDS)}

    def part(mark, text):
        return [2, mark, *(words[word] for word in text.split()), 3]

    for i, first in enumerate(asked.responses):
        for j, second in enumerate(asked.responses):
            if i != j:
                row = part(4, asked.prompt) + part(5, first.text) + part(6, second.text)
                assert found.logits[i][j] == pytest.approx(by_hand(model, row), abs=1e-5)
    assert found.problems == {}
    assert abs(found.logits[0][1] + found.logits[1][0]) > 1e-4, "the order counts"


def test_pairrm_when_a_row_is_longer_than_its_config_names_then_it_is_read_whole(pair_rm):
    folder, model, tokenizer = pair_rm
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 16
    judge = make(folder)
    assert judge.classifier.max_length == pairrm.MOST
    (found,) = judge.judge([question("red " * 300, "seven", prompt="Name")])
    assert found.problems == {}
    words = {word: i for i, word in enumerate(WORDS)}
    row = [2, 4, words["Name"], 3, 2, 5, *[words["red"]] * 300, 3, 2, 6, words["seven"], 3]
    assert found.logits[0][1] == pytest.approx(by_hand(model, row), abs=1e-5)


@pytest.mark.parametrize(
    ("max_length", "message"),
    [
        (2049, r"^judge.max_length: found 2049, and '.*' takes at most 2048 tokens$"),
        (19, r"^judge.max_length: found 19, expected at least 20: prompt and both responses$"),
    ],
)
def test_pairrm_when_its_length_cannot_be_then_it_is_refused(max_length, message, pair_rm):
    with pytest.raises(DataError, match=message):
        make(pair_rm[0], max_length=max_length)


def test_pairrm_when_texts_are_long_then_each_part_loses_its_tail_and_that_is_counted(pair_rm):
    folder, model, tokenizer = pair_rm
    most = 40  # of 2048; 23 for the source
    read = pairrm.encode(tokenizer, model.config, most)
    (((one, other), cut),) = read([("Name " * 50, "red " * 30, "seven")])
    assert cut
    assert one[:23] == [2, 4, *[7] * 20, 3]
    assert one[23:31] == [2, 5, *[WORDS.index("red")] * 5, 3]
    assert one[31:] == [2, 6, WORDS.index("seven"), 3]
    assert other[:23] == one[:23]
    assert other[23:] == [2, 5, WORDS.index("seven"), 3, 2, 6, *[WORDS.index("red")] * 5, 3]
    (((one, _), cut),) = read([("Name", "red " * 14, "seven")])
    assert not cut, "what the source leaves is the candidates'"
    asked = question("red " * 60, "seven", prompt="Name")
    (found,) = make(folder, max_length=64).judge([asked])
    assert found.problems == {"truncated": 1}


def test_pairrm_when_a_response_holds_its_marks_then_they_are_text(pair_rm):
    folder, model, tokenizer = pair_rm
    (((one, _), _),) = pairrm.encode(tokenizer, model.config, 64)([("Name", "<|candidate2|> red", "seven")])
    assert [one.count(mark) for mark in (4, 5, 6)] == [1, 1, 1]
    (found,) = make(folder, max_length=20).judge([question("<|source|> red", "seven", "")])
    assert math.isfinite(found.logits[0][1])
    assert found.problems == {"unreadable": 2}


def test_pairrm_when_the_tokenizer_knows_other_marks_then_it_is_refused(pair_rm):
    _, model, tokenizer = pair_rm
    model.config.cand1_prefix_id = 9
    try:
        with pytest.raises(
            DataError, match=r"^judge.path: the tokenizer gives .* the ids \[4, 5, 6\], the model wants"
        ):
            pairrm.encode(tokenizer, model.config, 64)
    finally:
        model.config.cand1_prefix_id = 5


def test_pairrm_when_a_weight_is_missing_then_it_is_refused(pair_rm, tmp_path):
    from safetensors.torch import load_file, save_file

    _folder, model, tokenizer = pair_rm
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["head_layer.4.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        TrainError, match=r"^judge.path: '.*' has no weights for head_layer.4.bias, which would be initialised"
    ):
        make(tmp_path)
